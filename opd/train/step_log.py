"""What a finished step leaves behind: its metrics, its samples, its seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from opd.models.base import Family
from opd.models.sharding import all_reduce
from opd.rollout.sources import decode
from opd.train.learner import StepResult
from opd.train.parts import Parts, status
from opd.types import VIEWS, Batch, Sample, transcript


@dataclass
class Clock:
    """Seconds of a step by phase."""

    start: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mark = self.start

    def lap(self, name: str) -> None:
        """Put the seconds since the last lap down to a phase."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._mark
        self._mark = now

    def metrics(self) -> dict[str, float]:
        """time/<phase>, time/rest (whatever no phase claimed) and time/step."""
        self.lap("rest")
        return {f"time/{k}": v for k, v in self.laps.items()} | {"time/step": self._mark - self.start}


def report_step(parts: Parts, done: int, batch: Batch, result: StepResult, clock: Clock) -> None:
    """Metrics and samples of a finished step; stops the run when sampler and learner have parted."""
    c = parts.config
    mismatch = result.metrics.get("mismatch/logprob", 0.0)
    if mismatch > c.rollout.max_mismatch:
        raise RuntimeError(
            f"step {done}: mean |learner - sampler| log-prob is {mismatch:.3f}, more than rollout.max_mismatch="
            f"{c.rollout.max_mismatch:g}: the server does not hold the learner's weights, or computes otherwise"
        )
    rollouts = [s.scored.rollout for s in batch.samples]
    line: dict[str, Any] = {"step": done, "steps": c.train.steps, **result.metrics}
    line["length/mean"] = batch.tokens / batch.responses
    truncated = all_reduce(torch.tensor(float(sum(r.truncated for r in rollouts))), "sum")
    line["length/truncated"] = float(truncated) / batch.responses
    line["tokens"] = batch.tokens
    if c.rollout.student_writes:
        lag = max((done - 1 - r.version for r in rollouts if r.version >= 0), default=0)
        line["version/lag"] = int(all_reduce(torch.tensor(float(lag)), "max"))
    line |= clock.metrics()
    parts.seconds += line["time/step"]
    line["seconds"] = parts.seconds
    line["samples_per_s"] = batch.responses / line["time/step"]
    if parts.log is None:
        return
    parts.log.step(line)
    for view in VIEWS:
        shown = [s for s in batch.samples if s.scored.rollout.view == view][: c.train.samples_per_step]
        for s in shown:
            parts.log.sample(_sample_line(parts.learner.family, done, s, result.advantages[s.place]))
    status(parts, "training", done)


def _sample_line(family: Family, step: int, s: Sample, advantage: list[float]) -> dict[str, Any]:
    r = s.scored.rollout
    return {
        "step": step,
        "id": r.prompt.id,
        "view": r.view,
        "prompt": transcript(r.prompt),
        "text": decode(family, r.token_ids),
        "tokens": [family.tokenizer.decode([i]) for i in r.token_ids],
        "advantage": advantage,
        "truncated": r.truncated,
    }
