"""Brings up servers and learner on this machine, shows how they do, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

import httpx
import psutil

from opd import preflight
from opd.config import Config, UserError, load_config
from opd.display import Display, make_display
from opd.servers import Command, learner, servers
from opd.supervisor import Process, stop_all

POLL_S = 0.25
SWEEP_S = 10.0
STARTED = "=== opd starts: "  # a log file keeps what earlier starts wrote
PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>


class RunFailed(RuntimeError):
    """A server or the learner ended badly: the message names it, the cause and the log."""


class Interrupted(Exception):
    """A signal asked the launcher to stop."""


class Signals:
    """Notes a signal for the loops to look at: an exception in mid-start could lose sight of a new process."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, self._note) for n in self.NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.received:
            raise Interrupted(self.received.name)


def main(recipe: str, overrides: list[str], dry_run: bool, plain: bool) -> int:
    """`opd launch`: the errors of a run as one line."""
    try:
        return launch(recipe, overrides, dry_run, plain)
    except RunFailed as e:
        print(f"opd: error: {e}", file=sys.stderr)
        return 1


def launch(recipe: str, overrides: list[str], dry_run: bool = False, plain: bool = False) -> int:
    """Run a recipe: checks, servers, learner. 0 when done, 128 + number when a signal stopped it (130 for Ctrl-C).

    Raises UserError for what the user can mend and RunFailed for all else that ends a server or the learner.
    """
    config = load_config(recipe, overrides)
    if dry_run:
        started = servers(config)
        for command in [*started, learner(config, recipe, overrides, started)]:
            print(f"# {command.name}\n{command.shell()}\n")
        return 0
    if preflight.finished(config):
        print(f"{config.run.dir}: this run is finished; set run.overwrite=true to do it again")
        return 0
    for line in preflight.check(config):
        print(f"checked: {line}", flush=True)
    Path(config.run.dir, "logs").mkdir(parents=True, exist_ok=True)
    Path(config.run.dir, "status.json").unlink(missing_ok=True)
    with Signals() as signals:
        try:
            supervise(config, recipe, overrides, make_display(config, plain), signals)
        except Interrupted as e:
            print(f"\nstopped by {e}; the same command resumes from the last checkpoint", flush=True)
    if signals.received:
        return 128 + signals.received
    print(f"wrote {config.run.dir}", flush=True)
    return 0


def supervise(config: Config, recipe: str, overrides: list[str], display: Display, signals: Signals) -> None:
    """Start everything and return when the learner is done; whatever happens, nothing that it started is left."""
    started = servers(config)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    _adopt_orphans()
    processes: list[Process] = []
    try:
        with display:
            for command in started:
                processes.append(_start(config, command, display))
            _wait_healthy(config, processes, display, signals)
            processes.append(_start(config, learner(config, recipe, overrides, started), display))
            _watch(processes, display, signals)
    finally:
        stop_all(processes)
        _sweep(before)
        _adopt_orphans(False)


def _start(config: Config, command: Command, display: Display) -> Process:
    log = Path(config.run.dir, "logs", f"{command.name}.log")
    with open(log, "a") as f:
        f.write(f"{STARTED}{time.strftime('%Y-%m-%d %H:%M:%S')}\n# {command.shell()}\n")
    display.say(f"# {command.name}\n{command.shell()}")
    process = Process(command, log)
    display.processes.append(process)
    return process


def _wait_healthy(config: Config, processes: list[Process], display: Display, signals: Signals) -> None:
    deadline = time.monotonic() + config.launch.health_timeout_s
    waiting = list(processes)
    while waiting:
        signals.check()
        _all_alive(processes)
        for p in list(waiting):
            if _healthy(p.command.url):
                p.state = "healthy"
                waiting.remove(p)
        if waiting and time.monotonic() > deadline:
            names = ", ".join(f"{p.command.name} ({p.log})" for p in waiting)
            raise RunFailed(f"not healthy after launch.health_timeout_s={config.launch.health_timeout_s}: {names}")
        display.refresh()
        time.sleep(POLL_S)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _all_alive(processes: list[Process]) -> None:
    for p in processes:
        if p.code is not None:
            when = "died" if p.state == "healthy" else "ended before it was healthy"
            raise RunFailed(f"the {p.command.name} server {when} (exit code {p.code}): {cause(p.log)}; see {p.log}")


def _watch(processes: list[Process], display: Display, signals: Signals) -> None:
    """Until the learner has done its work. A server that dies first ends the run."""
    *others, trainer = processes
    trainer.state = "running"
    while trainer.code is None:
        signals.check()
        _all_alive(others)
        display.refresh()
        time.sleep(POLL_S)
    display.refresh()
    if trainer.code == 0:
        return
    signals.check()  # a Ctrl-C that reached the learner first is no failure
    status = display.status()
    message = status.get("error") or cause(trainer.log)
    if status.get("user_error"):
        raise UserError(message)
    _all_alive(others)  # a learner that fails because its server is gone should not take the blame
    raise RunFailed(f"the learner ended with exit code {trainer.code}: {message}; see {trainer.log}")


def cause(log: Path) -> str:
    """Why a process ended, from what its log says since its last start: one line, 300 characters at most."""
    text = log.read_text(errors="replace").rpartition(STARTED)[2]
    lines = [re.sub(r"^\(\w+ pid=\d+\) ", "", line.strip()) for line in text.splitlines()[2:] if line.strip()]
    if told := [line for line in lines if line.startswith("opd: error: ")]:
        return told[-1].removeprefix("opd: error: ")[:300]
    if killed := re.search(r"Root Cause.*?rank\s*: (\d+).*?Signal \d+ \((\w+)\)", text, re.DOTALL):
        return f"rank {killed[1]} was killed by {killed[2]}"
    # the last lines of these only say that something before them went wrong
    echoes = ("ChildFailedError", "Engine core initialization failed")
    for i in reversed(range(len(lines))):
        if re.match(r"[\w.]*(Error|Exception)\b|[\w.]+: error:", lines[i]) and not any(e in lines[i] for e in echoes):
            more = lines[i + 1 : i + 3] if "validation error" in lines[i] else []  # pydantic explains below
            return " ".join([lines[i], *more])[:300]
    return (lines or ["its log is empty"])[-1][:300]


def _adopt_orphans(on: bool = True) -> None:
    """Make this process the parent of descendants that lose theirs, so that `_sweep` finds them. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _sweep(before: set[int]) -> None:
    """Kill what outlived the guards: learner ranks sit in sessions of their own, and a guard itself can be killed."""
    deadline = time.monotonic() + SWEEP_S
    while left := [p for p in psutil.Process().children(recursive=True) if p.pid not in before]:
        for p in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.kill()  # psutil checks that the pid has not been reused
        psutil.wait_procs(left, timeout=1)
        if time.monotonic() > deadline:
            print(f"opd: cannot stop processes {[p.pid for p in left]}", file=sys.stderr)
            return
