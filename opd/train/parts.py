"""What the loop holds together, and what a finished step leaves behind: its metrics, its samples, its seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from opd.config.schema import Config
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family
from opd.models.sharding import all_reduce
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import PromptStream
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import ResponseSource, decode
from opd.storage.metrics import MetricsLog
from opd.teachers.base import Teacher
from opd.train.evaluator import Evaluator
from opd.train.learner import Learner, StepResult
from opd.train.verdict import Verdict
from opd.types import VIEWS, Batch, Sample, transcript


@dataclass(kw_only=True)
class Parts:
    """Everything that the loop holds together."""

    config: Config
    learner: Learner
    teacher: Teacher | None  # none: nothing in the run needs one
    stream: PromptStream
    clips: ClipLoader
    source: ResponseSource
    log: MetricsLog | None  # rank 0 only
    sampler: VllmSampler | None = None
    sync: WeightSync | None = None
    evaluator: Evaluator | None = None
    seconds: float = 0.0  # trained, over all resumes
    verdict: Verdict = field(default_factory=Verdict)  # on the evaluations so far


def status(parts: Parts, phase: str, step: int, detail: str = "") -> None:
    """Tell the launcher where the run stands."""
    if parts.log is not None:
        parts.log.status(phase, detail, step, parts.config.train.steps, None)


class Clock:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self.start = self._mark = time.perf_counter()
        self.laps: dict[str, float] = {}

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
        for s in [s for s in batch.samples if s.scored.rollout.view == view][: c.train.samples_per_step]:
            parts.log.sample(_sample_line(parts.learner.family, done, s, result.advantages[s.place]))
    status(parts, "training", done)


def _sample_line(family: Family, step: int, s: Sample, advantage: list[float]) -> dict[str, Any]:
    r = s.scored.rollout
    tokens = [family.tokenizer.decode([i]) for i in r.token_ids]
    line = {"step": step, "id": r.prompt.id, "view": r.view, "prompt": transcript(r.prompt)}
    line |= {"text": decode(family, r.token_ids), "tokens": tokens}
    return line | {"advantage": advantage, "truncated": r.truncated}
