"""Recipes made small, the command line, and live servers that die with the tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor.probe import PlainStudent
from opd.processes.commands import Command, student_server
from opd.processes.guard import Process, stop_all
from opd.processes.layout import Place
from opd.rollout.sampler import VllmSampler
from opd.types import Prompt, Rollout

ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = "recipes/tiny/student", "recipes/tiny/teacher"


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


def sample(sampler: VllmSampler, prompts: list[Prompt], clips: dict[str, np.ndarray], view: str) -> list[Rollout]:
    return sampler.sample([(p, view, f"test/{i}") for i, p in enumerate(prompts)], clips, 4, 1.0)


def worst(local: PlainStudent, rollouts: list[Rollout]) -> float:
    return local.mismatch(rollouts).greatest
