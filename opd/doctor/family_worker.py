"""One of two learner ranks of `opd families --check`: does the learner agree with vLLM, before and after pushes?

Started by opd/doctor/families.py with torch's launcher. Prints nothing; rank 0 writes its findings as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor.families import LORA, PUSHES
from opd.doctor.probe import Mismatch, PlainStudent, Probe
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family
from opd.models.context_limit import ContextLimit
from opd.models.load import family_of
from opd.models.lora import adapters
from opd.models.sharding import all_reduce
from opd.objectives.losses import xopd
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import read_manifest
from opd.train import checkpoint, extensions
from opd.train.batch import collate, make_batch, make_samples
from opd.train.learner import Learner
from opd.types import VIEWS, Prompt, Rollout, ScoredRollout, View

NOISE = 0.05  # standard deviation of what is added to each weight


class Check(Probe):
    """A learner under ZeRO-3, a live server, and prompts with one clip, several, several turns, and none."""

    def __init__(self, config: Config) -> None:
        family = family_of(config.student.path)
        super().__init__(config, family, *load_prompts(config, family))
        self.learner = Learner(config, self.family, config.student.path)
        self.rank, self.world = self.learner.rank, self.learner.world

    def sample(self) -> list[Rollout]:
        """Two answers to each prompt in each view, the same list on every rank."""
        box: list[Any] = [None]
        if self.rank == 0:
            box = [super().sample()]
        dist.broadcast_object_list(box)
        return box[0]

    def mismatch(self, rollouts: list[Rollout]) -> Mismatch:
        """Of the tokens of all rollouts, over all ranks; each of them looks at one rollout at a time."""
        mine = rollouts[self.rank :: self.world]
        samples = make_samples([ScoredRollout(r, None) for r in mine], self.clips, self.family)
        away = []
        for sample in samples:
            mb, logits = self.learner.eval_logits([sample], self.clips)
            logp = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])[0, :, 0].cpu()
            away.append((logp - torch.from_numpy(sample.scored.rollout.logprobs)).abs())
        every = torch.cat(away).double()
        total, count = all_reduce(torch.tensor([every.sum(), float(len(every))]), "sum").tolist()
        return Mismatch(total / count, float(all_reduce(every.max(), "max")))

    def sharded_loss(self, rollouts: list[Rollout], path: str) -> float:
        """|loss under ZeRO-3 - loss of the unsharded model of `path`| on one batch, the ranks together."""
        plain = self.config.model_copy(update={"student": self.config.student.model_copy(update={"lora": None})})
        reference = PlainStudent(plain, family_of(path), self.prompts, self.clips)
        scored = [ScoredRollout(r, self.graded(r)) for r in rollouts[self.rank :: self.world]]
        batch = make_batch(make_samples(scored, self.clips, self.family), self.clips, self.config)
        losses = []
        for ours in (True, False):
            total = 0.0
            for part in batch.micro_batches:
                if ours:
                    mb, logits = self.learner.eval_logits(part, self.clips)
                else:
                    mb = collate(part)
                    logits = reference.logits(mb)
                logp = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])[..., 0]
                total += float((xopd(logp, mb.teacher_logp, logp, mb.sampler_logp).loss * mb.weights).sum())
            losses.append(float(all_reduce(torch.tensor(total, dtype=torch.float64), "sum")))
        return abs(losses[0] - losses[1])

    def graded(self, rollout: Rollout) -> np.ndarray:
        """Stand-in for a teacher's log-probs: any numbers will do where only two losses are compared."""
        assert rollout.logprobs is not None
        return rollout.logprobs - 0.5

    def mixed_step(self, rollouts: list[Rollout]) -> float:
        """A gradient step in which one rank has speech only and the other text only; its loss."""
        mine: View = VIEWS[self.rank % 2]
        scored = [ScoredRollout(r, self.graded(r)) for r in rollouts if r.view == mine]
        batch = make_batch(make_samples(scored, self.clips, self.family), self.clips, self.config)
        return self.learner.step(batch, 0).metrics["loss"]

    def perturb(self) -> None:
        """The same on all ranks."""
        import deepspeed

        generator = torch.Generator().manual_seed(7)
        for name, p in self.learner.model.hf.named_parameters():
            if not p.requires_grad or self.family.part_of(name) not in self.parts:
                continue
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if self.rank == 0:
                    p.data.add_(NOISE * torch.randn(p.shape, generator=generator))

    def gathered(
        self, trainable_only: bool = True, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | None]]:
        for name, value in self.learner.gathered(trainable_only, device):
            if self.family.part_of(name) in self.parts:
                yield name, value

    def pushes(self, of: dict[str, list[str]]) -> dict[str, list[float]]:
        """Mismatch of each push of perturbed weights: [when it is left out, afterwards]."""
        found = {}
        sync = WeightSync(self.sampler.servers, self.family, self.config, self.rank)
        for version, (name, self.parts) in enumerate(of.items(), 1):
            sync.audio_trained = self.parts != ["llm"]
            found[name] = [m.greatest for m in self.perturbed_and_pushed(sync, version)]
        sync.close()
        return found


def with_adapters(recipe: str, overrides: list[str], base: Path, out: Path) -> dict[str, Any]:
    """The same with LoRA adapters, on the checkpoint `base`, which the server holds; the merged one goes to `out`."""
    check = Check(load_config(recipe, [*overrides, f"student.path={base}", *LORA]))
    weights: list[Any] = [a.weight for a in adapters(check.learner.model.hf)]
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


def fresh(config: Config) -> dict[str, float]:
    """Greatest |transformers - vLLM| log-prob of a checkpoint that a fresh server holds."""
    family = family_of(config.student.path)
    plain = PlainStudent(config, family, *load_prompts(config, family))
    return {"checkpoint": plain.mismatch(plain.sample()).greatest}


def main() -> None:
    """`family_worker OUT RECIPE [key=value ...]`; OUT.json takes the findings, OUT/ the checkpoint."""
    out, recipe, *overrides = sys.argv[1:]
    config = load_config(recipe, overrides)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    if config.run.stage == "fresh":
        Path(f"{out}.json").write_text(json.dumps(fresh(config)))
        return
    import deepspeed

    extensions.build()
    deepspeed.init_distributed("gloo", verbose=False)
    check = Check(config)
    rollouts = check.sample()
    found: dict[str, Any] = {"prompts": len(rollouts), "parity": check.mismatch(rollouts).greatest}
    found["zero3"] = check.sharded_loss(rollouts, config.student.path)
    found["push"] = check.pushes(PUSHES)
    base = Path(f"{out}-base")
    checkpoint.save_model(check.learner, base)
    found["mixed"] = check.mixed_step(rollouts)
    lora = with_adapters(recipe, overrides, base, Path(out))
    found["push"]["LoRA"], found["LoRA checkpoint"] = lora["push"], lora["checkpoint"]
    found["parity"] = max(found["parity"], lora["parity"])
    if check.rank == 0:
        Path(f"{out}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
