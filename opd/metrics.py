"""Metric names, standard errors, and where numbers go: JSON lines always, other sinks on request."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from opd.config import UserError

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
PHASES = ("starting", "loading", "evaluating", "training", "checkpointing", "finished", "failed", "interrupted")

Estimate = dict[str, float | int | None]


class Sink(NamedTuple):
    """A tracker: what takes a step's numbers, and what ends it."""

    write: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


class Line(BaseModel):
    """What every line of a run's JSON lines carries; a reader that needs more of a file says so in a subclass."""

    model_config = ConfigDict(strict=True, extra="allow")
    step: NonNegativeInt


def mean_stderr(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n) (s with n - 1 degrees of freedom); None where n is too small."""
    n = len(values)
    if n == 0:
        return {"mean": None, "stderr": None, "n": 0}
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else None
    return {"mean": mean, "stderr": None if variance is None else math.sqrt(variance / n), "n": n}


def ratio_stderr(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str] | None = None
) -> Estimate:
    """Ratio of sums m = sum(a) / sum(b) with its linearised standard error, one (a, b) per record:

    sqrt(g / (g - 1) * sum((a_i - m b_i)^2)) / sum(b) over g independent records. A mean per token whose tokens belong
    to records. Records of the same cluster, such as recordings of one question, are not independent: they are added
    up first, and g counts clusters. `n` counts records.
    """
    n = len(numerators)
    sums: dict[Any, tuple[float, float]] = {}
    for key, a, b in zip(clusters if clusters is not None else range(n), numerators, denominators, strict=True):
        before = sums.get(key, (0.0, 0.0))
        sums[key] = (before[0] + a, before[1] + b)
    total, g = sum(b for _, b in sums.values()), len(sums)
    if total == 0:
        return {"mean": None, "stderr": None, "n": n}
    m = sum(a for a, _ in sums.values()) / total
    if g < 2:
        return {"mean": m, "stderr": None, "n": n}
    squares = sum((a - m * b) ** 2 for a, b in sums.values())
    return {"mean": m, "stderr": math.sqrt(g / (g - 1) * squares) / total, "n": n}


def drop(right: Sequence[float], teacher: Sequence[float], asked: Sequence[str] | None = None) -> Estimate:
    """Mean relative drop below the teacher in percent, 100 * (1 - student / teacher), with its standard error.

    Both answered the same records: the delta method over paired records, clustered by what is `asked`.
    """
    ratio = ratio_stderr(right, teacher, asked)
    if ratio["mean"] is None:
        return {"mean": None, "stderr": None}
    stderr = ratio["stderr"]
    return {"mean": 100.0 * (1.0 - float(ratio["mean"])), "stderr": None if stderr is None else 100.0 * float(stderr)}


def read_lines(path: Path, shape: type[BaseModel] = Line) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; none when there is no such file.

    A last line without its line end that does not parse was cut off while it was written, and is left out. Raises
    UserError naming file and line for any other line that is not an object of this shape.
    """
    if not path.exists():
        return
    try:
        with open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                if not raw.strip():
                    continue
                try:
                    found = _finite(json.loads(raw.decode("utf-8")))
                except (ValueError, RecursionError) as e:
                    if not raw.endswith(b"\n"):
                        return
                    start = raw[:60].decode("utf-8", "backslashreplace").strip()
                    raise UserError(f"{path}:{number}: expected a JSON object, found {start!r} ({e})") from e
                yield conform(found, shape, f"{path}:{number}")
    except OSError as e:
        raise UserError(f"{path}: expected a readable file ({e.strerror})") from e


def conform(value: Any, shape: type[BaseModel], where: str) -> dict[str, Any]:
    """The value itself, when it is an object of this shape. Raises UserError, with the place in front, when not."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {type(value).__name__}")
    try:
        shape.model_validate(value)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UserError(f"{where}: expected a key {key}, found none") from e
        message = first["msg"].removeprefix("Value error, ")
        found = json.dumps(first["input"], default=str)[:60]
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}, found {found}") from e
    return value


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
        assert phase in PHASES, phase
        content: dict[str, Any] = {"phase": phase, "detail": detail, "step": step, "steps": steps, "error": error}
        content |= {"user_error": user_error, "warnings": self.warnings}
        write_atomic(self.run_dir / "status.json", json.dumps(content))

    def failed(self, rank: int, steps: int, error: str, user_error: bool) -> None:
        """Tell why a rank failed, unless another did so first: the others then fail for want of it."""
        try:
            before = json.loads((self.run_dir / "status.json").read_text())
        except (OSError, json.JSONDecodeError):
            before = {}
        if before.get("phase") != "failed":
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


def write_atomic(path: Path, text: str) -> None:
    """Write aside, then rename: a reader sees the old content or the new, never a half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _json(line: dict[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(node: Any) -> Any:
    """JSON has no NaN and no infinity: null. Scalars and arrays of numpy and torch become plain numbers and lists."""
    if isinstance(node, dict):
        return {k: _finite(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(v) for v in node]
    if hasattr(node, "tolist"):
        return _finite(node.tolist())
    return None if isinstance(node, float) and not math.isfinite(node) else node


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
