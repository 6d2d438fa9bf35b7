"""Recipes made small, the command line, and live servers that die with the tests."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor.probe import PlainStudent
from opd.processes import guard
from opd.processes.commands import Command, student_server
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


def serving(command: Command, folder: Path) -> AbstractContextManager[str]:
    """The URL of a live server, which dies with the tests."""
    return guard.serving(command, folder / "server.log", 240)


def serving_student(data: Path, folder: Path) -> AbstractContextManager[str]:
    """A server with the shipped student."""
    config = config_of("2_xopd", data, folder, f"student.path={STUDENT}")
    return serving(student_server(config, Place.here("student")), folder)


def sample(sampler: VllmSampler, prompts: list[Prompt], clips: dict[str, np.ndarray], view: str) -> list[Rollout]:
    return sampler.sample([(p, view, f"test/{i}") for i, p in enumerate(prompts)], clips, 4, 1.0)


def worst(local: PlainStudent, rollouts: list[Rollout]) -> float:
    return local.mismatch(rollouts).greatest
