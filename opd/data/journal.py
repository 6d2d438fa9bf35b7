"""What a stage has done, in append-only files that survive an interruption at any byte."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from opd.settings import UserError


class Place(NamedTuple):
    """Where a result is written."""

    file: int
    offset: int


class Journal:
    """Results by key, of all shards of a stage; this process appends to the file of its own shard.

    A line is {"key", "record"} or {"key", "drop"}. A last line that was cut off is taken out. Raises UserError for a
    file that is damaged elsewhere.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._own = folder / f"journal-{shard}.jsonl"
        self._fd = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)
        self._files = sorted({*folder.glob("journal-*.jsonl"), self._own})
        self._places: dict[str, Place] = {}
        self._end = 0
        for i, path in enumerate(self._files):
            end = self._read(i, path)
            if path == self._own:
                os.ftruncate(self._fd, end)
                self._end = end
        self._mine = self._files.index(self._own)
        self._open = [open(path, "rb") for path in self._files]  # noqa: SIM115 - closed in close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The line of a key."""
        place = self._places[key]
        f = self._open[place.file]
        f.seek(place.offset)
        return json.loads(f.readline())

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Append a result, whole or not at all. Raises OSError, as for a full disk, and has written nothing then."""
        line = (json.dumps({"key": key, **result}, ensure_ascii=False) + "\n").encode()
        try:
            done = 0
            while done < len(line):
                done += os.pwrite(self._fd, line[done:], self._end + done)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        self._places[key] = Place(self._mine, self._end)
        self._end += len(line)

    def close(self) -> None:
        """Have the system write it out."""
        os.fsync(self._fd)
        os.close(self._fd)
        for f in self._open:
            f.close()

    def _read(self, i: int, path: Path) -> int:
        """Index a file; where its last whole line ends."""
        offset = 0
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    key = json.loads(line)["key"]
                except (ValueError, KeyError, TypeError) as e:
                    raise UserError(
                        f"{path}:{number}: expected a stage's result, found {line[:40]!r}; take the line out, and the "
                        "stage makes that record again"
                    ) from e
                self._places[key] = Place(i, offset)
                offset += len(line)
        return offset
