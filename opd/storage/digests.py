"""Digests of values and files, by which finished work is found again."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd.settings import UserError, regular_file


def canonical(value: Any) -> bytes:
    """One spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode()


def digest(path: str) -> str:
    """SHA-256 of a file; its path where it cannot be read, which whoever decodes it will say."""
    try:
        stat = regular_file(path, "file").stat()
        return _digest(path, stat.st_size, stat.st_mtime_ns)
    except (OSError, UserError):
        return path


def stats(folder: Path, pattern: str = "*") -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in ns) of the files of a folder, which tell its content cheaply."""
    found = [(f.name, f.stat()) for f in sorted(folder.glob(pattern)) if f.is_file()]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in found]


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
