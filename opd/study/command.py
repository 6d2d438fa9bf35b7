"""The command `opd study`: runs what is missing, several runs at a time, each by `opd launch` in its own process."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from opd.processes.commands import Command
from opd.processes.guard import Process, stop_all
from opd.processes.supervise import Signals
from opd.settings import UserError
from opd.storage import run_folder
from opd.study.grid import Study
from opd.study.runs import Run
from opd.study.spec import Row

POLL_S = 0.25
TAIL = 4  # lines of a failed run's log that are shown
TO_RUN = ("missing", "partial", "failed")
say = partial(print, flush=True)


def main(
    path: Path, only: list[str], jobs: int | None, dry_run: bool, report_only: bool, launcher: Launcher | None = None
) -> int:
    """Run what is missing, then write the tables. 0: all done; 1: a run failed; 128 + number: a signal ended it.

    Raises UserError for a mistake in the study, its recipes, `jobs`, or a pattern of `only`, for files that its runs
    would miss, where another study is at work, and for a report of nothing.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: expected 1 or more, found {jobs}")
    study = Study(path)
    wanted = study.chosen_rows(only)
    if not report_only:
        study.check_files(wanted)
    code = 0
    if dry_run:
        show(study, wanted)
        return code
    if not report_only:
        with run_folder.lock(study.out, of="out", by="opd study"):
            failed, code = run_all(study, wanted, jobs or study.spec.jobs, launcher or Launcher())
        if failed:
            say(f"failed: {', '.join(run.name for run in failed)}")
            code = code or 1
    elif not any(study.outcome(run).finished for row in study.rows.values() for run in study.named(row)):
        raise UserError(f"{study.out}: nothing to report yet, no finished run of {path} in there")
    from opd.study.results import write  # pandas and scipy, which listing and running need not wait for

    write(study)
    return code


def show(study: Study, wanted: list[Row]) -> None:
    """List what there is of every row, and what a study would run."""
    counts = dict.fromkeys(("finished", *TO_RUN, "conflict", "open"), 0)
    for row in wanted:
        named = study.named(row)
        for run in named:
            outcome = study.outcome(run)
            counts[outcome.state] += 1
            why = outcome.error if outcome.state in ("failed", "conflict") else study.problem(run)
            waits = f": {why}" if why and outcome.state != "finished" else ""
            print(f"{outcome.state:9} {run.name}{waits}")
        if open_ := study.count(row) - len(named):
            counts["open"] += open_
            print(f"{'open':9} {row.id}: {open_} runs whose learning rate is not chosen yet")
    print(f"{sum(map(study.count, wanted))} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n))


class Launcher:
    """Starts and ends `opd launch` of this installation; every launch dies with this process, also after `kill -9`."""

    def start(self, run: Run) -> Process:
        """Begin a launch; its output is appended to the run's log. Raises UserError where that cannot be."""
        try:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            options = [run.row.recipe, *run.overrides, "--plain"]
            return Process(Command(run.name, [sys.executable, "-m", "opd.cli", "launch", *options], {}), run.log)
        except OSError as e:
            raise UserError(f"{run.log}: expected a log that can be written ({e.strerror})") from e

    def stop(self, started: list[Process]) -> None:
        """Ask all to end and wait until nothing of them is left."""
        stop_all(started)


def run_all(study: Study, rows: list[Row], jobs: int, launcher: Launcher) -> tuple[list[Run], int]:
    """Run what is missing, `jobs` at a time, in the order of the rows; a run that fails does not hold up the others.

    Returns the runs that failed or hold something else, and 0, or 128 + the number of the signal that ended it.
    """
    board = Board(study, rows, jobs)
    with Signals() as signals:
        try:
            while True:
                for over in [r for r, started in board.running.items() if started.code is not None]:
                    board.ended(over)
                while len(board.running) < jobs and not signals.received and (run := board.next()):
                    board.began(run, launcher.start(run))
                if not board.running or signals.received:
                    break
                time.sleep(POLL_S)
        finally:
            launcher.stop([*board.running.values()])
    if not signals.received:
        return board.failed, 0
    say(f"stopped by {signals.received.name}; the same command goes on from here")
    return board.failed, 128 + signals.received


class Board:
    """What is done, what runs, what failed, and how long the rest may take."""

    def __init__(self, study: Study, rows: list[Row], jobs: int) -> None:
        self.study, self.rows, self.jobs = study, rows, jobs
        self.total = sum(map(study.count, rows))
        self.taken: dict[Run, float] = {}  # runs of this session, and when they began
        self.running: dict[Run, Process] = {}
        self.failed: list[Run] = []
        self.took: list[float] = []
        self._queue: list[Run] | None = None  # None: has to be found anew

    def next(self) -> Run | None:
        """The next run that can start; None when there is none now."""
        if self._queue is None:
            self._queue = self._ready()
        return self._queue.pop(0) if self._queue else None

    def _ready(self) -> list[Run]:
        found = []
        for run in (r for r in self._named() if r not in self.taken):
            outcome = self.study.outcome(run)
            if outcome.state == "conflict":
                self.taken[run] = time.monotonic()
                self.failed.append(run)
                say(f"{run.name}: {outcome.error}")
            elif outcome.state in TO_RUN and self.study.problem(run) is None:
                found.append(run)
        return found

    def _named(self) -> list[Run]:
        return [r for row in self.rows for r in self.study.named(row)]

    def began(self, run: Run, started: Process) -> None:
        """A run was started."""
        self.taken[run] = time.monotonic()
        self.running[run] = started
        say(f"{self._progress()} started {run.name}")

    def ended(self, run: Run) -> None:
        """A run has ended; it counts as done when its folder says so."""
        code = self.running.pop(run).code
        self.study.forget(run)
        took = time.monotonic() - self.taken[run]
        outcome = self.study.outcome(run)
        self._queue = None
        if outcome.finished:
            self.took.append(took)
            say(f"{self._progress()} finished {run.name} in {minutes(took)}")
            return
        self.failed.append(run)
        why = outcome.error or f"{outcome.state}, exit code {code}"
        say(f"{self._progress()} FAILED {run.name} (exit code {code}): {why}; its log, {run.log}, ends:")
        for line in tail(run.log):
            say(f"    {line}")

    def _progress(self) -> str:
        done = sum(self.study.outcome(r).finished for r in self._named())
        text = f"[{done}/{self.total} done, {len(self.running)} running"
        if self.failed:
            text += f", {len(self.failed)} failed"
        if self.took:
            left = max(0, self.total - done - len(self.failed)) * sum(self.took) / len(self.took) / self.jobs
            text += f", about {minutes(left)} left"
        return text + "]"


def minutes(seconds: float) -> str:
    """A duration for people."""
    whole = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{whole} min" if whole < 90 else f"{whole // 60} h {whole % 60} min"


def tail(log: Path) -> list[str]:
    """The last lines of a log, empty ones left out."""
    if not log.is_file():
        return []
    return [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-TAIL:]
