"""Processes that die with the run: on exit, error, signal, or the launcher's death.

Launcher and guards do the same. Each adopts the descendants that lose their parent, so that it finds all of them, and
ends them when it ends. Run as `python -m opd.processes.guard PARENT_PID -- COMMAND...` it is the guard between the
launcher and a command: it also ends when the launcher is gone, after `kill -9` too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from opd.processes.commands import Command  # a guard starts without what that imports

GRACE_S = 8.0
ORPHANS_S = 1.0  # for what a process that ended by itself left behind
KILL_S = 10.0  # for the system to end what was killed
PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>


class Process:
    """A started command with its log file."""

    def __init__(self, command: Command, log: Path) -> None:
        self.command, self.log, self.started = command, log, time.monotonic()
        self.state = "starting"
        argv = [sys.executable, "-m", "opd.processes.guard", str(os.getpid()), "--", *command.argv]
        env = {**os.environ, **command.env}
        with open(log, "ab") as out:
            self.guard = Popen(argv, env=env, stdin=DEVNULL, stdout=out, stderr=STDOUT, start_new_session=True)

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self.guard.poll()


def run(command: Command, log: Path, timeout_s: float) -> None:
    """A command that ends by itself. Raises ChildProcessError when it fails, or is not done after `timeout_s`."""
    process = Process(command, log)
    try:
        code = process.guard.wait(timeout_s)
    except TimeoutExpired as e:
        raise ChildProcessError(f"{command.name} is not done after {timeout_s:g} s, see {log}") from e
    finally:
        stop_all([process])
    if code:
        raise ChildProcessError(f"{command.name} ended with exit code {code}, see {log}")


def stop_all(processes: list[Process]) -> None:
    """Have the guards stop every process, newest first, and wait until all are gone."""
    for p in reversed(processes):
        p.guard.terminate()
    for p in processes:
        with contextlib.suppress(TimeoutExpired):  # of a guard that hangs
            p.guard.wait(GRACE_S + KILL_S + 5)


@contextlib.contextmanager
def serving(command: Command, log: Path, timeout_s: float) -> Iterator[str]:
    """URL of a server from the moment when it is healthy; stopped at the end. Raises ChildProcessError before that."""
    from opd.inference.client import healthy  # the guard does without

    process = Process(command, log)
    try:
        deadline = time.monotonic() + timeout_s
        while not healthy(command.url):
            if process.code is not None:
                raise ChildProcessError(f"the {command.name} server ended with exit code {process.code}, see {log}")
            if time.monotonic() > deadline:
                raise ChildProcessError(f"the {command.name} server is not healthy after {timeout_s:g} s, see {log}")
            time.sleep(0.2)
        yield command.url
    finally:
        stop_all([process])


@contextlib.contextmanager
def no_orphans() -> Iterator[None]:
    """Whatever is started in the block ends with it: what the guards leave, because one was killed, is killed."""
    before = _descendants()
    _adopt_orphans(True)
    try:
        yield
    finally:
        _end_all(before, 0)
        _adopt_orphans(False)


def _adopt_orphans(on: bool) -> None:
    """Make this process the parent of descendants that lose theirs, so that it can find them. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def _descendants() -> set[psutil.Process]:
    """Live processes below this one, in whatever session or group."""
    return {p for p in psutil.Process().children(recursive=True) if _alive(p)}


def _end_all(but: set[psutil.Process], grace_s: float) -> None:
    """End all descendants `but` some."""
    deadline = time.monotonic() + grace_s
    _send(signal.SIGTERM, _descendants() - but)
    while (left := _descendants() - but) and time.monotonic() < deadline + KILL_S:
        if time.monotonic() >= deadline:
            _send(signal.SIGKILL, left)
        time.sleep(0.05)
    if left:
        print(f"opd: cannot stop processes {sorted(p.pid for p in left)}", file=sys.stderr)


def _send(number: int, processes: set[psutil.Process]) -> None:
    for p in processes:
        with contextlib.suppress(psutil.Error):
            p.send_signal(number)  # psutil checks that the pid has not been reused


def _alive(p: psutil.Process) -> bool:
    try:
        return p.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def guard(parent: int, argv: list[str]) -> int:
    """Run a command; end it and all below it when asked to, when the parent is gone, or when it ends by itself."""
    asked = []
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(s, lambda *_: asked.append(True))
    _adopt_orphans(True)
    child = Popen(argv, start_new_session=True)
    while child.poll() is None and not asked and os.getppid() == parent:
        time.sleep(0.1)
    code = child.returncode
    _end_all(set(), GRACE_S if code is None else ORPHANS_S)
    return 143 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[3:]))
