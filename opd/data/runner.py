"""Runs a stage over a manifest: many records at a time, resumably, over several processes or machines."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd import run_folder
from opd.data.clip_store import ClipStore
from opd.data.journal import Journal
from opd.data.stage import Drop, Failed, Record, Stage, Work, audio_parts, content_id
from opd.metrics import write_atomic
from opd.prompts import parse_record, records
from opd.settings import UserError

MAX_FAILED = 0.01  # share of the records tried, and more than FEW of them
FEW = 10
THREADS = 16  # requests to an endpoint at a time, unless --workers says otherwise


@dataclass
class Summary:
    """What a run of a stage did."""

    out: Path
    read: int = 0
    written: int = 0
    made: int = 0  # in this run
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    failed: Counter[str] = field(default_factory=Counter)
    open: int = 0  # left to other shards

    def __str__(self) -> str:
        if self.open:
            return f"{self.out}: not written yet, {self.open} of {self.read} records are left to other shards"
        told = [f"{self.written} of {self.read} records"]
        for what, counts in (("dropped", self.dropped), ("failed", self.failed)):
            if counts:
                reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
                told.append(f"{counts.total()} {what} ({reasons})")
        return f"wrote {self.out}: " + ", ".join(told)


def run_stage(
    stage: Stage,
    source: str,
    out: Path,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Make the manifest `out` (.jsonl or .parquet) of the records of `source`: a manifest, rows for a raw stage.

    Results are kept in `<out without suffix>.stage/`, and a run takes up what earlier ones left there. shard (i, n): do
    every n-th record from the i-th on; whichever shard finds all done writes the manifest. `say` gets lines of
    progress.

    Raises UserError for a manifest that cannot be read, a folder that cannot be written, an endpoint that is down, and
    when more than a hundredth of the records fail; what is done by then is kept.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: expected a file name that ends in .jsonl or .parquet")
    if not 0 <= shard[0] < shard[1]:
        raise UserError(f"--shard {shard[0]}/{shard[1]}: expected I/N with I from 0 to N - 1")
    if not source.startswith("hub:") and Path(source).resolve() == out.resolve():
        raise UserError(f"--out {out}: is the manifest that is read; name another file")
    stage.check()
    folder = out.with_suffix(".stage")
    with run_folder.lock(folder, shard[0], of="--out", by=f"opd data {stage.name}"):
        journal = Journal(folder, shard[0])
        try:
            run = _Run(stage, source, out, journal, shard, limit, say)
            run.make(workers)
            return run.finish(folder)
        except OSError as e:
            raise UserError(f"{out.parent}: {e.strerror or e}; what is done is kept, the same command goes on") from e
        finally:
            journal.close()


@dataclass
class _Run:
    stage: Stage
    source: str
    out: Path
    journal: Journal
    shard: tuple[int, int]
    limit: int | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.store = ClipStore(self.out.parent)
        self.keys: list[str] = []  # of all records, in order
        self.summary = Summary(self.out)
        self.ticker = _Ticker(self.stage.name, self.say)

    def make(self, workers: int | None) -> None:
        """Do what is missing of this shard."""
        count: int = workers or (THREADS if self.stage.pool() == "thread" else _cores())
        pool = _pool(self.stage, self.out.parent, count)
        flying: dict[Future[tuple[str, dict[str, Any]]], str] = {}
        try:
            for key, record in self._missing():
                flying[pool.submit(_work, record)] = key
                if len(flying) >= 4 * count:
                    self._collect(flying)
            while flying:
                self._collect(flying)
        except BrokenExecutor as e:
            raise UserError(
                f"{self.stage.name}: a worker process died; was memory short? Try --workers {count // 2 or 1}"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            with suppress(OSError, UserError):  # the one that is on its way says why
                for future, key in flying.items():
                    if future.done() and not future.cancelled() and future.exception() is None:
                        self._keep(key, *future.result())

    def _missing(self) -> Iterator[tuple[str, Record]]:
        """The records of this shard that have no result yet; notes every record's key on the way."""
        seen: set[str] = set()
        for i, (place, row) in enumerate(_read(self.stage, self.source, self.limit)):
            key = self.stage.key(row) if isinstance(row, dict) else self.stage.key({"place": place, "error": str(row)})
            self.keys.append(key)
            mine = i % self.shard[1] == self.shard[0] and key not in seen
            seen.add(key)
            if not mine or (key in self.journal and self._whole(key)):
                continue
            if isinstance(row, dict):
                yield key, row
            else:
                self._keep(key, "drop", f"not usable: {row}")

    def _whole(self, key: str) -> bool:
        """Whether the clips of a result are still there."""
        record = self.journal[key].get("record", {})
        return all((self.store.root / part["path"]).is_file() for part in audio_parts(record))

    def _collect(self, flying: dict[Future[tuple[str, Any]], str]) -> None:
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        for future in done:
            self._keep(flying.pop(future), *future.result())

    def _keep(self, key: str, kind: str, result: Any) -> None:
        if kind == "failed":
            self.summary.failed[_reason(result)] += 1
            failed, tried = self.summary.failed.total(), self.summary.made + self.summary.failed.total()
            if failed > FEW and failed > MAX_FAILED * tried:
                raise UserError(
                    f"{self.stage.name}: {failed} of {tried} records failed, the last one: {result}; what is done is "
                    "kept, the same command goes on"
                )
            return
        self.journal.add(key, {kind: result})
        self.summary.made += 1
        self.ticker.tick(self.summary)

    def finish(self, folder: Path) -> Summary:
        """Write the manifest, once every record has its result."""
        s = self.summary
        s.read = len(self.keys)
        s.open = len({key for key in self.keys if key not in self.journal}) - s.failed.total()
        if s.open > 0:
            return s
        if s.read == 0:
            raise UserError(f"{self.source}: holds no record")
        dropped: list[str] = []
        aside = self.out.with_name(f".{self.out.name}.{os.getpid()}.jsonl")
        try:
            with open(aside, "w", encoding="utf-8") as f:
                for record in self._results(dropped):
                    f.write(json.dumps(record, ensure_ascii=False) + "\n")
                    s.written += 1
                f.flush()
                os.fsync(f.fileno())
            if s.written == 0:
                raise UserError(f"{self.stage.name}: no record is left: {s}".replace(f"wrote {self.out}: ", ""))
            _place(aside, self.out)
        finally:
            aside.unlink(missing_ok=True)
        write_atomic(folder / "dropped.jsonl", "".join(dropped))
        counts = {"read": s.read, "written": s.written, "dropped": s.dropped, "failed": s.failed}
        about = {"stage": self.stage.name, "version": self.stage.version, "source": self.source, **counts}
        write_atomic(
            folder / "stage.json", json.dumps(about | {"settings": self.stage.model_dump(mode="json")}, indent=1)
        )
        return s

    def _results(self, dropped: list[str]) -> Iterator[Record]:
        chosen, written = self.stage.chosen(), set()
        for i, key in enumerate(self.keys):
            if key not in self.journal:
                continue
            result = self.journal[key]
            record = result.get("record")
            why = result.get("drop") if record is None else "twice in the input" if key in written else chosen(record)
            written.add(key)
            if why is None and record is not None:
                yield record
            else:
                self.summary.dropped[_reason(str(why))] += 1
                dropped.append(json.dumps({"record": i + 1, "id": (record or {}).get("id"), "reason": why}) + "\n")


def _read(stage: Stage, source: str, limit: int | None) -> Iterator[tuple[str, Any]]:
    """(place, record) of each row; a ValueError in a bad one's place. Clips of a record have absolute paths."""
    root = Path(source).resolve().parent
    for i, (place, row) in enumerate(records(source, streaming=True)):
        if limit is not None and i >= limit:
            return
        if stage.raw or isinstance(row, ValueError):
            yield place, row
            continue
        try:
            yield place, _normal(row, root, place)
        except ValueError as e:
            yield place, e


def _normal(row: Any, root: Path, place: str) -> Record:
    """A record with `messages` and an id, whichever form it has. Raises ValueError as parse_record does."""
    prompt = parse_record(row, root, place)
    record = {k: v for k, v in row.items() if k not in ("audio", "transcript")}
    record |= {"messages": json.loads(json.dumps(prompt.messages))}
    return {"id": str(row["id"]) if "id" in row else content_id(record)} | record


def _place(aside: Path, out: Path) -> None:
    """Give a whole manifest its name, in the format of that name."""
    if out.suffix == ".parquet":
        import datasets

        made = aside.with_suffix(".parquet")
        try:
            datasets.Dataset.from_json(str(aside)).to_parquet(made)
            made.replace(out)
        finally:
            made.unlink(missing_ok=True)
    else:
        aside.replace(out)


# Workers. A process pool builds the stage's function once in each process, a thread pool shares one.

_worker: tuple[Work, ClipStore] | None = None


def _pool(stage: Stage, root: Path, count: int) -> Executor:
    if stage.pool() == "thread":
        _start(stage, root)
        return ThreadPoolExecutor(count)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=spawn, initializer=_start_process, initargs=(stage, root))


def _start_process(stage: Stage, root: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    _start(stage, root)


def _start(stage: Stage, root: Path) -> None:
    global _worker
    store = ClipStore(root)
    _worker = stage.begin(store), store


def _work(record: Record) -> tuple[str, Any]:
    assert _worker is not None
    work, store = _worker
    try:
        made = work(record)
        for part in audio_parts(made):
            part["path"] = store.relative(store.adopt(Path(part["path"])))
        return "record", made
    except Drop as e:
        return "drop", str(e)
    except Failed as e:
        return "failed", str(e)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _reason(message: str) -> str:
    return message.partition(":")[0]


class _Ticker:
    """A line of progress every few seconds."""

    EVERY_S = 5.0

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.began = self.last = time.monotonic()

    def tick(self, s: Summary) -> None:
        now = time.monotonic()
        if now - self.last >= self.EVERY_S:
            self.last = now
            failed = f", {s.failed.total()} failed" if s.failed else ""
            self.say(f"{self.name}: {s.made} records made{failed}, {s.made / (now - self.began):.1f}/s")
