"""Folders of the machine that a run needs: caches, sockets, and the one through which new weights travel."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doctor_world import facts_of, world

from opd.doctor import machine
from opd.doctor.checks import Warned
from opd.settings import UserError

__all__ = ["world"]  # a fixture
CACHES = ("HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


def test_a_home_that_cannot_be_written_says_which_variables_help(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(world / "built"))
    assert machine.caches(facts_of(world)) == "can be written"
    assert not (world / ".cache").exists() and not (world / "built").exists()
    monkeypatch.setenv("HOME", "/proc/1/none")
    found = machine.caches(facts_of(world))
    assert isinstance(found, Warned)
    for said in ("HF_HOME /proc/1/none/.cache/huggingface: expected a folder that can", "VLLM_CACHE_ROOT", "TRITON_"):
        assert said in found
    monkeypatch.setenv("XDG_CACHE_HOME", str(world))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(world))
    assert machine.caches(facts_of(world)) == "can be written"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/1/none")
    with pytest.raises(UserError, match="^TORCH_EXTENSIONS_DIR /proc/1/none: expected a folder that can be written"):
        machine.caches(facts_of(world))


def test_a_push_that_does_not_fit_is_told_in_bytes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(world, f"rollout.transfer_dir={world}/later")
    facts.student = str(world / "student")
    assert machine.weights_folder(facts).endswith("a push weighs 6.7 MiB")
    free = shutil.disk_usage(world)._replace(free=4 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    told = f"^rollout.transfer_dir {world}/later: a push weighs 6.7 MiB, 4.0 MiB are free there; name a folder with"
    with pytest.raises(UserError, match=told):
        machine.weights_folder(facts)
    given = ("rollout.source=dataset", "objective.name=sft", f"rollout.transfer_dir={world}/later")
    assert machine.weights_folder(facts_of(world, *given)) == "none travel by files"
    assert not (world / "later").exists()
