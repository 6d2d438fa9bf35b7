"""Writing manifests: JSONL or Parquet, whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from opd.data.engine.stage import Record
from opd.settings import UserError

CHUNK = 1000  # records of a row group of Parquet


def write(records: Iterable[Record], out: Path, aside: Path) -> int:
    """Write records as JSONL or Parquet, as the name of `out` says; returns how many. `aside` is a folder beside it.

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


def count(source: str, limit: int | None = None) -> int | None:
    """Records of a JSONL or Parquet file, up to a limit, where they can be counted at once; none: nobody knows yet."""
    path, found = Path(source), None
    with suppress(OSError, ValueError):  # whoever reads it says so; pyarrow's errors are ValueErrors
        if path.suffix == ".parquet" and path.is_file():
            import pyarrow.parquet

            found = int(pyarrow.parquet.read_metadata(path).num_rows)
        elif path.suffix == ".jsonl" and path.is_file():
            with open(path, "rb") as f:
                found = sum(1 for line in f if line.strip())
    return found if found is None or limit is None else min(found, limit)
