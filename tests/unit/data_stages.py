"""Stages for tests of what runs stages, and `opd` with them: `python -m data_stages data tone …`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from opd import cli
from opd.data import stages
from opd.data.engine.clip_store import ClipStore
from opd.data.engine.stage import Drop, Record, Stage, Work
from opd.endpoint import Failed, Unavailable


class Ask(Stage):
    """Upper-cases questions, in threads. `log` gets the id of every record made; `ill` holds {id: what is raised}."""

    name: ClassVar[str] = "ask"
    workers: ClassVar[Any] = "thread"
    elsewhere: ClassVar[tuple[str, ...]] = ("log", "ill", "sleep_s")

    suffix: str = "!"
    log: str | None = None
    ill: str | None = None
    sleep_s: float = 0.0

    def begin(self, store: ClipStore) -> Work:
        return lambda record: self.make(record, store)

    def make(self, record: Record, store: ClipStore) -> Record:
        time.sleep(self.sleep_s)
        kind = json.loads(Path(self.ill).read_text()).get(record["id"], "") if self.ill else ""
        errors = {"drop": Drop, "failed": Failed, "down": Unavailable}
        if kind in errors:
            raise errors[kind](f"{kind} on purpose: {record['id']}")
        if kind == "die":
            os._exit(1)
        if self.log:
            with open(self.log, "a") as f:
                f.write(record["id"] + "\n")
        return self.change(record, store)

    def change(self, record: Record, store: ClipStore) -> Record:
        record["messages"][-1]["content"] = record["messages"][-1]["content"].upper() + self.suffix
        return record


class Tone(Ask):
    """Gives every question a clip of noise, in processes."""

    name: ClassVar[str] = "tone"
    workers: ClassVar[Any] = "process"

    seconds: float = 0.1

    def change(self, record: Record, store: ClipStore) -> Record:
        text, key = record["messages"][-1]["content"], self.key(record)

        def wave() -> tuple[np.ndarray, int]:
            return np.random.default_rng(int(key, 16)).uniform(-0.5, 0.5, int(self.seconds * 16000)), 16000

        part = {"type": "audio", "path": str(store.make(key, wave)), "transcript": text}
        record["messages"][-1]["content"] = [part]
        return record


class Unready(Tone):
    """Cannot begin."""

    name: ClassVar[str] = "unready"

    def begin(self, store: ClipStore) -> Work:
        raise Unavailable("no such voice")


def questions(path: Path, count: int) -> str:
    rows = [{"id": f"q{i}", "messages": [{"role": "user", "content": f"what is {i}"}]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(log: Path) -> list[str]:
    """Ids made since the last call."""
    ids = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(ids)


STAGES = {"ask": Ask, "tone": Tone, "unready": Unready}


def main(argv: Sequence[str]) -> int:
    for name, stage in STAGES.items():
        stages.STAGES[name] = stages.Listed(f"data_stages:{stage.__name__}", str(stage.__doc__))
    return cli.main(list(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
