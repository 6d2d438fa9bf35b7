"""What is done, in append-only files that survive an interruption at any byte, and digests to find it by."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from opd.settings import UserError, regular_file


class Journal:
    """Results by key, of all shards of a stage; this process appends to the file of its own shard.

    A line is {"key", "record"} or {"key", "drop", "id"}. A last line that was cut off is taken out. Raises UserError
    for a file that is damaged elsewhere.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._own = folder, folder / f"journal-{shard}.jsonl"
        self._fd = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)
        self._open: dict[Path, BinaryIO] = {}
        self._ends: dict[Path, int] = {}  # of the last whole line
        self._places: dict[str, tuple[Path, int]] = {}  # file and offset of each result
        self.refresh()
        os.ftruncate(self._fd, self._ends[self._own])

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The line of a key."""
        path, offset = self._places[key]
        f = self._open[path]
        f.seek(offset)
        return json.loads(f.readline())

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Append a result, whole or not at all. Raises OSError, as for a full disk, and has written nothing then."""
        line = (json.dumps({"key": key, **result}, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        end = self._ends[self._own]
        os.ftruncate(self._fd, end)  # what an interrupted call has left
        try:
            done = 0
            while done < len(line):
                done += os.pwrite(self._fd, line[done:], end + done)
        except OSError:
            os.ftruncate(self._fd, end)
            raise
        self._ends[self._own] = end + len(line)
        self._places[key] = self._own, end

    def refresh(self) -> None:
        """Take up what other shards have added since it was last read."""
        for path in sorted({*self._folder.glob("journal-*.jsonl"), self._own}):
            if path not in self._open:
                self._open[path] = open(path, "rb")  # noqa: SIM115 - closed in close()
            self._ends[path] = self._read(path, self._ends.get(path, 0))

    def close(self) -> None:
        """Have the system write it out. Raises OSError when it cannot."""
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
            for f in self._open.values():
                f.close()

    def _read(self, path: Path, offset: int) -> int:
        """Index a file from an offset on; where its last whole line ends."""
        f = self._open[path]
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n"):
                break
            try:
                self._places[_key(line)] = path, offset
            except ValueError as e:
                remedy = "take the line out, and the stage makes that record again"
                found = f"expected a stage's result, found {line[:40]!r}"
                raise UserError(f"{path}: at byte {offset}: {found}; {remedy}") from e
            offset += len(line)
        return offset


def _key(line: bytes) -> str:
    content = json.loads(line)
    if not isinstance(content, dict) or not isinstance(content.get("key"), str):
        raise ValueError("no key")
    if not isinstance(content.get("record"), dict) and not isinstance(content.get("drop"), str):
        raise ValueError("no result")
    return content["key"]


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
