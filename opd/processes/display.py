"""What the launcher shows: one line per process, the run's phase, a progress bar."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

from opd.config.schema import Config
from opd.processes.guard import Process
from opd.storage.run_folder import status_of
from opd.types import VIEWS

PLAIN_EVERY_S = 10.0
EVALUATED = (
    *("accuracy/speech", "accuracy/text", "accuracy/teacher", "retention"),
    *("reverse_kl/speech", "reverse_kl/text", "misalignment", "forgetting"),
)
TAIL_BYTES = 65536  # of metrics.jsonl: room for its newest line


class Display(ExitStack):
    """Plain lines: at every change of phase, every evaluation, and every few seconds of training."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.folder, self.steps = Path(config.run.dir), config.train.steps
        self.processes: list[Process] = []
        self._phase, self._printed, self._step = "", 0.0, 0
        self._evals_read = 0  # bytes of eval.jsonl that were shown, or written by an earlier start
        self._new_evaluations()
        self._states: dict[str, str] = {}

    def say(self, text: str) -> None:
        """One message above whatever is shown."""
        print(text, flush=True)

    def refresh(self) -> None:
        """Print what changed."""
        for p in self.processes:
            state = f"exited {p.code}" if p.code is not None else p.state
            if self._states.get(p.command.name) != state:
                self._states[p.command.name] = state
                self.say(f"{p.command.name}: {state} (log {p.log})")
        status = status_of(self.folder)
        phase = f"{status.get('phase', '')} {status.get('detail', '')}".strip()
        if phase and phase != self._phase:
            self._phase = phase
            self.say(f"phase: {phase}")
        self._show_evaluations()
        line, now = self.newest(), time.monotonic()
        due = now - self._printed >= PLAIN_EVERY_S
        if line and line["step"] != self._step and (due or line["step"] == self.steps):
            self._printed, self._step = now, line["step"]
            self.say(describe_step(line))

    def _show_evaluations(self) -> None:
        for line in self._new_evaluations():
            self.say(describe_evaluation(line))
            for found in line.get("warnings", []):
                self.say(f"warning: {found['text']}")

    def newest(self) -> dict[str, Any] | None:
        """The last whole line of metrics.jsonl; None until the learner has made the folder ready for this run."""
        if not status_of(self.folder):
            return None
        lines, _ = _whole_lines(self.folder / "metrics.jsonl", -TAIL_BYTES)
        return _object(lines[-1]) if lines else None

    def _new_evaluations(self) -> list[dict[str, Any]]:
        lines, self._evals_read = _whole_lines(self.folder / "eval.jsonl", self._evals_read)
        return [e for e in map(_object, lines) if e is not None]


class LiveDisplay(Display):
    """The same on a terminal: status lines and a progress bar that stay in place."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self.enter_context(self.live)
        return self

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        rows: list[Any] = []
        for p in self.processes:
            state = f"exited {p.code}" if p.code is not None else p.state
            uptime = int(time.monotonic() - p.started)
            where = p.command.url or str(p.log)
            rows.append(Text(f"  {p.command.name:8} {state:10} pid {p.guard.pid}  {uptime:4d} s  {where}"))
        status, line = status_of(self.folder), self.newest()
        rows.append(Text(f"  {status.get('phase', 'waiting')} {status.get('detail', '')}".rstrip()))
        rows += [Text(f"  warning: {text}", style="yellow") for text in status.get("warnings", [])]
        if line is not None:
            bar = ProgressBar(total=self.steps, completed=line["step"], width=60)
            rows.append(Padding(bar, (0, 2)))  # the bar alone does not end its line
            rows.append(Text("  " + describe_step(line)))
        self._show_evaluations()
        self.live.update(Group(*rows))


def describe_step(m: dict[str, Any]) -> str:
    """One line of a step's metrics."""
    parts = [f"step {m['step']}/{m['steps']}", f"loss {_number(m, 'loss')}"]
    parts += [f"reverse KL {view} {_number(m, key)}" for view in VIEWS if (key := f"reverse_kl/{view}") in m]
    parts += [f"length {_number(m, 'length/mean', 1)}", f"{_number(m, 'samples_per_s', 0)} samples/s"]
    minutes, seconds = divmod(int((m["steps"] - m["step"]) * m["seconds"] / m["step"]), 60)
    eta = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    return ", ".join([*parts, f"ETA {eta}"])


def describe_evaluation(e: dict[str, Any]) -> str:
    """One line of an evaluation."""
    shown = [f"{n} {_number(e[n], 'mean')} ± {_number(e[n], 'stderr')}" for n in EVALUATED if n in e]
    return f"evaluation {e['stage']}: " + ", ".join(shown)


def _number(record: dict[str, Any], key: str, digits: int = 3) -> str:
    """A metric for reading; JSON's null stands for a number that is not finite, or that too few records gave."""
    value = record.get(key)
    return "n/a" if value is None else f"{value:.{digits}f}"


def _whole_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """Complete lines from byte `start`, and where they end: the learner may be in the middle of the next one.

    A negative start counts from the end. A resumed or overwritten run drops lines: what is left was shown before.
    """
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            start = f.seek(min(start, size) if start >= 0 else max(0, size + start))
            read = f.read()
    except FileNotFoundError:
        return [], 0
    whole = read[: read.rfind(b"\n") + 1]
    return whole.splitlines(), start + len(whole)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the tail of a longer line, or one that a kill -9 cut short
        return None
