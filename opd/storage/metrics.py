"""Metric names, standard errors, and where numbers go: JSON lines always, other sinks on request."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from opd.settings import UserError
from opd.storage.json_lines import finite, read_lines, write_atomic
from opd.storage.run_folder import status_of

# Log-probabilities, losses and divergences are in nats per token, lengths in tokens, times in seconds; ratio/clipped
# and length/truncated are shares in [0, 1]. A line leaves out what does not apply to it.
STEP_METRICS = (
    *("loss", "reverse_kl/speech", "reverse_kl/text", "advantage/mean", "ratio/mean", "ratio/clipped"),
    *("mismatch/logprob", "entropy", "length/mean", "length/truncated", "tokens", "samples_per_s", "version/lag"),
    *("kd/ce", "kd/kl", "lr", "grad_norm", "seconds"),
    *("time/rollout", "time/teacher", "time/learner", "time/sync", "time/rest", "time/step"),
)
# Each an Estimate: accuracy and retention are shares in [0, 1], drops percent below the teacher, lengths tokens
# of a greedy response with its end of turn, the rest nats a token
EVAL_METRICS = (
    *("accuracy/speech", "accuracy/text", "accuracy/teacher", "drop/speech", "drop/text"),
    *("misalignment", "forgetting", "retention", "reverse_kl/speech", "reverse_kl/text"),
    *("length/speech", "length/text"),
)
RUN_PHASES = ("starting", "loading", "evaluating", "training", "checkpointing", "finished", "failed", "interrupted")


class Sink(NamedTuple):
    """A tracker: what takes a step's numbers, and what ends it."""

    write: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


class MetricsLog:
    """The run folder's JSON lines and status; made on rank 0 only.

    Raises UserError when a requested sink's package is not installed.
    """

    def __init__(self, run_dir: Path, sinks: list[str], project: str, run_name: str) -> None:
        self.run_dir = run_dir
        self.warnings: list[str] = []  # of the newest evaluation
        self._sinks = [_make_sink(name, run_dir, project, run_name) for name in sinks]

    def step(self, line: dict[str, Any]) -> None:
        """A finished step, to metrics.jsonl and every sink."""
        self._append("metrics.jsonl", line)
        self._copy({k: v for k, v in line.items() if k not in ("step", "steps")}, line["step"])

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation, to eval.jsonl and every sink."""
        self._append("eval.jsonl", line)
        self._warned(line)
        numbers = {f"eval/{k}": line[k]["mean"] for k in EVAL_METRICS if k in line}
        self._copy(numbers | {"eval/warnings": len(self.warnings)}, line["step"])

    def sample(self, line: dict[str, Any]) -> None:
        """One rollout with its advantages, to samples.jsonl."""
        self._append("samples.jsonl", line)

    def status(
        self, phase: str, detail: str, step: int, steps: int, error: str | None = None, user_error: bool = False
    ) -> None:
        """Replace status.json, atomically."""
        assert phase in RUN_PHASES, phase
        content: dict[str, Any] = {"phase": phase, "detail": detail, "step": step, "steps": steps, "error": error}
        content |= {"user_error": user_error, "warnings": self.warnings}
        write_atomic(self.run_dir / "status.json", json.dumps(content))

    def failed(self, rank: int, steps: int, error: str, user_error: bool) -> None:
        """Tell why a rank failed, unless another did so first: the others then fail for want of it."""
        before = status_of(self.run_dir)
        if before.get("phase") != "failed":
            with contextlib.suppress(OSError):  # of a full disk; stderr says it too
                self.status("failed", f"rank {rank}", before.get("step", 0), steps, error, user_error)

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, and a last line that was cut off, before a resumed run writes again.

        Sinks keep what they have. Raises UserError naming file and line when another line is broken.
        """
        for name in ("metrics.jsonl", "samples.jsonl", "eval.jsonl"):
            path = self.run_dir / name
            if path.is_file():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                write_atomic(path, "".join(map(_json, kept)))
                if name == "eval.jsonl":
                    self._warned(kept[-1] if kept else {})

    def close(self) -> None:
        """End the sinks; the run folder's files are whole after every call."""
        for sink in self._sinks:
            sink.close()

    def _warned(self, line: dict[str, Any]) -> None:
        self.warnings = [w["text"] for w in line.get("warnings", [])]

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.run_dir / name, "a", encoding="utf-8") as f:
            f.write(_json(line))

    def _copy(self, values: dict[str, Any], step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for sink in self._sinks:
            sink.write(numbers, step)


def _make_sink(name: str, run_dir: Path, project: str, run_name: str) -> Sink:
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}[name]
    try:
        package = importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"metrics.sinks: {name} is not installed; `pip install {name}`, or take it out") from e
    if name != "tensorboard":
        package.init(project=project, name=run_name)
        return Sink(lambda values, step: package.log(values, step=step), package.finish)
    writer = package.SummaryWriter(str(run_dir / "tensorboard"))

    def write(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Sink(write, writer.close)


def _json(line: dict[str, Any]) -> str:
    return json.dumps(finite(line), allow_nan=False) + "\n"
