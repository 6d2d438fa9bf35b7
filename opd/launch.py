"""Brings up servers and learner on this machine, shows how they do, and leaves nothing behind."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from opd import preflight, run_folder
from opd.config import Config, UserError, load_config
from opd.display import Display, make_display
from opd.servers import Command, learner, servers
from opd.supervisor import Process, stop_all

POLL_S = 0.25


class Interrupted(Exception):
    """A signal asked the launcher to stop."""


def launch(recipe: str, overrides: list[str], dry_run: bool = False, plain: bool = False) -> int:
    """Run a recipe: servers, health, learner. Returns the learner's exit code; UserError before anything starts."""
    config = load_config(recipe, overrides)
    if dry_run:
        started = servers(config)
        for command in [*started, learner(config, recipe, overrides, started)]:
            print(f"# {command.name}\n{command.shell()}\n")
        return 0
    if run_folder.check(config) == "finished":
        print(f"{config.run.dir}: this run is finished; set run.overwrite=true to do it again")
        return 0
    for line in preflight.check(config):
        print(f"checked: {line}", flush=True)
    started = servers(config)
    logs = Path(config.run.dir, "logs")
    logs.mkdir(parents=True, exist_ok=True)
    Path(config.run.dir, "status.json").unlink(missing_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    processes: list[Process] = []
    display = make_display(config, plain)
    try:
        with display:
            for command in started:
                processes.append(_start(command, logs, display))
            _wait_healthy(config, processes, display)
            processes.append(_start(learner(config, recipe, overrides, started), logs, display))
            code = _watch(processes, display)
    except Interrupted as e:
        print(f"\nstopped by {e}; the same command resumes from the last checkpoint", flush=True)
        code = 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them running
        stop_all(processes)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    if code == 0:
        print(f"wrote {config.run.dir}", flush=True)
    return code


def _start(command: Command, logs: Path, display: Display) -> Process:
    display.say(f"# {command.name}\n{command.shell()}")
    process = Process(command, logs / f"{command.name}.log")
    display.processes.append(process)
    return process


def _wait_healthy(config: Config, processes: list[Process], display: Display) -> None:
    deadline = time.monotonic() + config.launch.health_timeout_s
    waiting = list(processes)
    while waiting:
        for p in list(waiting):
            if p.code is not None:
                raise RuntimeError(
                    f"the {p.command.name} server ended before it was healthy: {p.last_error()}; see {p.log}"
                )
            if _healthy(p.command.url):
                p.state = "healthy"
                waiting.remove(p)
        if time.monotonic() > deadline:
            names = ", ".join(f"{p.command.name} ({p.log})" for p in waiting)
            raise RuntimeError(f"not healthy after launch.health_timeout_s={config.launch.health_timeout_s}: {names}")
        display.refresh()
        time.sleep(POLL_S)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _watch(processes: list[Process], display: Display) -> int:
    """Until the learner ends: its exit code. A server that dies first ends the run."""
    *others, trainer = processes
    trainer.state = "running"
    while trainer.code is None:
        for p in others:
            if p.code is not None:
                raise RuntimeError(f"the {p.command.name} server died (exit {p.code}): {p.last_error()}; see {p.log}")
        display.refresh()
        time.sleep(POLL_S)
    display.refresh()
    status = display.status()
    if trainer.code != 0:
        message = status.get("error") or trainer.last_error()
        if "opd: error:" in message:
            message = message.split("opd: error:", 1)[1].strip()
        if status.get("user_error"):
            raise UserError(message)
        raise RuntimeError(f"the learner ended with exit code {trainer.code}: {message}; see {trainer.log}")
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(signal.Signals(number).name)


def main(recipe: str, overrides: list[str], dry_run: bool, plain: bool) -> int:
    """`opd launch`: errors of the run as one line."""
    try:
        return launch(recipe, overrides, dry_run, plain)
    except RuntimeError as e:
        print(f"opd: error: {e}", file=sys.stderr)
        return 1
