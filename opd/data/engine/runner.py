"""Runs a stage over a manifest: many records at a time, resumably, over several processes or machines."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.data.engine.pool import Outcome, Pool
from opd.data.engine.stage import RESUMES, ClipStore, Record, Stage, audio_parts, content_id
from opd.prompts.manifest import folder_of, parse_record, unmarked
from opd.prompts.tables import records
from opd.settings import UserError, attempt
from opd.storage import run_folder
from opd.storage.journal import Journal
from opd.storage.json_lines import write_atomic

MAX_FAILED = 0.01  # share of the records tried, and more than FEW of them
FEW = 10
Job = tuple[str, str | None]  # the key of what is made, and its id
GRACE_S = 10.0  # after Ctrl-C, for records that are being made
CHUNK = 1000  # records of a row group of Parquet


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
        told = [f"wrote {self.out}: {self.written} of {self.read} records"]
        if self.open:
            told = [f"{self.out}: not written yet, {self.open} of {self.read} records are left to other shards"]
        for what, counts in (("dropped", self.dropped), ("failed", self.failed)):
            if counts:
                reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
                told.append(f"{counts.total()} {what} ({reasons})")
        return ", ".join(told)


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
    if os.path.exists(source) and out.exists() and os.path.samefile(source, out):
        raise UserError(f"--out {out}: is the manifest that is read; name another file")
    stage.check()
    folder = out.with_suffix(".stage")
    with run_folder.lock(folder, shard[0], of="--out", by=f"opd data {stage.name}"):
        aside = folder / f"aside-{shard[0]}"
        try:
            if aside.exists():  # of a run that was killed
                shutil.rmtree(aside)
            aside.mkdir()
            with contextlib.closing(Journal(folder, shard[0])) as journal:
                run = _Run(stage, source, out, journal, aside, shard, limit, say)
                run.make(workers)
                return run.finish(folder)
        except OSError as e:
            where = e.filename or out.parent
            raise UserError(f"{where}: {e.strerror or e}; {RESUMES}") from e
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@dataclass
class _Run:
    stage: Stage
    source: str
    out: Path
    journal: Journal
    aside: Path
    shard: tuple[int, int]
    limit: int | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.store = ClipStore(self.out.parent, self.aside)
        self.keys: list[str] = []  # of all records, in order
        self.failed: set[str] = set()
        self.summary = Summary(self.out)
        self.ticker = _Ticker(self.stage.name, self.say, self._of(_countable(self.source, self.limit)))

    def make(self, workers: int | None) -> None:
        """Do what is missing of this shard."""
        pool = Pool(self.stage, self.store, workers)
        flying: dict[Future[Outcome], Job] = {}
        patience = None
        try:
            for job, record in self._missing():
                flying[pool.submit(record)] = job
                if len(flying) >= 4 * pool.count:
                    self._collect(flying)
            self.ticker.total = self._of(len(self.keys))
            while flying:
                self._collect(flying)
        except BrokenExecutor as e:
            fewer = f"; was memory short? Try --workers {pool.count // 2}" if pool.count > 1 else ""
            raise UserError(f"{self.stage.name}: a worker process died{fewer}") from e
        except KeyboardInterrupt:
            patience = GRACE_S
            self.say(f"{self.stage.name}: interrupted; {RESUMES}")
            raise
        finally:
            pool.end(flying, patience)
            for future, job in flying.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    with contextlib.suppress(OSError, UserError):  # the one that is on its way says why
                        self._keep(*job, *future.result())

    def _of(self, records: int | None) -> int | None:
        """How many of so many records are this shard's."""
        return None if records is None else len(range(self.shard[0], records, self.shard[1]))

    def _missing(self) -> Iterator[tuple[Job, Record]]:
        """The records of this shard that have no result yet; notes every record's key on the way."""
        seen: set[str] = set()
        for i, (place, row) in enumerate(read_source(self.source, self.stage, self.limit)):
            key, why = self._key(place, row)
            self.keys.append(key)
            mine = i % self.shard[1] == self.shard[0]
            again = key in seen
            if not again and key in self.journal:  # and its clips are still there
                record = self.journal[key].get("record", {})
                again = all((self.store.root / part["path"]).is_file() for part in audio_parts(record))
            seen.add(key)
            if not mine or again:
                self.ticker.there += mine
                continue
            name = str(row["id"]) if isinstance(row, dict) and row.get("id") is not None else None
            if why is None:
                yield (key, name), row
            else:
                self._keep(key, name, "drop", f"not usable: {place}: {why}")

    def _key(self, place: str, row: Any) -> tuple[str, str | None]:
        """The key of a row, and what is wrong with it."""
        key = row if isinstance(row, ValueError) else attempt(self.stage.key, row)
        if isinstance(key, str):
            return key, None
        return self.stage.key({"place": ascii(place), "error": ascii(str(key))}), str(key)

    def _collect(self, flying: dict[Future[Outcome], Job]) -> None:
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        for future in [f for f in flying if f in done]:  # in their order
            self._keep(*flying.pop(future), *future.result())

    def _keep(self, key: str, name: str | None, kind: str, result: Any) -> None:
        if kind == "failed":
            self.failed.add(key)
            self.summary.failed[result.partition(":")[0]] += 1
            self.ticker.tick(self.summary)
            failed, tried = self.summary.failed.total(), self.summary.made + self.summary.failed.total()
            if failed > FEW and failed > MAX_FAILED * tried:
                told = f"{failed} of {tried} records failed, the last one: {result}"
                raise UserError(f"{self.stage.name}: {told}; {RESUMES}")
            return
        self.journal.add(key, {kind: result} | ({"id": name} if kind == "drop" else {}))
        self.summary.made += 1
        self.ticker.tick(self.summary)

    def finish(self, folder: Path) -> Summary:
        """Write the manifest, once every record has its result."""
        s = self.summary
        s.read = len(self.keys)
        if s.read == 0:
            raise UserError(f"{self.source}: holds no record")
        self.journal.refresh()
        s.open = len({key for key in self.keys if key not in self.journal} - self.failed)
        if s.open:
            return s
        dropped: list[str] = []
        s.written = write_manifest(self._results(dropped), self.out, self.aside)
        write_atomic(folder / "dropped.jsonl", "".join(dropped))
        if s.written == 0:
            told = str(s).replace(f"wrote {self.out}: ", "")
            raise UserError(f"{self.stage.name}: no record is left: {told}; {folder / 'dropped.jsonl'} names them")
        counts = {"read": s.read, "written": s.written, "dropped": s.dropped, "failed": s.failed}
        about = {"stage": self.stage.name, "version": self.stage.version, "source": self.source, **counts}
        about |= {"settings": self.stage.model_dump(mode="json")}
        write_atomic(folder / "stage.json", json.dumps(about, indent=1))
        return s

    def _results(self, dropped: list[str]) -> Iterator[Record]:
        chosen, written, ids = self.stage.chosen(), set(), set()
        for i, key in enumerate(self.keys):
            if key not in self.journal:
                continue
            result = self.journal[key]
            record: Any = result.get("record")
            why: Any = result.get("drop")
            name = (record or result).get("id")
            if record is not None:
                why = "twice in the input" if key in written else None
                why = why or (f"id used before: {name}" if name in ids else chosen(record))
            written.add(key)
            if why is None:
                ids.add(name)
                yield record
            else:
                self.summary.dropped[why.partition(":")[0]] += 1
                dropped.append(json.dumps({"record": i + 1, "id": name, "reason": why}) + "\n")


def read_source(source: str, stage: Stage | None = None, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """(place, record) of each row; a ValueError in a bad one's place. Clips of a record have absolute paths.

    stage: one that reads other rows than those of a manifest.
    """
    root, raw = folder_of(source), stage is not None and stage.raw
    for i, (place, row) in enumerate(stage.rows(source) if stage else records(source, streaming=True)):
        if limit is not None and i >= limit:
            return
        yield place, row if raw and isinstance(row, dict) else attempt(_normal, row, root, place)


def _normal(row: Any, root: Path, place: str) -> Record:
    """A record with `messages` and an id, whichever form it has. Raises ValueError as parse_record does."""
    prompt = parse_record(row, root, place)
    record = {k: unmarked(v) for k, v in row.items() if k not in ("audio", "transcript", "id")}
    record |= {"messages": json.loads(json.dumps(prompt.messages))}
    return {"id": content_id(record) if row.get("id") is None else prompt.id} | record


def write_manifest(records: Iterable[Record], out: Path, aside: Path) -> int:
    """Write records, all or none, as JSONL or Parquet, as `out` is named; returns how many. `aside`: a folder near.

    In Parquet, text contents are lists of one text part where other contents are lists: a column has one type. Reading
    (opd/prompts/manifest.py) makes texts of them again. Raises UserError when a field is of types that Parquet cannot
    hold in one column, OSError when it cannot be written; `out` is then as it was.
    """
    lines = aside / f"{out.name}.jsonl"
    count = 0
    with open(lines, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
        f.flush()
        os.fsync(f.fileno())
    if count:
        if out.suffix == ".parquet":
            table = aside / out.name
            _to_parquet(lines, table, out)
            table.replace(out)
            lines.unlink()
        else:
            lines.replace(out)
    return count


def _to_parquet(lines: Path, table: Path, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = any(isinstance(m["content"], list) for chunk in _chunks(lines) for row in chunk for m in row["messages"])
    try:
        schema = pa.schema([])
        for chunk in _chunks(lines, parts):
            fields = list(pa.array(chunk).type)
            schema = pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")
        with open(table, "wb") as f:
            with pq.ParquetWriter(f, schema) as writer:
                for chunk in _chunks(lines, parts):
                    writer.write_table(pa.Table.from_pylist(chunk, schema))
            f.flush()
            os.fsync(f.fileno())
    except (pa.ArrowException, OverflowError) as e:
        if isinstance(e, OSError):
            raise
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--out {out}: Parquet cannot hold these records ({reason}); name a .jsonl file") from e


def _chunks(lines: Path, parts: bool = False) -> Iterator[list[Record]]:
    with open(lines, encoding="utf-8") as f:
        while chunk := [json.loads(line) for line in itertools.islice(f, CHUNK)]:
            for message in (m for row in chunk if parts for m in row["messages"]):
                if isinstance(message["content"], str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
            yield chunk


def _countable(source: str, limit: int | None = None) -> int | None:
    """Records of a JSONL or Parquet file, up to a limit, where they can be counted at once; none: nobody knows yet."""
    path, found = Path(source), None
    with contextlib.suppress(OSError, ValueError):  # whoever reads it says so; pyarrow's errors are ValueErrors
        if path.suffix == ".parquet" and path.is_file():
            import pyarrow.parquet

            found = int(pyarrow.parquet.read_metadata(path).num_rows)
        elif path.suffix == ".jsonl" and path.is_file():
            with open(path, "rb") as f:
                found = sum(1 for line in f if line.strip())
    return found if found is None or limit is None else min(found, limit)


class _Ticker:
    """A line of progress every few seconds, with the time that is left once the total is known."""

    EVERY_S = 5.0

    def __init__(self, name: str, say: Callable[[str], None], total: int | None) -> None:
        self.name, self.say, self.total = name, say, total
        self.there = 0  # records that needed no work
        self.began = self.last = time.monotonic()

    def tick(self, s: Summary) -> None:
        now = time.monotonic()
        if now - self.last < self.EVERY_S:
            return
        self.last = now
        tried = s.made + s.failed.total()
        rate, done = tried / (now - self.began), tried + self.there
        of = left = ""
        if self.total is not None:
            seconds = int(max(0, self.total - done) / rate)
            of, left = f" of {self.total}", f", ETA {seconds // 60}:{seconds % 60:02d}"
        failed = f", {s.failed.total()} failed" if s.failed else ""
        self.say(f"{self.name}: {done}{of} records done{left}{failed}, {rate:.1f}/s")
