"""Metric names, standard errors, and where numbers go: JSON lines always, other sinks on request."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.config import UserError

STEP_METRICS = (
    *("loss", "reverse_kl/speech", "reverse_kl/text", "advantage/mean", "ratio/mean", "ratio/clipped"),
    *("mismatch/logprob", "entropy", "length/mean", "length/truncated", "tokens", "samples_per_s", "version/lag"),
    *("kd/ce", "kd/kl", "lr", "grad_norm", "seconds"),
    *("time/rollout", "time/teacher", "time/learner", "time/sync", "time/rest", "time/step"),
)
EVAL_METRICS = (
    *("accuracy/speech", "accuracy/text", "accuracy/teacher", "drop/speech", "drop/text"),
    *("misalignment", "forgetting", "retention", "reverse_kl/speech", "reverse_kl/text"),
)
PHASES = ("starting", "loading", "evaluating", "training", "checkpointing", "finished", "failed")

Estimate = dict[str, float | int | None]


def mean_stderr(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n) (s with n - 1 degrees of freedom); None where n is too small."""
    n = len(values)
    if n == 0:
        return {"mean": None, "stderr": None, "n": 0}
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else None
    return {"mean": mean, "stderr": None if variance is None else math.sqrt(variance / n), "n": n}


def ratio_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Ratio of sums m = sum(a) / sum(b) with its linearised standard error, one (a, b) per independent record:

    sqrt(n / (n - 1) * sum((a_i - m b_i)^2)) / sum(b). A mean per token whose tokens cluster in records.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    n, total = len(pairs), sum(b for _, b in pairs)
    if total == 0:
        return {"mean": None, "stderr": None, "n": n}
    m = sum(a for a, _ in pairs) / total
    if n < 2:
        return {"mean": m, "stderr": None, "n": n}
    return {"mean": m, "stderr": math.sqrt(n / (n - 1) * sum((a - m * b) ** 2 for a, b in pairs)) / total, "n": n}


class MetricsLog:
    """The run folder's JSON lines and status; made on rank 0 only.

    Raises UserError when a requested sink's package is not installed.
    """

    def __init__(self, run_dir: Path, sinks: list[str], project: str, run_name: str) -> None:
        self.run_dir = run_dir
        self._sinks = [_make_sink(name, run_dir, project, run_name) for name in sinks]

    def step(self, line: dict[str, Any]) -> None:
        """A finished step, to metrics.jsonl and every sink."""
        self._append("metrics.jsonl", line)
        for sink in self._sinks:
            sink({k: v for k, v in line.items() if isinstance(v, int | float)}, line["step"])

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation, to eval.jsonl and every sink."""
        self._append("eval.jsonl", line)
        for sink in self._sinks:
            sink({f"eval/{k}": line[k]["mean"] for k in EVAL_METRICS if k in line}, line["step"])

    def sample(self, line: dict[str, Any]) -> None:
        """One rollout with its advantages, to samples.jsonl."""
        self._append("samples.jsonl", line)

    def status(
        self, phase: str, detail: str, step: int, steps: int, error: str | None = None, user_error: bool = False
    ) -> None:
        """Replace status.json, atomically."""
        assert phase in PHASES, phase
        content: dict[str, Any] = {"phase": phase, "detail": detail, "step": step, "steps": steps, "error": error}
        content["user_error"] = user_error
        _replace(self.run_dir / "status.json", json.dumps(content))

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, and a last line that was cut off, before a resumed run writes again."""
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            path = self.run_dir / name
            if path.is_file():
                kept = [line for line in path.read_text().splitlines() if _up_to(line, step)]
                _replace(path, "".join(line + "\n" for line in kept))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.run_dir / name, "a") as f:
            f.write(json.dumps(_finite(line)) + "\n")


def _finite(node: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(node, dict):
        return {k: _finite(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_finite(v) for v in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def _make_sink(name: str, run_dir: Path, project: str, run_name: str) -> Any:
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}[name]
    try:
        package = importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"metrics.sinks: {name} is not installed; `pip install {name}`, or take it out") from e
    if name == "tensorboard":
        writer = package.SummaryWriter(str(run_dir / "tensorboard"))
        return lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()]
    package.init(project=project, name=run_name)
    return lambda values, step: package.log({**values, "step": step})
