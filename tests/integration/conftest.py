"""Real parts on the CPU: a vLLM server that holds the shipped student, and spoken questions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from live import ROOT, STUDENT, config_of, serving, serving_student

from opd.doctor.probe import PlainStudent
from opd.inference.weight_sync import WeightSync
from opd.models.base import family_of
from opd.processes.commands import teacher_server
from opd.processes.layout import Place


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


@pytest.fixture(scope="module")
def original_url(data: Path, student_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The student's server with the shipped weights: other tests push theirs to it."""
    own = [f"student.path={STUDENT}", "student.train=[llm, adapter, tower]", f'rollout.urls=["{student_url}"]']
    config = config_of("2_xopd", data, tmp_path_factory.mktemp("original"), *own)
    shipped = PlainStudent(config, family_of(STUDENT), [], {})
    with closing(WeightSync(shipped.sampler.servers, shipped.family, config, 0)) as sync:
        shipped.push(sync, 0)
    return student_url
