"""DeepSpeed's extensions: a killed build must not hang the next one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opd.train import extensions

pytestmark = pytest.mark.processes

NAME = "deepspeed_shm_comm"


def build(where: Path, **env: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"DS_ACCELERATOR": "cpu", extensions.VARIABLE: str(where)} | env
    argv = [sys.executable, "-c", "from opd.train.extensions import build; build()"]
    return subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_a_lock_left_by_a_killed_build_is_removed(tmp_path: Path) -> None:
    shutil.copytree(extensions.folder() / NAME, tmp_path / NAME)
    (tmp_path / NAME / "lock").touch()
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / NAME / "lock").exists()


def test_an_extension_that_does_not_compile_is_named(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="false")
    assert done.returncode != 0
    assert f"UserError: DeepSpeed's extension {NAME} does not compile in {tmp_path}" in done.stderr


def test_the_folder_is_the_environments_own(monkeypatch) -> None:
    monkeypatch.delenv(extensions.VARIABLE, raising=False)
    assert extensions.folder() == Path(sys.prefix) / "torch_extensions"
    monkeypatch.setenv(extensions.VARIABLE, "/elsewhere")
    assert extensions.folder() == Path("/elsewhere")
