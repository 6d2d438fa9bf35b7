"""Sees one node's part of a run through: servers, then learner ranks; however it ends, nothing is left behind."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Self

from opd.config.schema import Config
from opd.inference.client import healthy
from opd.processes.cluster import PROCESS, Alone, End
from opd.processes.commands import Command
from opd.processes.display import Display, LiveDisplay
from opd.processes.guard import Process, no_orphans, stop_all
from opd.settings import RunFailed, UserError
from opd.storage.run_folder import status_of

POLL_S = 0.25
STARTED = "=== opd starts: "  # a log file keeps what earlier starts wrote
# A vLLM process's name and its logger's head; lines that only say that something before them went wrong.
HEAD = re.compile(r"^(\(\w+ pid=\d+\) )?(ERROR \S+ \S+ \[\S+\] )?")
ERROR = re.compile(r"[\w.]*(Error|Exception|error)(:|$)|[\w.]+: error: ")
ECHO = re.compile("ChildFailedError|EngineDeadError|Engine core initialization failed")
# Of torch's elastic agent, and of DeepSpeed's launcher.
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+).*?Signal \d+ \((\w+)\)", re.DOTALL)
RETURN_CODE = re.compile(r"exits with return code = -(\d+)")
# What C++, glibc, OpenMP and Python's runtime say before they abort a process.
LAST_WORDS = re.compile(
    r"^.*(?:terminate called|what\(\): |Fatal Python error|OMP: Error|Assertion .* failed|double free|free\(\): |"
    r"malloc\(\): |corrupted ).*$",
    re.MULTILINE,
)
Parts = Callable[[], tuple[list[Command], Command | None]]  # checks, then this node's servers and learner


class Stop(Exception):
    """The run ends, before its learner is done or because another node says so."""

    def __init__(self, end: End, everywhere: bool = False) -> None:
        super().__init__(end.message)
        self.end, self.everywhere = end, everywhere


def failure(message: str) -> Stop:
    """A process of this node ended badly."""
    return Stop(End(1, message, PROCESS))


class Signals(ExitStack):
    """Notes a signal for the loops to look at: an exception in mid-start could lose sight of a new process."""

    received: signal.Signals | None = None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def check(self) -> None:
        """Raises Stop once a signal has come."""
        if self.received:
            raise Stop(End(128 + self.received, f"stopped by {self.received.name}", PROCESS))


class Watch:
    """What runs on this node, and what the other nodes say."""

    def __init__(self, config: Config, cluster: Alone, signals: Signals, display: Display) -> None:
        self.config, self.cluster, self.signals, self.display = config, cluster, signals, display
        self.servers: list[Process] = []
        self.learner: Process | None = None

    def start(self, command: Command) -> Process:
        """Start a process with a log file of its own."""
        log = Path(self.config.run.dir, "logs", f"{command.name}.log")
        with open(log, "a") as f:
            f.write(f"{command.shell()}\n{STARTED}{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self.display.say(f"# {command.name}\n{command.shell()}")
        process = Process(command, log)
        self.display.processes.append(process)
        return process

    def look(self) -> None:
        """Raises Stop when a signal came, a server died, or another node ended the run."""
        self.signals.check()
        for p in self.servers:
            if p.code is not None:
                when = "died" if p.state == "healthy" else "ended before it was healthy"
                told = f"(exit code {p.code}): {cause(p.log, p.code)}; see {p.log}"
                raise failure(f"the {p.command.name} server {when} {told}")
        if (end := self.cluster.outcome()) is not None:
            raise Stop(end, everywhere=True)

    def wait_healthy(self, remote: list[str]) -> None:
        """Until this node's servers and those at the URLs `remote` are up."""
        limit = self.config.launch.health_timeout_s
        deadline = time.monotonic() + limit
        waiting: dict[str, Process | None] = {**{p.command.url: p for p in self.servers}, **dict.fromkeys(remote)}
        while waiting:
            self.look()
            for url in filter(healthy, list(waiting)):
                if p := waiting.pop(url):
                    p.state = "healthy"
            if waiting and time.monotonic() > deadline:
                names = ", ".join(f"{p.command.name} ({p.log})" if p else url for url, p in waiting.items())
                raise failure(f"not healthy after launch.health_timeout_s={limit}: {names}")
            self.display.refresh()
            time.sleep(POLL_S)

    def wait_learner(self) -> None:
        """Until this node's learner ranks have done their work; for ever where there are none."""
        if self.learner is not None:
            self.learner.state = "running"
        while self.learner is None or self.learner.code is None:
            self.look()
            self.display.refresh()
            time.sleep(POLL_S)
        self.display.refresh()
        if self.learner.code != 0:
            self.look()  # a learner that fails because its server is gone must not take the blame
            raise Stop(self._learner_end(self.learner))

    def _learner_end(self, learner: Process) -> End:
        head = f"the {learner.command.name.partition('-')[0]} ended with exit code {learner.code}: "
        if gone := killed(learner.log):
            return End(1, f"{head}{gone}; see {learner.log}", PROCESS)
        status = status_of(self.display.folder)
        message = status.get("error") or cause(learner.log, learner.code or 0)
        if status.get("user_error"):
            return End(2, message, PROCESS, user_error=True)
        if silent := [p for p in self.servers if not healthy(p.command.url)]:
            message += "; no longer healthy: " + ", ".join(f"the {p.command.name} server (see {p.log})" for p in silent)
        return End(1, f"{head}{message}; see {learner.log}")


def supervise(config: Config, parts: Parts, cluster: Alone, plain: bool, remote: list[str]) -> End:
    """Join the other nodes, check, start this node's servers and learner, and see them through.

    `remote`: URLs of other nodes' servers; `plain`: no live display on a terminal. Returns how the run ended, the same
    on all nodes. Whatever happens, nothing that was started here is left.
    """
    watch: Watch | None = None
    with Signals() as signals, no_orphans():
        try:
            cluster.join(_patience(config, signals))
            started, trainer = parts()
            Path(config.run.dir, "logs").mkdir(parents=True, exist_ok=True)
            with (Display if plain or not sys.stdout.isatty() else LiveDisplay)(config) as display:
                watch = Watch(config, cluster, signals, display)
                for command in started:
                    watch.servers.append(watch.start(command))
                watch.wait_healthy(remote)
                watch.learner = watch.start(trainer) if trainer else None
                watch.wait_learner()
                return cluster.finished(watch.look)
        except Stop as e:
            return e.end if e.everywhere else cluster.ended(e.end)
        except UserError as e:
            return cluster.ended(End(2, str(e), PROCESS, user_error=True))
        except BaseException as e:
            cluster.ended(End(1, f"{type(e).__name__}: {e}", PROCESS))
            raise
        finally:
            stop_all(watch.display.processes if watch else [])


def _patience(config: Config, signals: Signals) -> Callable[[], None]:
    limit = config.launch.health_timeout_s
    deadline = time.monotonic() + limit

    def check() -> None:
        signals.check()
        if time.monotonic() > deadline:
            raise failure(f"launch.health_timeout_s={limit}: the launchers of all nodes have not come")

    return check


def conclude(end: End, after_signal: str) -> int:
    """0, or 128 + number when a signal ended the run, after a line. Raises UserError or RunFailed for another end."""
    if end.code and end.code < 128:
        raise UserError(end.message) if end.user_error else RunFailed(end.message)
    if end.code:
        print(f"\n{end.message}{after_signal}", flush=True)
    return end.code


def killed(log: Path) -> str | None:
    """Which learner rank was killed by which signal, from the launcher's log since its last start; None if none was.

    With what the aborted process said last, in 300 characters at most.
    """
    text = log.read_text(errors="replace").rpartition(STARTED)[2]
    if found := ROOT_CAUSE.search(text):
        who, by = f"rank {found[1]}", found[2]
    elif found := RETURN_CODE.search(text):
        who, by = "a rank", signal.Signals(int(found[1])).name
    else:
        return None
    said = "; ".join(line.strip() for line in LAST_WORDS.findall(text)[-2:])
    return f"{who} was killed by {by}{': ' if said else ''}{said}"[:300]


def cause(log: Path, code: int) -> str:
    """Why a process ended, from its exit code and its log since its last start: one line of 300 characters at most."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "it was killed by SIGKILL; was memory short?"
    text = log.read_text(errors="replace").rpartition(STARTED)[2]
    lines = [HEAD.sub("", line).strip() for line in text.splitlines()[1:] if line.strip()]
    if told := [line for line in lines if line.startswith("opd: error: ")]:
        return told[-1].removeprefix("opd: error: ")[:300]
    if gone := killed(log):
        return gone
    errors = [i for i, line in enumerate(lines) if ERROR.match(line)]
    if not errors:
        return (lines or ["its log is empty"])[-1][:300]
    i = next((i for i in reversed(errors) if not ECHO.search(lines[i])), errors[-1])
    more = lines[i + 1 : i + 3] if "validation error" in lines[i] else []  # pydantic explains itself below
    return " ".join([lines[i], *more])[:300]
