"""What the launcher shows: one line per process, the run's phase, a progress bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from opd.config import Config
from opd.supervisor import Process

PLAIN_EVERY_S = 10.0


class Display:
    """Plain lines: at every change of phase, every evaluation, and every few seconds of training."""

    def __init__(self, config: Config) -> None:
        self.folder, self.steps = Path(config.run.dir), config.train.steps
        self.processes: list[Process] = []
        self._phase, self._printed, self._step = "", 0.0, 0
        self._evals = len(self._evaluations())
        self._states: dict[str, str] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def say(self, text: str) -> None:
        """One message above whatever is shown."""
        print(text, flush=True)

    def status(self) -> dict[str, Any]:
        """The learner's last word, {} before its first."""
        try:
            return json.loads((self.folder / "status.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def refresh(self) -> None:
        """Print what changed."""
        for p in self.processes:
            state = f"exited {p.code}" if p.code is not None else p.state
            if self._states.get(p.command.name) != state:
                self._states[p.command.name] = state
                self.say(f"{p.command.name}: {state} (log {p.log})")
        status = self.status()
        phase = f"{status.get('phase', '')} {status.get('detail', '')}".strip()
        if phase and phase != self._phase:
            self._phase = phase
            self.say(f"phase: {phase}")
        self._show_evaluations()
        self._show_step()

    def _show_evaluations(self) -> None:
        found = self._evaluations()
        for line in found[self._evals :]:
            self.say(describe_evaluation(line))
        self._evals = len(found)

    def _show_step(self) -> None:
        line = self.newest()
        now = time.monotonic()
        if line is None or line["step"] == self._step:
            return
        if now - self._printed >= PLAIN_EVERY_S or line["step"] == self.steps:
            self._printed, self._step = now, line["step"]
            self.say(describe_step(line))

    def newest(self) -> dict[str, Any] | None:
        """The last whole line of metrics.jsonl."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1]) if lines else None
        except (OSError, json.JSONDecodeError):
            return None

    def _evaluations(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.folder / "eval.jsonl").read_text().splitlines()]
        except (OSError, json.JSONDecodeError):
            return []


class LiveDisplay(Display):
    """The same on a terminal: status lines and a progress bar that stay in place."""

    def __init__(self, config: Config) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(config)
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveDisplay:
        self.live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.live.__exit__(kind, e, tb)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        rows: list[Any] = []
        for p in self.processes:
            state = f"exited {p.code}" if p.code is not None else p.state
            uptime = int(time.monotonic() - p.started)
            where = p.command.url or str(p.log)
            rows.append(Text(f"  {p.command.name:8} {state:10} pid {p.guard.pid}  {uptime:4d} s  {where}"))
        status, line = self.status(), self.newest()
        rows.append(Text(f"  {status.get('phase', 'waiting')} {status.get('detail', '')}".rstrip()))
        if line is not None:
            rows.append(ProgressBar(total=self.steps, completed=line["step"], width=60))
            rows.append(Text("  " + describe_step(line)))
        self._show_evaluations()
        self.live.update(Group(*rows))


def make_display(config: Config, plain: bool) -> Display:
    """Live on a terminal, plain lines elsewhere or on request."""
    return Display(config) if plain or not sys.stdout.isatty() else LiveDisplay(config)


def describe_step(m: dict[str, Any]) -> str:
    """One line of a step's metrics."""
    parts = [f"step {m['step']}/{m['steps']}", f"loss {m['loss']:.3f}"]
    for view in ("speech", "text"):
        if f"reverse_kl/{view}" in m:
            parts.append(f"reverse KL {view} {m[f'reverse_kl/{view}']:.3f}")
    parts += [f"length {m['length/mean']:.1f}", f"{m['samples_per_s']:.0f} samples/s"]
    left = (m["steps"] - m["step"]) * m["seconds"] / m["step"]
    return ", ".join([*parts, f"ETA {int(left) // 60}:{int(left) % 60:02d}"])


def describe_evaluation(e: dict[str, Any]) -> str:
    """One line of an evaluation."""
    names = ("accuracy/speech", "accuracy/text", "accuracy/teacher", "retention", "reverse_kl/speech", "misalignment")
    shown = [f"{n} {e[n]['mean']:.3f} ± {e[n]['stderr'] or 0:.3f}" for n in (*names, "forgetting") if n in e]
    return f"evaluation {e['stage']}: " + ", ".join(shown)
