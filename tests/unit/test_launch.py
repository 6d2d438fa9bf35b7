"""The launcher: the commands it makes, what it shows, and that no process of a run outlives it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from opd.config.load import load_config
from opd.config.schema import Config
from opd.processes.display import Display, LiveDisplay, describe_evaluation, describe_step
from opd.processes.supervise import STARTED, cause
from opd.settings import UserError
from opd.storage import run_folder

pytestmark = pytest.mark.processes

RECIPE = """
run: {{dir: {dir}/run, seed: 5}}
student: {{path: {dir}/student, dtype: float32}}
teacher: {{path: {dir}/teacher}}
data: {{train: {dir}/train.jsonl}}
rollout: {{max_tokens: 32, server: {{max_model_len: 64, max_num_seqs: 8, kv_cache_gib: 2, threads: 3,
  args: [--swap-space, "0"]}}}}
launch: {{processes: 2, health_timeout_s: 60}}
train: {{steps: 30, prompts_per_step: 4}}
"""
STEP = {"step": 2, "steps": 30, "loss": 0.5, "length/mean": 7.25, "samples_per_s": 9.6, "seconds": 10.0}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2_audio"}')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(dir=tmp_path))
    return path


@pytest.fixture
def config(recipe: Path) -> Config:
    return load_config(recipe)


# What is shown


def test_lines_of_steps_and_evaluations() -> None:
    step = STEP | {"reverse_kl/speech": 1.25, "reverse_kl/text": None}
    shown = "step 2/30, loss 0.500, reverse KL speech 1.250, reverse KL text n/a, length 7.2, 10 samples/s, ETA 2:20"
    assert describe_step(step) == shown
    assert describe_step(STEP | {"loss": None, "seconds": 1000.0}).endswith("ETA 3:53:20")
    found = {"stage": "base", "accuracy/speech": {"mean": 0.5, "stderr": 0.1, "n": 9}}
    found["retention"] = {"mean": None, "stderr": None, "n": 0}
    assert describe_evaluation(found) == "evaluation base: accuracy/speech 0.500 ± 0.100, retention n/a ± n/a"


def test_plain_display_shows_each_thing_once(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(config.run.dir)
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(STEP | {"step": 30}) + "\n")  # of an earlier run
    (run / "eval.jsonl").write_text('{"stage": "base"}\n')
    display = Display(config)
    display.refresh()
    assert capsys.readouterr().out == "", "an earlier run's numbers are not this one's"
    (run / "metrics.jsonl").write_text(json.dumps(STEP | {"step": 1}) + "\n" + json.dumps(STEP)[:40])
    (run / "status.json").write_text('{"phase": "training", "detail": ""}')
    display.refresh()
    assert capsys.readouterr().out.splitlines()[0] == "phase: training"
    with open(run / "eval.jsonl", "a") as f:
        f.write('{"stage": "xopd", ')
        f.flush()
        display.refresh()
        assert capsys.readouterr().out == "", "half a line is no evaluation"
        f.write(
            '"misalignment": {"mean": 0.25, "stderr": null}, "warnings": [{"name": "retention", "text": "fell"}]}\n'
        )
    for _ in range(2):
        display.refresh()
    assert capsys.readouterr().out == "evaluation xopd: misalignment 0.250 ± n/a\nwarning: fell\n"


def test_newest_step_of_a_long_file(config: Config) -> None:
    run = Path(config.run.dir)
    run.mkdir()
    (run / "status.json").write_text('{"phase": "training"}')
    (run / "metrics.jsonl").write_text("".join(json.dumps(STEP | {"step": i}) + "\n" for i in range(2000)))
    display = Display(config)
    assert (display.newest() or {})["step"] == 1999
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 2000, "lo')
    assert (display.newest() or {})["step"] == 1999


def test_live_display_shows_the_step(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(config.run.dir)
    run.mkdir()
    (run / "status.json").write_text('{"phase": "training", "detail": "", "warnings": ["retention fell"]}')
    (run / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    with LiveDisplay(config) as display:
        display.refresh()
    phase, warning, _, step = capsys.readouterr().out.rstrip().splitlines()[-4:]
    assert (phase.strip(), warning.strip()) == ("training", "warning: retention fell")
    assert step.strip() == describe_step(STEP)


VLLM = "(EngineCore pid=7) ERROR 11-21 03:52:41 [core.py:54] "


@pytest.mark.parametrize(
    ("lines", "code", "expected"),
    [
        (["Traceback", "OSError: [Errno 98] Address already in use", "bye"], 1, "OSError: [Errno 98] Address already"),
        (["x", "opd: error: no such file", "torch.ChildFailedError:"], 1, "no such file"),
        ([f"{VLLM}ValueError: no room", "RuntimeError: Engine core initialization failed."], 1, "ValueError: no room"),
        (["pydantic.ValidationError: 1 validation error for M", "  too long"], 1, "1 validation error for M too long"),
        (["api_server.py: error: unrecognized arguments: --x"], 2, "unrecognized arguments: --x"),
        (["all was well"], 137, "killed by SIGKILL"),
        (["all was well"], 1, "all was well"),
        (
            ["Root Cause (first):", " rank : 1 (local)", "traceback : Signal 9 (SIGKILL) received"],
            1,
            "rank 1 was killed",
        ),
        (
            [
                "terminate called after throwing an instance of 'gloo::IoException'",
                "  what():  Connection closed by peer",
                "Root Cause (first):",
                " rank : 0 (local)",
                "traceback : Signal 6 (SIGABRT) received",
            ],
            1,
            "rank 0 was killed by SIGABRT: terminate called after throwing an instance of 'gloo::IoException'; "
            "what():  Connection closed by peer",
        ),
        ([], 1, "its log is empty"),
    ],
)
def test_cause(tmp_path: Path, lines: list[str], code: int, expected: str) -> None:
    log = tmp_path / "x.log"
    earlier = f"command\n{STARTED}yesterday\nValueError: of an earlier start\ncommand\n"
    log.write_text("\n".join([f"{earlier}{STARTED}today", *lines]))
    assert expected in cause(log, code)


# Processes. The trees are those of the real ones: torch's elastic agent puts each rank into a session of its own.

CHILDREN = """
import os, signal, subprocess, sys, time
leaf = "import signal, time; signal.signal(signal.SIGTERM, signal.{term}); time.sleep(240)"
subprocess.Popen([sys.executable, "-c", leaf])
subprocess.Popen([sys.executable, "-c", leaf], start_new_session=True)
"""
SERVER = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
WORKS = "open(sys.argv[1], 'w').close(); time.sleep({seconds}); sys.exit({code})"
LAUNCHER = """
import sys
from pathlib import Path
from opd.processes.cluster import Alone
from opd.config.load import load_config
from opd.processes.layout import free_port
from opd.processes.commands import Command
from opd.processes.supervise import supervise
recipe, server, learner, ready = sys.argv[1:]
port = free_port()
student = Command("student", [sys.executable, "-c", server, str(port)], {}, f"http://127.0.0.1:{port}")
trainer = Command("learner", [sys.executable, "-c", learner, ready], {})
end = supervise(load_config(recipe), lambda: ([student], trainer), Alone(), True, [])
if end.code:
    print(end.message, file=sys.stderr)
sys.exit(end.code)
"""


class Run:
    """A launcher with a dummy server and a dummy learner, and every process below it."""

    def __init__(self, recipe: Path, server: str = SERVER, seconds: float = 200, code: int = 0, term: str = "SIG_DFL"):
        children, ready = CHILDREN.format(term=term), recipe.with_name("ready")
        learner = children + WORKS.format(seconds=seconds, code=code)
        command = [sys.executable, "-c", LAUNCHER, str(recipe), children + server, learner, str(ready)]
        self.launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started: list[psutil.Process] = []
        self.folder = recipe.parent / "run"
        deadline = time.monotonic() + 90
        while self.launcher.poll() is None and not ready.exists() and time.monotonic() < deadline:
            self._look()
            time.sleep(0.02)
        self._look()

    def _look(self) -> None:
        try:
            found = psutil.Process(self.launcher.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self.started += [p for p in found if p not in self.started]

    def one(self, guard: bool, argument: str) -> psutil.Process:
        """The learner or the server itself, or the guard before it."""
        (found,) = (
            p
            for p in self.left()
            if any(argument in a for a in p.cmdline()) and guard == ("opd.processes.guard" in p.cmdline())
        )
        return found

    def left(self) -> list[psutil.Process]:
        return [p for p in self.started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def end(self) -> tuple[int, str]:
        """The launcher's exit code and last line on stderr."""
        _, err = self.launcher.communicate(timeout=90)
        return self.launcher.returncode, (err.strip().splitlines() or [""])[-1]

    def clean(self) -> None:
        for p in [*self.left(), self.launcher]:
            p.kill()
        self.launcher.communicate()


@pytest.fixture
def run(recipe: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run; whatever a failed test leaves is killed."""
    made: list[Run] = []

    def start(**more: Any) -> Run:
        made.append(Run(recipe, **more))
        return made[-1]

    yield start
    for r in made:
        r.clean()


def test_a_run_that_ends_well_leaves_nothing(run: Callable[..., Run]) -> None:
    r = run(seconds=0.5)
    assert r.end() == (0, "")
    assert len(r.started) >= 8 and not r.left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(run: Callable[..., Run], number: signal.Signals) -> None:
    r = run()
    r.launcher.send_signal(number)
    assert r.end() == (128 + number, f"stopped by {number.name}") and not r.left()


def test_a_stubborn_process_is_killed(run: Callable[..., Run]) -> None:
    r = run(term="SIG_IGN")
    for _ in range(3):
        r.launcher.send_signal(signal.SIGINT)  # impatience must not leave half of them running
        time.sleep(0.3)
    assert r.end() == (130, "stopped by SIGINT") and not r.left()


@pytest.mark.parametrize(("victim", "guard"), [("HTTPServer", False), ("HTTPServer", True)])
def test_a_server_that_dies_ends_the_run(run: Callable[..., Run], victim: str, guard: bool) -> None:
    r = run()
    r.one(guard, victim).kill()
    code, message = r.end()
    assert code == 1 and message.startswith("the student server died (exit code") and "student.log" in message
    assert "killed by SIGKILL" in message and not r.left()


@pytest.mark.parametrize("guard", [False, True])
def test_a_learner_that_is_killed_ends_the_run(run: Callable[..., Run], guard: bool) -> None:
    r = run()
    r.one(guard, "sys.exit(0)").kill()
    code, message = r.end()
    assert code == 1 and message.startswith("the learner ended with exit code") and "learner.log" in message
    assert "killed by SIGKILL" in message and not r.left()


@pytest.mark.parametrize("term", ["SIG_DFL", "SIG_IGN"])
def test_nothing_outlives_a_killed_launcher(run: Callable[..., Run], term: str) -> None:
    r = run(term=term)
    r.launcher.kill()
    deadline = time.monotonic() + 60
    while r.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(r.started) >= 8 and not r.left()


def test_a_server_that_does_not_start_names_its_log(run: Callable[..., Run]) -> None:
    r = run(server="sys.exit('OSError: address in use')")
    code, message = r.end()
    assert code == 1 and not r.left()
    assert "student server ended before it was healthy (exit code 1): OSError: address in use; see" in message
    assert message.endswith("run/logs/student.log")


def test_a_server_that_never_answers_is_given_up(run: Callable[..., Run], recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("health_timeout_s: 60", "health_timeout_s: 1"))
    r = run(server="time.sleep(200)")
    code, message = r.end()
    assert code == 1 and "not healthy after launch.health_timeout_s=1: student" in message and not r.left()


def test_a_learner_that_fails(run: Callable[..., Run]) -> None:
    code, message = run(seconds=0.1, code=1).end()
    assert code == 1 and message.startswith("the learner ended with exit code 1: its log is empty; see ")


def test_a_mistake_that_the_learner_found_exits_2(run: Callable[..., Run], tmp_path: Path) -> None:
    r = run(seconds=1, code=2)
    status = {"phase": "failed", "error": "data.train: no such file", "user_error": True}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    assert r.end() == (2, "data.train: no such file") and not r.left()


def test_a_run_folder_has_one_launcher(tmp_path: Path) -> None:
    def take() -> None:
        with run_folder.lock(tmp_path / "run"):
            pass

    with run_folder.lock(tmp_path / "run"), pytest.raises(UserError, match="another `opd launch` is at work"):
        take()
    take()  # free again
