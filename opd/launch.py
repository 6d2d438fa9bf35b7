"""Brings up servers and learner on this machine, shows how they do, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

import psutil

from opd import preflight, run_folder
from opd.config import Config, UserError, load_config, resolve_model
from opd.display import Display, make_display
from opd.http import healthy
from opd.layout import layout
from opd.metrics import MetricsLog, read_lines
from opd.placement import placement_of
from opd.report import write_report
from opd.servers import Command, learner, servers
from opd.supervisor import Process, adopt_orphans, stop_all, sweep

POLL_S = 0.25
SWEEP_S = 10.0
STARTED = "=== opd starts: "  # a log file keeps what earlier starts wrote


class RunFailed(RuntimeError):
    """A server or the learner ended badly: the message names it, the cause and the log."""


class Interrupted(Exception):
    """A signal asked the launcher to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.code = 128 + number


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
            raise Interrupted(self.received)


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
    began = time.time()
    config = load_config(recipe, overrides)
    if dry_run:
        show(config, recipe, overrides)
        return 0
    if preflight.finished(config):
        print(f"{config.run.dir}: this run is finished; set run.overwrite=true to do it again")
        return 0
    for line in preflight.check(config):
        print(f"checked: {line}", flush=True)
    with run_folder.lock(Path(config.run.dir)):
        where = layout(config)
        trainer = learner(config, recipe, overrides, where, 0)
        assert trainer is not None
        try:
            code = supervise(config, servers(config, where, 0), lambda: trainer, plain)
        finally:
            sweep(config.rollout.transfer_dir)
            run_folder.add_launch(Path(config.run.dir), began)
    if code == 0:
        print(f"wrote {config.run.dir}", flush=True)
        for path in write_report([Path(config.run.dir)], Path(config.run.dir)):
            print(f"wrote {path}", flush=True)
    return code


def show(config: Config, recipe: str, overrides: list[str]) -> None:
    """Print what a launch would start, node by node."""
    nodes = placement_of(config).nodes
    config.launch.hosts = config.launch.hosts or ([f"node{n}" for n in range(nodes)] if nodes > 1 else [])
    where = layout(config)
    for node, host in enumerate(where.hosts):
        if nodes > 1:
            print(f"## node {node}, {host}\n")
        trainer = learner(config, recipe, overrides, where, node)
        for command in [*servers(config, where, node, _expected_model), *([trainer] if trainer else [])]:
            print(f"# {command.name}\n{command.shell()}\n")


def _expected_model(path: str, key: str) -> str:
    """`resolve_model` for a dry run, which may come before the run whose checkpoint it starts from."""
    try:
        return resolve_model(path, key)
    except UserError as e:
        if not path.startswith("runs/") and not Path(path, "config.yaml").is_file():
            raise
        print(f"# not there yet: {e}\n")
        return f"{path}/checkpoints/step_N/model"


def supervise(config: Config, started: list[Command], trainer: Callable[[], Command], plain: bool) -> int:
    """Start the servers, then the learner (its command is made when they are up), and see them through.

    Returns and raises as `launch` does. Whatever happens, nothing that it started is left.
    """
    Path(config.run.dir, "logs").mkdir(parents=True, exist_ok=True)
    Path(config.run.dir, "status.json").unlink(missing_ok=True)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    display = make_display(config, plain)
    processes: list[Process] = []
    code = 0
    with Signals() as signals:
        adopt_orphans(True)
        try:
            with display:
                for command in started:
                    processes.append(_start(config, command, display))
                _wait_healthy(config, processes, display, signals)
                processes.append(_start(config, trainer(), display))
                _watch(processes, display, signals)
        except Interrupted as e:
            code = e.code
            print(f"\nstopped by {e}; the same command resumes from the last checkpoint", flush=True)
        finally:
            stop_all(processes)
            _sweep(before)
            adopt_orphans(False)
    if code:
        _mark_interrupted(config)
    return code


def _mark_interrupted(config: Config) -> None:
    """The learner may have taken the servers' end for a failure before its own came."""
    folder = Path(config.run.dir)
    steps = list(read_lines(folder / "metrics.jsonl"))
    log = MetricsLog(folder, [], "", config.run.stage)
    log.status("interrupted", "", steps[-1]["step"] if steps else 0, config.train.steps)


def _start(config: Config, command: Command, display: Display) -> Process:
    log = Path(config.run.dir, "logs", f"{command.name}.log")
    with open(log, "a") as f:
        f.write(f"{command.shell()}\n{STARTED}{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
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
            if healthy(p.command.url):
                p.state = "healthy"
                waiting.remove(p)
        if waiting and time.monotonic() > deadline:
            names = ", ".join(f"{p.command.name} ({p.log})" for p in waiting)
            raise RunFailed(f"not healthy after launch.health_timeout_s={config.launch.health_timeout_s}: {names}")
        display.refresh()
        time.sleep(POLL_S)


def _all_alive(processes: list[Process]) -> None:
    for p in processes:
        if p.code is not None:
            when = "died" if p.state == "healthy" else "ended before it was healthy"
            raise RunFailed(
                f"the {p.command.name} server {when} (exit code {p.code}): {cause(p.log, p.code)}; see {p.log}"
            )


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
    _all_alive(others)  # a learner that fails because its server is gone must not take the blame
    status = display.status()
    message = status.get("error") or cause(trainer.log, trainer.code)
    if status.get("user_error"):
        raise UserError(message)
    if silent := [p for p in others if not healthy(p.command.url)]:
        message += "; no longer healthy: " + ", ".join(f"the {p.command.name} server (see {p.log})" for p in silent)
    raise RunFailed(f"the learner ended with exit code {trainer.code}: {message}; see {trainer.log}")


# A vLLM process's name and its logger's head; lines that only say that something before them went wrong.
HEAD = re.compile(r"^(\(\w+ pid=\d+\) )?(ERROR \S+ \S+ \[\S+\] )?")
ERROR = re.compile(r"[\w.]*(Error|Exception|error)(:|$)|[\w.]+: error: ")
ECHO = re.compile("ChildFailedError|EngineDeadError|Engine core initialization failed")
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+).*?Signal \d+ \((\w+)\)", re.DOTALL)  # of torch's elastic agent


def cause(log: Path, code: int) -> str:
    """Why a process ended, from its exit code and its log since its last start: one line of 300 characters at most."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "it was killed by SIGKILL; was memory short?"
    text = log.read_text(errors="replace").rpartition(STARTED)[2]
    lines = [HEAD.sub("", line).strip() for line in text.splitlines()[1:] if line.strip()]
    if told := [line for line in lines if line.startswith("opd: error: ")]:
        return told[-1].removeprefix("opd: error: ")[:300]
    if killed := ROOT_CAUSE.search(text):
        return f"rank {killed[1]} was killed by {killed[2]}"
    errors = [i for i, line in enumerate(lines) if ERROR.match(line)]
    if not errors:
        return (lines or ["its log is empty"])[-1][:300]
    i = next((i for i in reversed(errors) if not ECHO.search(lines[i])), errors[-1])
    more = lines[i + 1 : i + 3] if "validation error" in lines[i] else []  # pydantic explains itself below
    return " ".join([lines[i], *more])[:300]


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
