"""Real parts on the CPU: a vLLM server that holds the shipped student, and spoken questions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

from opd.config import Config, load_config
from opd.layout import Place
from opd.servers import Command, student_server, teacher_server
from opd.supervisor import Process, stop_all

ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = "recipes/tiny/student", "recipes/tiny/teacher"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in str(item.fspath):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def _at_root() -> None:
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tiny world, spoken anew."""
    out = tmp_path_factory.mktemp("data") / "tiny"
    sizes = ["--train", "48", "--validation", "8", "--test", "16"]
    subprocess.run([sys.executable, "recipes/tiny/make_data.py", "--out", str(out), *sizes], check=True)
    return out


def recipe(name: str, data: Path, run: Path, *more: str) -> tuple[str, list[str]]:
    """A shipped recipe and overrides that make it small."""
    overrides = [f"data.train={data}/train.jsonl", f"run.dir={run}", "train.prompts_per_step=4", "train.steps=3"]
    overrides += ["train.checkpoint_every=1", "eval.start=", "eval.test=", "eval.retention=", *more]
    return f"recipes/tiny/{name}.yaml", overrides


def config_of(name: str, data: Path, run: Path, *more: str) -> Config:
    return load_config(*recipe(name, data, run, *more))


def opd(*args: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "opd.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def wait_healthy(process: Process) -> str:
    """The URL of a server, once it answers."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.code is None:
        try:
            if httpx.get(f"{process.command.url}/health", timeout=2, trust_env=False).status_code == 200:
                return process.command.url
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"server not healthy: {process.last_error()}")


@contextmanager
def serving(command: Command, folder: Path) -> Iterator[str]:
    """The URL of a live server, which dies with the tests."""
    process = Process(command, folder / "server.log")
    try:
        yield wait_healthy(process)
    finally:
        stop_all([process])


def serving_student(data: Path, folder: Path) -> AbstractContextManager[str]:
    """A server with the shipped student."""
    config = config_of("2_xopd", data, folder, f"student.path={STUDENT}")
    return serving(student_server(config, Place.here("student")), folder)


@pytest.fixture(scope="session")
def student_url(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_student(data, tmp_path_factory.mktemp("student")) as url:
        yield url


@pytest.fixture(scope="session")
def teacher_url(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the shipped teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    config = config_of("2_xopd", data, folder, f"student.path={STUDENT}", "teacher.kind=server")
    with serving(teacher_server(config, Place.here("teacher")), folder) as url:
        yield url
