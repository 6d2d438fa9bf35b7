"""One of two learner ranks of `opd families --check`: does the learner agree with vLLM, before and after pushes?

Started by opd/family_check.py with torch's launcher. Prints nothing; rank 0 writes its findings as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opd import checkpoint, extensions
from opd.batch import all_reduce, collate, make_batch, make_samples
from opd.clips import ClipLoader, Room
from opd.config import Config, load_config
from opd.family_check import LORA, PUSHES
from opd.learner import Learner
from opd.models import family_of
from opd.models.base import Family, SpeechLM
from opd.models.lora import adapters
from opd.objectives import xopd
from opd.prompts import read_manifest
from opd.rollout import VllmSampler
from opd.types import VIEWS, Prompt, Rollout, Sample, ScoredRollout, View
from opd.weight_sync import WeightSync

NOISE = 0.05  # standard deviation of what is added to each weight


class Check:
    """A learner under ZeRO-3, a live server, and prompts with one clip, several, several turns, and none."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.family: Family = family_of(config.student.path)
        self.learner = Learner(config, self.family, config.student.path)
        self.rank, self.world = self.learner.rank, self.learner.world
        self.sampler = VllmSampler(config, self.family, config.rollout.urls)
        self.prompts, bad = read_manifest(config.data.train)
        assert not bad, bad
        self.clips = load_clips(config, self.family, self.prompts)

    def sample(self) -> list[Rollout]:
        """Two answers to each prompt in each view, the same list on every rank."""
        box: list[Any] = [None]
        if self.rank == 0:
            box = [ask(self.sampler, self.prompts, self.clips)]
        dist.broadcast_object_list(box)
        return box[0]

    def mismatch(self, rollouts: list[Rollout]) -> float:
        """Greatest |learner - sampler| log-prob over the tokens of all rollouts."""
        mine = rollouts[self.rank :: self.world]
        samples = make_samples([ScoredRollout(r, None) for r in mine], self.clips, self.family)
        worst = 0.0
        for sample in samples:
            mb, logits = self.learner.eval_logits([sample], self.clips)
            worst = max(worst, furthest(mb.targets, logits, sample))
        return float(all_reduce(torch.tensor(worst), "max"))

    def sharded_loss(self, rollouts: list[Rollout], path: str) -> float:
        """|loss under ZeRO-3 - loss of the unsharded model of `path`| on one batch, the ranks together."""
        family = family_of(path)
        reference = SpeechLM(family.load(torch.float32, self.config.student.attention), family, ["llm"])
        reference.eval()
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
                    logits = plain_logits(reference, mb, self.clips)
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
        return self.learner.step(batch, 0)["loss"]

    def perturb(self, parts: list[str]) -> None:
        """Add noise to the weights of some parts, the same on all ranks."""
        import deepspeed

        generator = torch.Generator().manual_seed(7)
        for name, p in self.learner.model.hf.named_parameters():
            if not p.requires_grad or self.family.part_of(name) not in parts:
                continue
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if self.rank == 0:
                    p.data.add_(NOISE * torch.randn(p.shape, generator=generator))

    def gathered(self, device: torch.device | str = "cpu") -> Any:
        """The learner's trained weights, those of the parts of this push."""
        for name, value in self.learner.gathered(device=device):
            if self.family.part_of(name) in self.parts:
                yield name, value

    def pushes(self, of: dict[str, list[str]]) -> dict[str, list[float]]:
        """Mismatch of each push of perturbed weights: [when it is left out, afterwards]."""
        found = {}
        sync = WeightSync(self.sampler.servers, self.family, self.config, self.rank)
        for version, (name, self.parts) in enumerate(of.items(), 1):
            self.perturb(self.parts)
            stale = self.mismatch(self.sample())
            sync.audio_trained = self.parts != ["llm"]
            sync.push(self, version)
            self.sampler.version = version
            found[name] = [stale, self.mismatch(self.sample())]
        sync.close()
        return found


def with_adapters(recipe: str, overrides: list[str], base: Path, out: Path) -> dict[str, Any]:
    """The same with LoRA adapters, on the checkpoint `base`, which the server holds; the merged one goes to `out`."""
    check = Check(load_config(recipe, [*overrides, f"student.path={base}", *LORA]))
    weights: list[Any] = [a.weight for a in adapters(check.learner.model.hf)]
    assert weights and all(w.ds_tensor.numel() < w.ds_numel for w in weights), "adapters are not sharded"
    before = check.mismatch(check.sample())
    ((stale, fresh),) = check.pushes({"LoRA": ["llm"]}).values()
    checkpoint.save_model(check.learner, out)
    merged = check.sharded_loss(check.sample(), str(out))
    return {"push": [stale, fresh], "parity": before, "checkpoint": merged, "mixed": check.mixed_step(check.sample())}


def load_clips(config: Config, family: Family, prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """Waveforms of all prompts, by path."""
    room = Room(family, config.rollout.max_tokens, None)
    loader = ClipLoader(config, family.sampling_rate, len(prompts), room=room)
    clips: dict[str, np.ndarray] = {}
    for p in prompts:
        clips |= loader.load(p) or {}
    return clips


def ask(sampler: VllmSampler, prompts: list[Prompt], clips: dict[str, np.ndarray]) -> list[Rollout]:
    """Two answers to each prompt in each view."""
    jobs: list[tuple[Prompt, View, str]] = [(p, v, p.id) for v in VIEWS for p in prompts]
    return sampler.sample(jobs, clips, 2, 1.0, check=False)


def furthest(targets: torch.Tensor, logits: torch.Tensor, sample: Sample) -> float:
    """Greatest |log-prob - sampler's| over one sample's tokens; targets [1, T], logits [1, T, V]."""
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[0, :, 0]
    return float((logp.cpu() - torch.from_numpy(sample.scored.rollout.logprobs)).abs().max())


def plain_logits(model: SpeechLM, mb: Any, clips: dict[str, np.ndarray]) -> torch.Tensor:
    """Logits [B, T, V] of an unsharded model."""
    with torch.no_grad():
        audio = model(features=model.family.features([clips[k] for k in mb.clips])) if mb.clips else None
        names = ("ids", "position_ids", "attends", "row", "positions")
        return model(audio=audio, **{n: getattr(mb, n) for n in names})


def fresh(config: Config) -> dict[str, float]:
    """Greatest |transformers - vLLM| log-prob of a checkpoint that a fresh server holds."""
    family = family_of(config.student.path)
    prompts, _ = read_manifest(config.data.train)
    clips = load_clips(config, family, prompts)
    model = SpeechLM(family.load(torch.float32, config.student.attention), family, ["llm"]).eval()
    worst = 0.0
    for rollout in ask(VllmSampler(config, family, config.rollout.urls), prompts, clips):
        (sample,) = make_samples([ScoredRollout(rollout, None)], clips, family)
        mb = collate([sample])
        worst = max(worst, furthest(mb.targets, plain_logits(model, mb, clips), sample))
    return {"checkpoint": worst}


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
    found: dict[str, Any] = {"prompts": len(rollouts), "parity": check.mismatch(rollouts)}
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
