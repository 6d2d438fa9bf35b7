"""Two hosts: network namespaces joined by a pair of virtual cards, a learner rank on each, the server on one.

One run goes through it all: DeepSpeed's launcher, a pulled cable, accelerate's launcher, a dead server, a dead rank,
the end. Each time every process of both hosts ends with one message, and the next start resumes. Only the start whose
server dies has one of its own: the others ask one that runs on the first host all the while.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from live import ROOT, STUDENT, config_of, recipe

from opd.inference.host import free_port
from opd.processes.commands import student_server
from opd.processes.guard import Process, stop_all
from opd.processes.layout import Place

HOSTS = ["10.77.0.1", "10.77.0.2"]
PLACEMENT = "{nodes: 2, rollout: [{node: 0}], learner: [{node: 0}, {node: 1}]}"
STEPS = 12  # more than are done before the last start
LOST_S = 5


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces that reach each other at HOSTS."""
    names = [f"opd{os.getpid()}-{i}" for i in range(2)]
    cards = [f"opd{os.getpid()}v{i}" for i in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("two hosts need network namespaces: there is no `ip` command (package iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for name, card, host in zip(names, cards, HOSTS, strict=True):
            ip("link", "set", card, "netns", name)
            ip("-n", name, "link", "set", card, "name", "eth0")
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    except subprocess.CalledProcessError as e:
        pytest.skip(f"two hosts need network namespaces, which are not allowed here: {e.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def url(namespaces: list[str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A student server on the first host, which outlives the launches that ask it."""
    folder = tmp_path_factory.mktemp("server")
    place = Place("student", "student", 0, HOSTS[0], free_port(), neighbours=2)  # one beside it, at times
    command = student_server(config_of("2_xopd", data, folder, f"student.path={STUDENT}"), place)
    process = Process(replace(command, argv=["ip", "netns", "exec", namespaces[0], *command.argv]), folder / "log")
    yield command.url
    stop_all([process])


class Hosts:
    """The launchers of a run, one on each host."""

    def __init__(self, namespaces: list[str], data: Path, folder: Path, url: str) -> None:
        self.namespaces, self.run, self.url = namespaces, folder / "run", url
        (folder / "two.yaml").write_text(PLACEMENT)
        path, overrides = recipe("2_xopd", data, self.run, f"student.path={STUDENT}", f"train.steps={STEPS}")
        overrides += [f"launch.placement={folder}/two.yaml", f"launch.hosts=[{','.join(HOSTS)}]"]
        overrides += [f"launch.lost_after_s={LOST_S}", "train.timeout_s=60"]
        self.command = [sys.executable, "-m", "opd.cli", "launch", path, *overrides, "--plain"]
        self.launchers: list[subprocess.Popen[str]] = []

    def start(self, launcher: str, own_server: bool = False) -> None:
        more = [f"launch.launcher={launcher}", *([] if own_server else [f'rollout.urls=["{self.url}"]'])]
        self.launchers = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *self.command, *more],
                env={**os.environ, "OPD_NODE": str(node)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for node, name in enumerate(self.namespaces)
        ]

    def step(self) -> int:
        """The newest step in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_steps(self, more: int) -> None:
        """Until so many more steps are done."""
        wanted, deadline = self.step() + more, time.monotonic() + 240
        while self.step() < wanted:
            assert time.monotonic() < deadline, "no progress"
            assert [p.poll() for p in self.launchers] == [None, None], self.end()
            time.sleep(0.05)

    def below(self) -> list[psutil.Process]:
        return [p for launcher in self.launchers for p in psutil.Process(launcher.pid).children(recursive=True)]

    def kill(self, node: int, *words: str) -> None:
        """Kill a process of a host by what its command line holds."""
        for p in psutil.Process(self.launchers[node].pid).children(recursive=True):
            line = p.cmdline()
            if "opd.processes.guard" not in line and all(any(w in a for a in line) for w in words):
                found = p  # the last: the launchers of ranks have the ranks' words in theirs
        found.kill()

    def end(self) -> list[tuple[int, str]]:
        """Exit code and last line on stderr of each launcher."""
        found = []
        for p in self.launchers:
            _, err = p.communicate(timeout=240)
            found.append((p.returncode, (err.strip().splitlines() or [""])[-1]))
        return found

    def ends_with(self, message: str) -> None:
        """Both launchers fail with the same message, soon, and leave nothing but a checkpoint to resume from."""
        left, began = self.below(), time.monotonic()
        (code, said), (other_code, other_said) = self.end()
        assert (code, other_code) == (1, 1) and message in said and said == other_said
        assert time.monotonic() - began < 60
        assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        kept = {p.name for p in (self.run / "checkpoints").glob("step_*")}
        assert kept & {f"step_{self.step()}", f"step_{self.step() - 1}"}
        status = json.loads((self.run / "status.json").read_text())
        assert status["phase"] == "failed" and message in status["error"]

    def clean(self) -> None:
        for p in self.launchers:
            if p.poll() is None:
                p.send_signal(signal.SIGINT)
                try:
                    p.communicate(timeout=60)
                except subprocess.TimeoutExpired:
                    p.kill()


@pytest.fixture
def hosts(namespaces: list[str], data: Path, url: str, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(namespaces, data, tmp_path, url)
    yield made
    made.clean()


def test_a_run_on_two_hosts_survives_all_losses(hosts: Hosts) -> None:
    hosts.start("accelerate", own_server=True)
    hosts.wait_steps(2)
    hosts.kill(0, "vllm.entrypoints")
    hosts.ends_with(f"node 0 ({HOSTS[0]}): the student server died (exit code 137): it was killed by SIGKILL")

    first = hosts.step()
    hosts.start("deepspeed")
    hosts.wait_steps(1)
    assert hosts.step() >= first  # it resumed: at most the step that was not checkpointed is done again
    pulled = hosts.below()
    ip("-n", hosts.namespaces[1], "link", "set", "eth0", "down")
    began = time.monotonic()
    (code, said), (other_code, other_said) = hosts.end()
    assert (code, other_code) == (1, 1) and time.monotonic() - began < 60
    # neither host can ask the other: each says what it sees
    assert f"node 1 ({HOSTS[1]}) was lost" in said and f"node 0 ({HOSTS[0]}) was lost" in other_said
    assert not [p for p in pulled if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    ip("-n", hosts.namespaces[1], "link", "set", "eth0", "up")

    hosts.start("deepspeed")
    hosts.wait_steps(1)
    hosts.kill(1, "opd.train", "launch.launcher")
    hosts.ends_with("a rank was killed by SIGKILL")

    last = hosts.step()
    hosts.start("accelerate")
    assert hosts.end() == [(0, "")] * 2
    assert last <= STEPS - 3
    lines = [json.loads(line) for line in (hosts.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert max(line["mismatch/logprob"] for line in lines) < 1e-4
    assert json.loads((hosts.run / f"checkpoints/step_{STEPS}/state.json").read_text())["world"] == 2
