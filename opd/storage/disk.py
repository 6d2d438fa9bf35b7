"""Folders that cannot be written and disks that are full: one line names them, whichever library met them."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.settings import UserError, first_line

# OSError and safetensors say the first two; torch does not say why its writer stopped.
FULL = re.compile("No space left on device|Disk quota exceeded|PytorchStreamWriter|unexpected pos|file write failed")


def free(folder: str | Path, what: str) -> int:
    """Bytes that are free where a folder is, or is to be. Raises UserError, `what` in front, where none can be written.

    Permissions do not tell: some file systems take no files.
    """
    path = Path(folder)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise UserError(f"{what} {folder}: expected a folder that can be written ({there} is none)") from e
    return shutil.disk_usage(there).free


def gib(size: float) -> str:
    """Bytes for a reader."""
    unit, bits = next(((u, n) for u, n in (("GiB", 30), ("MiB", 20)) if abs(size) >= 2**n / 10), ("KiB", 10))
    return f"{size / 2**bits:.1f} {unit}"


@contextmanager
def filling(folder: str | Path, what: str, aside: Path | None = None) -> Iterator[None]:
    """What is written in the block goes to `folder`: a disk that is full is a UserError, `what` in front.

    aside: where several processes write; the first to fail removes it, so that there is room to say so.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not (FULL.search(str(e)) or (aside is not None and not aside.exists())):
            raise
        disk = shutil.disk_usage(folder)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        room = f"{gib(disk.free)} of {gib(disk.total)} are free there"
        raise UserError(f"{what}: the disk of {folder} is full, or a quota used up ({room}; {first_line(e)})") from e
