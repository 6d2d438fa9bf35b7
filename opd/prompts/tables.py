"""Rows of manifests and other tables: JSONL, JSON, CSV, TSV here; Parquet and data sets of the Hub by `datasets`."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from opd.settings import UserError, attempt, first_line, open_text, read_text, regular_file, text_lines

Rows = Iterator[tuple[str, Any]]  # (place, row), a ValueError for a row that cannot be read
HUB = "hf://datasets/"
COMMON_VOICE = {"path", "sentence"}  # columns of its tables
AUDIO_COLUMNS = ("audio", "file_name", "audio_filepath", "path")  # names of the column of recordings
LJSPEECH = "file_name|raw_text|normalized_text\n"  # which its table does not say


def is_table(path: str) -> bool:
    """Whether rows have columns, each in every row, and not names of their own as those of JSON."""
    return path.startswith("hub:") or Path(path).suffix.lower() in (".csv", ".tsv", ".parquet")


def records(path: str, streaming: bool = False) -> Rows:
    """(place, row) of every row of a manifest; a ValueError in the place of a row that cannot be read.

    `streaming`: do not load a hub's data set or a Parquet file whole. Raises UserError for an unreadable manifest.
    """
    if is_table(path):
        for place, row in table(path, streaming):
            yield place, row if isinstance(row, ValueError) else {k: v for k, v in row.items() if v is not None}
        return
    rows = _json_list(path) if Path(path).suffix.lower() == ".json" else None
    yield from _json_lines(path) if rows is None else ((f"{path}:{i + 1}", row) for i, row in enumerate(rows))


def _json_lines(path: str) -> Rows:
    for place, line in text_lines(path, "manifest"):
        try:
            yield place, line if isinstance(line, ValueError) else json.loads(line)
        except json.JSONDecodeError as e:
            yield place, ValueError(f"not valid JSON: {e.msg} at column {e.colno}")
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
            yield place, ValueError(f"not readable as JSON: {e}")


def _json_list(path: str) -> list[Any] | None:
    """The rows of a .json file that is one list; none where it has a row a line."""
    text = attempt(read_text, path, "manifest")
    rows = attempt(json.loads, text) if isinstance(text, str) and text.lstrip().startswith("[") else None
    if isinstance(rows, ValueError):
        raise UserError(f"{path}: not readable as JSON: {rows}")
    return rows


def table(path: str, streaming: bool = True, check: Callable[[list[str]], None] = lambda names: None) -> Rows:
    """(place, row) of every row of a table, None for an empty cell, after `check` of the names of its columns.

    Of CSV and TSV, which have no types, the text as it is written. An Audio column gives {"bytes", "path"} as they are
    stored, a ClassLabel its name. Raises UserError for what cannot be read.
    """
    typed = path.startswith("hub:") or path.lower().endswith(".parquet")
    return _datasets(path, streaming, check) if typed else _separated(path)


def _separated(path: str) -> Rows:
    """Quotes are read by the rules of CSV, but in tables of Common Voice and LJSpeech, where they are text."""
    with open_text(path, "manifest", newline="") as f:
        f.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]  # a row that is no UTF-8 is bad alone
        first = f.readline()
        sign = "\t" if path.lower().endswith(".tsv") else next((s for s in ",;\t" if s in first), ",")
        head = [first]
        if "|" in first and Path(path).name.lower() == "metadata.csv":
            sign = "|"
            head = [first] if {*first.strip().split("|")} & {*AUDIO_COLUMNS} else [LJSPEECH, first]
        quoting: Any = (
            csv.QUOTE_NONE if sign == "|" or set(first.strip().split("\t")) >= COMMON_VOICE else csv.QUOTE_MINIMAL
        )
        cells = csv.reader(itertools.chain(head, f), delimiter=sign, quoting=quoting, strict=True)
        names = attempt(_cells, cells)
        if isinstance(names, ValueError):
            raise UserError(f"{path}: not readable as a table: {names}")
        names = [name.strip() for name in names or []]
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise UserError(f"{path}: the column {twice[0]} is there twice")
        while True:
            place, row = f"{path}:{cells.line_num + 2 - len(head)}", attempt(_cells, cells)
            if row is None:
                return
            if isinstance(row, list) and len(row) > len(names):
                row = ValueError(f"expected {len(names)} cells, found {len(row)}")
            if isinstance(row, ValueError):
                yield place, row
            elif row:
                yield place, {name: cell or None for name, cell in itertools.zip_longest(names, row) if name}


def _cells(cells: Iterator[list[str]]) -> list[str] | None:
    """The next row of a table, none at its end."""
    try:
        row = next(cells, None)
        "".join(row or []).encode()
    except csv.Error as e:
        raise ValueError(f"not readable as CSV: {e}") from e
    except UnicodeEncodeError as e:
        raise ValueError("not valid UTF-8") from e
    return row


def _datasets(path: str, streaming: bool, check: Callable[[list[str]], None]) -> Rows:
    import datasets

    load = datasets.load_dataset
    if path.startswith("hub:"):
        name, _, split = path.removeprefix("hub:").partition(":")
        owner, title, part = [*name.split("/", 2), "", ""][:3]
        load = partial(load, f"{owner}/{title}" if title else owner, part or None, split=split or "train")
    else:
        load = partial(load, "parquet", data_files=str(regular_file(path, "manifest")), split="train")
    try:
        data = load(streaming=streaming)
        data = data if data.features is not None else data._resolve_features()
        check(data.column_names)
        labels = {n: f.names for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
        for i, row in enumerate(_undecoded(data)):
            row |= {n: names[row[n]] for n, names in labels.items() if row[n] in range(len(names))}
            yield f"{path}:{i + 1}", {key: _as_written(value) for key, value in row.items()}
    except Exception as e:  # pyarrow, pandas, the hub's client: each with errors of its own
        cause = e.__cause__ or e
        file, cache = str(getattr(cause, "filename", None) or "-"), datasets.config.HF_DATASETS_CACHE
        ours = Path(file).is_relative_to(cache) or Path(cache).is_relative_to(file)
        remedy = "; HF_HOME or HF_DATASETS_CACHE names another folder for its cache" if ours else ""
        raise UserError(f"{path}: `datasets` cannot read it: {first_line(cause)[:300]}{remedy}") from e


def _undecoded(data: Any) -> Any:
    import datasets

    class Stored(datasets.Audio):  # theirs asks for torchcodec even to pass a path on
        def encode_example(self, value: Any) -> dict[str, Any]:
            if isinstance(value, dict):
                return {"bytes": value.get("bytes"), "path": value.get("path")}
            return {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": str(value)}

    for name in [n for n, feature in data.features.items() if isinstance(feature, datasets.Audio)]:
        data = data.cast_column(name, Stored(decode=False))
    return data


def hub_bytes(path: str | None) -> bytes:
    """A file that a data set of the Hub names: on the Hub, or in this machine's cache of it.

    Raises ValueError for any other place, and for a file that cannot be read.
    """
    import datasets
    from datasets.utils.file_utils import xopen

    where = path or "none"
    file, cache = where.split("::")[-1], Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()
    if not file.startswith(HUB) and not ("://" not in where and Path(where).resolve().is_relative_to(cache)):
        raise ValueError(f"audio: expected the bytes of a recording or its place on the Hub, found {where[:200]!r}")
    try:
        with xopen(where, "rb") as f:
            return f.read()
    except (OSError, ValueError) as e:
        raise ValueError(f"audio: {where}: cannot be read: {str(e)[:200] or type(e).__name__}") from e


def _as_written(node: Any) -> Any:
    """Undo what columns of one type make of records: absent keys are None, a text content is a list of one part."""
    if isinstance(node, dict):
        kept = {k: _as_written(v) for k, v in node.items() if v is not None}
        match kept.get("content"):
            case [{"type": "text", "text": str(text), **rest}] if not rest:
                kept["content"] = text
        return kept
    if isinstance(node, list):
        return [_as_written(v) for v in node]
    return node
