"""Disks that are full: by whichever library they are met, one line names the folder and what is free there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opd.settings import UserError
from opd.storage import disk

MORE = torch.zeros(1 << 19)  # 2 MiB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where mounting is allowed; else a folder whose files `x` are full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        os.symlink("/dev/full", folder / "x")
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.processes
def test_a_small_disk(small: Path) -> None:
    writers: list[Callable[[], object]] = [
        lambda: (small / "x").write_bytes(MORE.numpy().tobytes()),
        lambda: torch.save({"a": MORE}, small / "x"),
    ]
    if not (small / "x").is_symlink():  # safetensors writes aside, and puts its own file where the link is
        writers.append(lambda: save_file({"a": MORE}, small / "x"))
    for write in writers:
        told = f"^weights: the disk of {small} is full, or a quota used up .* are free there; "
        with pytest.raises(UserError, match=told), disk.filling(small, "weights"):
            write()
        if not (small / "x").is_symlink():
            (small / "x").unlink(missing_ok=True)


def test_a_device_that_is_always_full(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^x: the disk of .* is full"), disk.filling(tmp_path, "x"):
        torch.save({"a": MORE}, "/dev/full")
    told = "^run.dir: .* free there; .*No space left on device"
    with pytest.raises(UserError, match=told), disk.filling(tmp_path, "run.dir"), open("/dev/full", "w") as f:
        f.write("x")


@pytest.mark.parametrize(
    "error", [OSError(122, "Disk quota exceeded"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_what_several_processes_write_is_removed_and_all_of_them_say_why(tmp_path: Path, error: Exception) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    with pytest.raises(UserError, match="^x: the disk of .* is full"), disk.filling(tmp_path, "x", aside):
        raise error
    assert not aside.exists()
    with pytest.raises(UserError, match="^x: the disk of .* is full"), disk.filling(tmp_path, "x", aside):
        (aside / "shard").write_text("of another process")


def test_other_errors_travel(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^No space left on device, said once$"), disk.filling(tmp_path, "x"):
        raise UserError("No space left on device, said once")
    with pytest.raises(OSError, match="Input/output error"), disk.filling(tmp_path, "x", tmp_path):
        raise OSError(5, "Input/output error")


def test_what_is_free_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert abs(disk.free(tmp_path / "not/yet", "x") - stat.f_bavail * stat.f_frsize) < 1 << 30
    with pytest.raises(UserError, match=r"^HOME /proc/1/none: expected a folder that can be written \(/proc/1 is none"):
        disk.free("/proc/1/none", "HOME")
