"""Stage `benchmark`: a public benchmark as a manifest that `opd eval` measures, heard and read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import soundfile
from pydantic import AfterValidator, Field, PositiveFloat

from opd.data.engine.clip_store import ClipStore
from opd.data.engine.stage import Drop, Record, Stage, Work, audio_parts
from opd.data.stages.benchmarks import AUDIO, BENCHMARKS, OPTIONS, UNHEARD, Benchmark, Part, make
from opd.data.stages.natural import Natural, dropping_bad_audio
from opd.data.stages.recordings import within
from opd.prompts.manifest import datasets_records, records
from opd.scoring.scorer import template
from opd.settings import UserError, read_text
from opd.storage.digests import digest

ANSWER_TOKENS = 2048  # that answers should have room for
WINDOW_S = 30  # that many families hear at most
TABLES = (".parquet", ".jsonl", ".json")


class LoadBenchmark(Stage):
    """Settings of the stage `benchmark`."""

    name: ClassVar[str] = "benchmark"
    raw: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[str, ...]] = ("source",)

    subset: str = Field("", description="of voicebench: alpacaeval, commoneval, wildvoice, sd-qa, mmsu, bbh, …")
    split: str = Field("", description="one split only, such as usa of sd-qa; none: all that the benchmark has")
    source: str | None = Field(
        None, description="hub:owner/name, a folder or a .parquet, .jsonl or .json file; none: the benchmark's own"
    )
    instruction: Annotated[str, AfterValidator(partial(template, names=("question", "options")))] = Field(
        OPTIONS, description="of mmar and mmau, behind the clip: with {question} and {options}, which are listed"
    )
    max_seconds: PositiveFloat = Field(600.0, description="of a clip; what is longer is left out")

    def rows(self, source: str) -> Iterator[tuple[str, Any]]:
        """Rows of the benchmark that `source` names, with what a record needs to know beside its columns."""
        about, part = self._named(source)
        for split in [self.split] if self.split else part.splits:
            for number, (place, root, row) in enumerate(self._split(source, about, part, split)):
                if isinstance(row, ValueError):
                    yield place, row
                    continue
                name = row.get("id")
                if source == "voicebench" or name in (None, ""):
                    name = "/".join(filter(None, (self.subset, split, str(number))))
                yield place, {"id": str(name), "benchmark": source, "split": split, "root": str(root), "row": row}

    def _named(self, name: str) -> tuple[Benchmark, Part]:
        about = BENCHMARKS.get(name)
        if about is None:
            raise UserError(f"opd data benchmark {name}: expected one of {', '.join(BENCHMARKS)}")
        part = about.parts.get(self.subset)
        if part is None:
            known = ", ".join(about.parts) if "" not in about.parts else "none, for it has no subsets"
            raise UserError(f"opd data benchmark {name}: subset: expected {known}, found {self.subset!r}")
        if self.split and self.source is None and self.split not in part.splits:
            raise UserError(
                f"opd data benchmark {name}: split: expected one of {', '.join(part.splits)}, found {self.split!r}"
            )
        return about, part

    def _split(self, name: str, about: Benchmark, part: Part, split: str) -> Iterator[tuple[str, Path, Any]]:
        """(place, folder that paths are relative to, row) of a split."""
        source = self.source or about.source
        if source.startswith("hub:"):
            title, _, own = source.partition(":")[2].partition(":")
            if self.subset and title.count("/") == 1:
                title += f"/{self.subset}"
            files = [f"hub:{title}:{self.split or own or split}"]
        else:
            if Path(source).is_file() and len(part.splits) > 1 and not self.split:
                known = ", ".join(part.splits)
                raise UserError(f"source {source}: is one file: say of which split it is, split= one of {known}")
            files = [str(f) for f in _files(Path(source), self.subset, split, len(part.splits))]

        def columns(there: list[str]) -> None:
            for some in (*(either.split("/") for either in part.needs.split()), AUDIO):
                if not set(some) & set(there):
                    hint = f"; {about.hint}" if about.hint else ""
                    raise ValueError(f"{name} needs a column {some[0]}, found {', '.join(there)}{hint}")

        for file in files:
            root = Path(file) if file.startswith("hub:") else Path(file).resolve().parent
            if file.startswith("hub:") or file.endswith(".parquet"):
                for place, row in datasets_records(file, streaming=True, prepare=partial(_undecoded, columns)):
                    yield place, root, row
                continue
            for place, row in _table(file):
                if isinstance(row, dict):
                    try:
                        columns(list(row))
                    except ValueError as e:
                        raise UserError(f"{place}: {e}") from e
                yield place, root, row if isinstance(row, dict | ValueError) else ValueError("expected an object")

    def key(self, record: Record) -> str:
        """A clip is known by its bytes, a record by these and its columns: where they lie does not matter."""
        if "row" not in record:
            return super().key(record)
        row = {k: _content(v, record["root"]) if k in AUDIO else v for k, v in record["row"].items()}
        return super().key({k: v for k, v in record.items() if k != "root"} | {"row": row})

    def begin(self, store: ClipStore) -> Work:
        """Row -> {"id", "messages", "match", "seconds", answer, choices, group, benchmark, subset where there are}."""
        shortest = 0.01  # of a benchmark every clip is asked
        return partial(self._record, store, Natural(min_seconds=shortest, max_seconds=self.max_seconds))

    def _record(self, store: ClipStore, natural: Natural, given: Record) -> Record:
        record = make(given["benchmark"], self.subset, given["split"], given["row"], self.instruction)
        seconds = 0.0
        for part in audio_parts(record):
            clip, root = part.pop("clip"), Path(given["root"])
            source = {"bytes": clip["bytes"]} if _bytes(clip) else {"path": str(_path(clip, root))}
            with dropping_bad_audio():
                path, length = natural.whole(store, {"id": given["id"], **source})
            part["path"] = str(path)
            seconds += length
        return {"id": given["id"], **record, "seconds": round(seconds, 3)}

    def advice(self, source: str, out: Path) -> list[str]:
        """How the manifest is evaluated, with the settings that it needs."""
        about, part = self._named(source)
        made = [row for _, row in records(str(out), streaming=True)]
        clips = {str(out.parent / p["path"]) for row in made for p in audio_parts(row)}
        longest = math.ceil(max(soundfile.info(c).duration for c in clips))
        key = "eval.retention" if about.heard_only else "eval.test"
        other = "eval.test" if about.heard_only else "eval.retention"
        words = [f"{key}={out}", f"{other}="]
        words += [f"data.max_audio_seconds={max(longest, WINDOW_S)}", f"rollout.max_tokens={ANSWER_TOKENS}"]
        if part.match in ("judge", "rating", "rubric"):
            more = f", {part.judge}" if part.judge else ""
            words.append(f"'eval.judge={{url: …, model: …{more}}}'")
        lines = []
        if longest > WINDOW_S:
            told = f"clips up to {longest} s: for a family that hears {WINDOW_S} s, load it with max_seconds={WINDOW_S}"
            lines.append(f"{told}, which leaves the longer ones out")
        lines += [f"{source} ({about.paper}): opd eval RECIPE {' '.join(words)} --out FOLDER"]
        if about.heard_only:
            lines.append(
                f"its clips are not only speech: no transcript says what is heard, so it measures retention, heard "
                f"only; as eval.test its typed accuracy is that of the question with {UNHEARD!r} in the clip's place"
            )
        return lines


def _files(source: Path, subset: str, split: str, splits: int) -> list[Path]:
    """Tables of a local copy: the file itself, or those of a folder that belong to the subset and the split."""
    if source.is_file() and source.suffix in TABLES:
        return [source]
    if not source.is_dir():
        raise UserError(f"source {source}: expected hub:owner/name, a folder or a file ({', '.join(TABLES)})")
    folder = source / subset if subset and (source / subset).is_dir() else source
    found = [f for suffix in TABLES for f in sorted(folder.rglob(f"*{suffix}"))]
    named = [f for f in found if f.stem == split or f.stem.startswith((f"{split}-", f"{split}."))]
    if named or splits > 1:
        found = named
    tables = [f for f in found if f.suffix == ".parquet"] or found
    if not tables:
        raise UserError(f"source {folder}: expected tables ({', '.join(TABLES)}) of the split {split}, found none")
    return tables


def _table(file: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a .jsonl, or of a .json file that is one list."""
    if file.endswith(".jsonl"):
        yield from records(file)
        return
    try:
        rows = json.loads(read_text(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not readable as JSON: {e}") from e
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of objects, found {type(rows).__name__}")
    yield from ((f"{file}:{i + 1}", row) for i, row in enumerate(rows))


def _undecoded(columns: Any, data: Any) -> Any:
    import datasets

    data = data if data.features is not None else data._resolve_features()
    columns(data.column_names)
    for name, feature in data.features.items():
        struct = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
        if name in AUDIO and (isinstance(feature, datasets.Audio) or struct):
            data = data.cast_column(name, datasets.Audio(decode=False))
    return data


def _bytes(clip: Any) -> bool:
    return isinstance(clip, dict) and clip.get("bytes") is not None


def _path(clip: Any, root: Path) -> Path:
    path = clip.get("path") if isinstance(clip, dict) else clip
    if not isinstance(path, str) or not path:
        raise Drop("no audio")
    try:
        return within(root, path)
    except ValueError as e:
        raise Drop(f"no audio: {e}") from e


def _content(clip: Any, root: str) -> Any:
    if _bytes(clip):
        return hashlib.sha256(clip["bytes"]).hexdigest()
    try:
        return digest(str(_path(clip, Path(root))))
    except Drop:
        return clip
