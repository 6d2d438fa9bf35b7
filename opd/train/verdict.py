"""What a run's evaluations say while it trains: which was the best, whether to go on, what to warn of.

All of it is a function of the lines of eval.jsonl and of the settings: a resumed run judges as it did before.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from opd.config.schema import BETTER, EvalConfig, WarnConfig


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, which is what best.json holds."""

    step: int
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Verdict:
    """What the evaluations so far mean for the run."""

    best: Best | None = None
    stop: str = ""  # why it ends before its last step; empty: it goes on

    @property
    def named(self) -> dict[str, Any] | None:
        """The best as JSON has it."""
        return asdict(self.best) if self.best else None


def measured(line: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A metric of an evaluation on the records of those in training, so that like is compared with like."""
    found = (line.get("first") or {}).get(name) or line.get(name)
    return found if found and found.get("mean") is not None else None


def verdict(lines: Iterable[dict[str, Any]], settings: EvalConfig) -> Verdict:
    """The best evaluation after the first step by `settings.best` (the earlier of equal ones), and whether
    `settings.patience` evaluations after it were no better. `lines`: of eval.jsonl."""
    metric = settings.best
    if metric is None:
        return Verdict()
    at = {line["step"]: measured(line, metric) for line in lines if line["step"] > 0}
    best: Best | None = None
    for step, found in sorted(at.items()):
        if found and (best is None or BETTER[metric] * (found["mean"] - best.value) > 0):
            best = Best(step, metric, found["mean"], found.get("stderr"))
    since = sum(best is None or step > best.step for step in at)
    if settings.patience is None or since < settings.patience:
        return Verdict(best)
    than = f"better than {best.value:.4g} of step {best.step}" if best else "measured at all"
    return Verdict(best, f"stopped at step {max(at)}: {metric} was not {than} in {since} evaluations (eval.patience)")


def warnings(before: Iterable[dict[str, Any]], now: dict[str, Any], warn: WarnConfig) -> list[dict[str, str]]:
    """What an evaluation has to warn of beside the first one of `before`: {"name": metric, "text": one line} each.

    A change counts when it exceeds both its margin and `warn.errors` standard errors of the difference of the two,
    sqrt(a^2 + b^2). Both answered the same records, mostly alike, so that the true error is smaller: cautious.
    """
    first = next(iter(before), None)
    if first is None:
        return []
    found = []

    def note(name: str, setting: str, text: str) -> None:
        text = f"step {now['step']}: {text} at step {first['step']} (eval.warn.{setting})"
        found.append({"name": name, "text": text})

    for name, words, setting in (("accuracy/text", "typed accuracy", "text"), ("retention", "retention", "retention")):
        value, change, stderr = _change(first, now, name)
        if -change > max(getattr(warn, setting), warn.errors * stderr):
            note(name, setting, f"{words} is {value:.3f}, {-change:.3f} ± {stderr:.3f} lower than")
    for view, words in (("speech", "spoken"), ("text", "typed")):
        value, change, stderr = _change(first, now, f"length/{view}")
        if change > max((warn.length - 1) * (value - change), warn.errors * stderr):
            longer = f"{value:.1f} tokens on average, {change:.1f} ± {stderr:.1f} more than"
            note(f"length/{view}", "length", f"answers to {words} questions have {longer}")
    return found


def _change(first: dict[str, Any], now: dict[str, Any], name: str) -> tuple[float, float, float]:
    """A metric's value now, its change since the first evaluation, and that change's standard error; no change where
    one of the two was not measured, or on too few records for an error."""
    a, b = measured(first, name), measured(now, name)
    if a is None or b is None or a.get("stderr") is None or b.get("stderr") is None:
        return 0.0, 0.0, 0.0
    return b["mean"], b["mean"] - a["mean"], math.hypot(a["stderr"], b["stderr"])
