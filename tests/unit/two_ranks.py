"""What one of two learner processes does: importable, for each is a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from small_learner import CLIPS, ONE, STUDENT, Reference, config, gradient, make_learner
from torch import Tensor

from opd.config.schema import Config
from opd.models.base import Family, family_of
from opd.objectives.token_loss import Logits
from opd.train.batch import make_batch
from opd.train.learner import Learner
from opd.types import Sample

MIX = ["rollout.source=mix", "rollout.n=3"]
CASES = [
    *([f"objective.lambda={lam}", f"objective.average={a}"] for lam in (0, 0.5, 1) for a in ("response", "token")),
    ["objective.name=kd", "rollout.source=teacher", "objective.average=token"],
    ["objective.name=reverse_kl", "objective.top_k=4", "objective.lambda=0.3"],
    *(["objective.name=jsd", f"objective.average={a}", "objective.lambda=0.7", *MIX] for a in ("response", "token")),
    ["objective.name=cord", "objective.cord_decay=0.7"],
    ["objective.name=entropy_aware", "objective.lambda=0"],
]


class Teacher:
    """Logits by what a sample is."""

    def __init__(self, logits: dict[Any, Tensor]) -> None:
        self.made = logits

    def logits(self, samples: list[Sample]) -> Logits:
        rollouts = [s.scored.rollout for s in samples]
        flat = torch.cat([self.made[r.prompt.id, r.view, r.token_ids] for r in rollouts])
        return lambda part: flat[part]


def samples_of(reference: Reference, family: Family, c: Config) -> list[Sample]:
    """The answers of test_learner; with a mix of sources the teacher wrote those to "ba"."""
    rng = np.random.default_rng(3)
    samples = reference.samples(family, c)
    for s in samples:
        rollout, t = s.scored.rollout, len(s.response_ids)
        if c.rollout.source == "mix" and rollout.prompt.id == "ba":
            rollout = replace(rollout, logprobs=None, version=-1, stands_for=c.rollout.n)
        top: tuple[Any, ...] = (None, None)
        if k := c.objective.top_k:
            ids = np.stack([[y, *rng.choice(np.arange(100, 300), k - 1, replace=False)] for y in s.response_ids])
            top = ids, rng.normal(-3, 0.5, (t, k)).astype(np.float32)
        s.scored = replace(s.scored, rollout=rollout, top_ids=top[0], top_logprobs=top[1])
    return samples


def one_gradient(learner: Learner, case: list[str], budget: int, samples: list[Sample], logits: Any) -> Any:
    """(metrics, gradient) of a step on this rank's samples, scaled as for ZeRO, which averages over ranks."""
    c = config("objective.advantage_clip=2.5", "objective.ratio_max=1.3", f"train.micro_batch_tokens={budget}", *case)
    learner.config = c
    learner.model.zero_grad()
    batch = make_batch(samples[learner.rank :: learner.world], CLIPS, c)
    metrics = learner.step(batch, 0, Teacher(logits)).metrics
    return metrics, {n: g.clone() for n, g in gradient(learner).items()}


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    work = torch.load(f"{folder}/work.pt", weights_only=False)
    found = []
    learner = make_learner(family_of(STUDENT), config())
    learner.rank, learner.world = rank, 2
    for case, samples, want_metrics, want in work["cases"]:
        metrics, got = one_gradient(learner, case, ONE, samples, work["logits"])
        for g in got.values():
            dist.all_reduce(g)
        errors = {n: float((got[n] / 2 - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in want.items()}
        found.append((metrics, want_metrics, max(errors.values()), max(float(g.abs().max()) for g in want.values())))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
