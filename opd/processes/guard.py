"""Processes that die with the run: each in its own group, stopped on exit, error, signal, or the launcher's death.

Run as `python -m opd.processes.guard PARENT_PID -- COMMAND...` it is the guard between the launcher and a command: it
stops the command's whole group when the launcher is gone, also after `kill -9`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from opd.processes.commands import Command

GRACE_S = 8.0
ORPHANS_S = 1.0  # for what a process that ended by itself left behind
PR_SET_CHILD_SUBREAPER = 36  # from <linux/prctl.h>


class Process:
    """A started command with its log file."""

    def __init__(self, command: Command, log: Path) -> None:
        self.command, self.log, self.started = command, log, time.monotonic()
        self.state = "starting"
        with open(log, "ab") as out:
            self.guard = subprocess.Popen(
                [sys.executable, "-m", "opd.processes.guard", str(os.getpid()), "--", *command.argv],
                env={**os.environ, **command.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self.guard.poll()

    def stop(self) -> None:
        """Ask the guard to stop the group; it escalates by itself."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self.guard.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Return when nothing of it is left."""
        try:
            self.guard.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.guard.pid, signal.SIGKILL)
            self.guard.wait()

    def last_error(self) -> str:
        """The last line of the log that names an error, or its last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line or "error:" in line]
        return (named or lines or ["(empty log)"])[-1][:300]


def stop_all(processes: list[Process]) -> None:
    """Stop every process, newest first, and wait until all are gone."""
    for p in reversed(processes):
        p.stop()
    for p in reversed(processes):
        p.wait()


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


def adopt_orphans(on: bool) -> None:
    """Make this process the parent of descendants that lose theirs, so that it can find them. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def guard(parent: int, argv: list[str]) -> int:
    """Run a command and stop its whole group when asked to, when it ends, or when the parent is gone."""
    asked = []
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(s, lambda *_: asked.append(True))
    adopt_orphans(True)
    child = subprocess.Popen(argv, start_new_session=True)
    while child.poll() is None and not asked and os.getppid() == parent:
        time.sleep(0.1)
    descendants = _descendants()
    stopped = child.poll() is None
    _signal(child.pid, descendants, signal.SIGTERM)
    deadline = time.monotonic() + (GRACE_S if stopped else ORPHANS_S)
    while time.monotonic() < deadline and (child.poll() is None or any(map(_alive, descendants))):
        time.sleep(0.05)
    _signal(child.pid, descendants | _descendants(), signal.SIGKILL)
    code = child.wait()
    return 143 if stopped else code if code >= 0 else 128 - code


def _signal(group: int, pids: set[int], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
    for pid in pids:  # vLLM and accelerate put some of theirs into sessions of their own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _descendants() -> set[int]:
    import psutil

    return {p.pid for p in psutil.Process().children(recursive=True)}


def _alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[3:]))
