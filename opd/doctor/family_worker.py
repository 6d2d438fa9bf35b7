"""The workers of `opd families --check`: does the learner agree with vLLM, before and after pushes?"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor.families import LORA, PUSHES
from opd.doctor.probe import PlainStudent, Probe, chosen
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family, family_of
from opd.models.lora import adapters
from opd.models.sharding import all_reduce
from opd.objectives.losses import xopd
from opd.objectives.token_loss import MicroBatch
from opd.prompts.clips import ClipLoader, ContextLimit
from opd.prompts.manifest import read_manifest
from opd.storage.metrics import MetricsLog
from opd.train import checkpoint, extensions
from opd.train.batch import make_batch, make_samples
from opd.train.learner import Learner, Weights
from opd.types import VIEWS, Batch, Prompt, Rollout, Sample, ScoredRollout

NOISE = 0.05  # standard deviation of what is added to each weight


class Check(Probe):
    """A learner under ZeRO-3, a live server, and prompts with one clip, several, several turns, and none."""

    def __init__(self, config: Config) -> None:
        family = family_of(config.student.path)
        super().__init__(config, family, *load_prompts(config, family))
        self.learner = Learner(config, self.family, config.student.path)
        self.model, self.rank, self.world = self.learner.model, self.learner.rank, self.learner.world

    def eval_logits(self, samples: list[Sample]) -> tuple[MicroBatch, Tensor]:
        return self.learner.eval_logits(samples, self.clips)

    def all_gathered(self, trainable_only: bool, device: torch.device | str) -> Weights:
        return self.learner.gathered(trainable_only, device)

    def whole(self, parameter: Tensor) -> AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def noise(self, weights: Tensor) -> float:
        return NOISE

    def batch(self, rollouts: list[Rollout]) -> Batch:
        """Of one rank. Any numbers will do for a teacher's where only losses are compared."""
        scored = [ScoredRollout(r, r.logprobs - 0.5) for r in rollouts if r.logprobs is not None]
        return make_batch(make_samples(scored, self.clips, self.family), self.clips, self.config)

    def sharded_loss(self, rollouts: list[Rollout], path: str) -> float:
        """|loss under ZeRO-3 - loss of the unsharded model of `path`| on one batch, the ranks together."""
        reference = PlainStudent(self.config.changed({"student.lora": None}), family_of(path), self.prompts, self.clips)
        batch = self.batch(rollouts[self.rank :: self.world])
        losses = []
        for side in (self, reference):
            total = 0.0
            for part in batch.micro_batches:
                mb, logits = side.eval_logits(part)
                logp = chosen(mb, logits)
                total += float((xopd(logp, mb.teacher_logp, logp, mb.sampler_logp).loss * mb.weights).sum())
            losses.append(float(all_reduce(torch.tensor(total, dtype=torch.float64), "sum")))
        return abs(losses[0] - losses[1])

    def mixed_step(self, rollouts: list[Rollout]) -> float:
        """A gradient step in which one rank has speech only and the other text only; its loss."""
        mine = [r for r in rollouts if r.view == VIEWS[self.rank % 2]]
        return self.learner.step(self.batch(mine), 0).metrics["loss"]

    def pushes(self, of: dict[str, list[str]]) -> dict[str, list[float]]:
        """Greatest mismatch of each push of perturbed weights: [when it is left out, afterwards].

        The last parts stay perturbed, here and on the server: what is saved then is not what was loaded.
        """
        found = {}
        with closing(WeightSync(self.sampler.servers, self.family, self.config, self.rank)) as sync:
            for version, (name, self.parts) in enumerate(of.items(), 1):
                sync.audio_trained = self.parts != ["llm"]
                stale, fresh, restored = self.push_and_restore(sync, version)
                found[name] = [stale.greatest, max(fresh.greatest, restored.greatest)]
            self.perturb()
            self.push(sync, len(of) + 1)
        return found


def with_adapters(recipe: str, overrides: list[str], base: Path, out: Path) -> dict[str, Any]:
    """The same with LoRA adapters, on the checkpoint `base`, which the server holds; the merged one goes to `out`."""
    check = Check(load_config(recipe, [*overrides, f"student.path={base}", *LORA]))
    weights: list[Any] = [a.weight for a in adapters(check.model.hf)]
    assert weights and all(w.ds_tensor.numel() < w.ds_numel for w in weights), "adapters are not sharded"
    before = check.mismatch(check.sample()).greatest
    ((stale, fresh),) = check.pushes({"LoRA": ["llm"]}).values()
    checkpoint.save_model(check.learner, out)
    merged = check.sharded_loss(check.sample(), str(out))
    return {"push": [stale, fresh], "parity": before, "checkpoint": merged, "mixed": check.mixed_step(check.sample())}


def load_prompts(config: Config, family: Family) -> tuple[list[Prompt], dict[str, np.ndarray]]:
    """The manifest's prompts and their waveforms by path."""
    prompts, bad = read_manifest(config.data.train)
    assert not bad, bad
    limit = ContextLimit(family, config.rollout.max_tokens, None)
    loader = ClipLoader(config, family.sampling_rate, len(prompts), limit=limit)
    clips: dict[str, np.ndarray] = {}
    for p in prompts:
        clips |= loader.load(p) or {}
    return prompts, clips


def fresh(log: MetricsLog, recipe: str, overrides: list[str], found: str) -> None:
    """Greatest |transformers - vLLM| log-prob of a checkpoint that a fresh server holds, to the file `found`."""
    config = load_config(recipe, overrides)
    family = family_of(config.student.path)
    plain = PlainStudent(config, family, *load_prompts(config, family))
    Path(found).write_text(json.dumps({"checkpoint": plain.mismatch(plain.sample()).greatest}))


def ranks(log: MetricsLog, recipe: str, overrides: list[str], out: str, found: str) -> None:
    """What two learner ranks measure; rank 0 writes it to the file `found`, and the checkpoint to the folder `out`."""
    config = load_config(recipe, overrides)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    extensions.build()
    deepspeed.init_distributed("gloo", verbose=False)
    check = Check(config)
    rollouts = check.sample()
    told: dict[str, Any] = {"prompts": len(rollouts), "parity": check.mismatch(rollouts).greatest}
    told["zero3"] = check.sharded_loss(rollouts, config.student.path)
    told["push"] = check.pushes(PUSHES)
    base = Path(f"{out}-base")
    checkpoint.save_model(check.learner, base)
    told["mixed"] = check.mixed_step(rollouts)
    lora = with_adapters(recipe, overrides, base, Path(out))
    told["push"]["LoRA"], told["LoRA checkpoint"] = lora["push"], lora["checkpoint"]
    told["parity"] = max(told["parity"], lora["parity"])
    if check.rank == 0:
        Path(found).write_text(json.dumps(told))
    dist.destroy_process_group()
