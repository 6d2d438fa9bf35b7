"""Recordings with transcripts, in the layouts that they come in, as rows for the stage `natural`.

A row has `path` or `bytes`, `transcript`, and where known id, speaker, accent and group. A long recording whose
transcript has times is several rows, each with `piece`: [first second, last second].
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd.prompts import audio
from opd.prompts.manifest import datasets_records
from opd.settings import UserError, open_text, read_text, text_lines

HUB = "hf://datasets/"
AUDIO = audio.SUFFIXES
TIMED = (".json", ".srt", ".vtt")  # transcripts with times: Whisper's JSON, subtitles
COLUMNS = {  # what it is called, the first that is there
    "audio": ("audio",),
    "transcript": ("transcript", "transcription", "sentence", "text", "normalized_text", "raw_text"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "id": ("id", "utterance_id"),
    "accent": ("accent", "accents"),
    "group": ("group",),
}
EDGE_S = 0.2  # of silence left at the ends of a piece
REACH_S = 0.5  # how far from the time of a transcript its silence may be
FRAME_S = 0.01
QUIET_DB = 25.0  # below the speech around it
TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)\s*-->\s*(?:(\d+):)?(\d+):(\d+)[.,](\d+)")
Row = dict[str, Any]
Rows = Iterator[tuple[str, Any]]


class Segment(NamedTuple):
    """What is said from one second to another."""

    start: float
    end: float
    text: str


Pause = Callable[[Segment, Segment], tuple[float, float] | None]


def rows(source: str, columns: dict[str, str], folder_is: str | None, longest: float, pause: float) -> Rows:
    """(place, row) of every recording; a ValueError in the place of one whose transcript cannot be read.

    `source`: a folder in LibriSpeech's layout (*.trans.txt), with WebDataset shards (*.tar) or with transcripts beside
    recordings (x.wav with x.txt, x.json, x.srt or x.vtt); a Common Voice *.tsv; a shard; a Parquet file or hub data set
    with an Audio column. Raises UserError for what is none of these.
    """
    path = Path(source)
    if source.startswith("hub:") or path.suffix == ".parquet":
        return _columns(source, columns)
    if path.suffix == ".tsv" and path.is_file():
        return _common_voice(path)
    if path.is_file() and _is_shard(path):
        return _shard(path)
    if not path.is_dir():
        what = "a folder, a .tsv of Common Voice, a .tar shard, a .parquet file or hub:owner/name"
        raise UserError(f"{source}: expected {what}")
    if tables := sorted(path.glob("*.tsv")):
        raise UserError(f"{source}: holds tables of Common Voice: name one of them, such as {tables[0]}")
    files = sorted(Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    if any(file.name.endswith(".trans.txt") for file in files):
        return itertools.chain.from_iterable(_librispeech(f) for f in files if f.name.endswith(".trans.txt"))
    if shards := [file for file in files if _is_shard(file)]:
        return itertools.chain.from_iterable(map(_shard, shards))
    found = [file for file in files if file.suffix.lower() in AUDIO]
    if not found:
        raise UserError(f"{source}: expected recordings ({', '.join(AUDIO)}), *.trans.txt or *.tar, found none")
    return itertools.chain(_beside(path, found, folder_is, longest, pause), _left_over(files))


def within(root: Path, name: str) -> Path:
    """The file `name` of a data set in `root`. Raises ValueError for one elsewhere: a data set names only its own.

    Links are not followed: the Hub's cache consists of them.
    """
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)):
        raise ValueError(f"{name} lies outside of {root}")
    return path


def _is_shard(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.gz", ".tgz"))


def _librispeech(file: Path) -> Rows:
    """A chapter: lines of `SPEAKER-CHAPTER-UTTERANCE TEXT`, recordings beside it."""
    for place, line in text_lines(file):
        try:
            if isinstance(line, ValueError):
                raise line
            name, _, text = line.partition(" ")
            path = _first(file.parent, [f"{name}{suffix}" for suffix in (".flac", *AUDIO)])
            yield place, {"id": name, "path": path, "transcript": text, "speaker": name.split("-")[0]}
        except ValueError as e:
            yield place, e


def _first(root: Path, names: list[str]) -> str:
    """The first of these files that is there, else the first. Raises ValueError for one elsewhere."""
    clips = [within(root, name) for name in names]
    return str(next((clip for clip in clips if clip.is_file()), clips[0]))


def _common_voice(file: Path) -> Rows:
    with open_text(file, newline="") as f:
        try:
            table = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            if missing := {"path", "sentence"} - set(table.fieldnames or ()):
                expected = "expected Common Voice's columns path and sentence"
                raise UserError(f"{file}: {expected}, {min(missing)} is not there")
            for row in table:
                name = row["path"] or ""
                made: Row = {"id": Path(name).stem, "transcript": row["sentence"]}
                made |= {"speaker": row.get("client_id"), "accent": row.get("accents")}
                try:
                    made["path"] = _first(file.parent, [f"clips/{name}", name])
                    yield f"{file}:{table.line_num}", made
                except ValueError as e:
                    yield f"{file}:{table.line_num}", e
        except (UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{file}: not readable as a Common Voice table: {e}") from e


def _columns(source: str, columns: dict[str, str]) -> Rows:
    found: dict[str, str] = {}

    def prepare(data: Any) -> Any:
        data = data if data.features is not None else data._resolve_features()
        names = data.column_names
        for what, usual in COLUMNS.items():
            name = columns.get(what) or next((n for n in usual if n in names), None)
            if name is None and what in ("audio", "transcript") or name and name not in names:
                raise ValueError(f"no column {name or what}, only {', '.join(names)}; say columns.{what}=NAME")
            found.update({what: name} if name else {})
        return _stored(data, found["audio"], list(found.values()))

    for place, row in datasets_records(source, streaming=True, prepare=prepare):
        clip = row.get(found["audio"]) or {}
        made = {what: row.get(name) for what, name in found.items() if what != "audio"}
        try:
            if clip.get("bytes") is not None:
                yield place, made | {"bytes": clip["bytes"]}
            elif source.startswith("hub:"):
                yield place, made | {"bytes": _hub_bytes(clip.get("path"))}
            else:
                yield place, made | {"path": str(within(Path(source).resolve().parent, clip.get("path") or "none"))}
        except ValueError as e:
            yield place, e


def _stored(data: Any, column: str, others: list[str]) -> Any:
    """A streamed data set of that column, as {"path", "bytes"}, and the others; nothing is decoded."""
    import datasets

    class Stored(datasets.Audio):  # theirs asks for torchcodec even to pass a path on
        def encode_example(self, value: Any) -> dict[str, Any]:
            if isinstance(value, str | Path):
                return {"bytes": None, "path": str(value)}
            if isinstance(value, bytes):
                return {"bytes": value, "path": None}
            if not isinstance(value, dict):
                raise ValueError(f"column {column}: expected a recording's path or bytes, found {str(value)[:60]!r}")
            return {"bytes": value.get("bytes"), "path": value.get("path")}

    names = list(dict.fromkeys([column, *others]))
    return data.cast_column(column, Stored(decode=False)).select_columns(names)


def _hub_bytes(path: str | None) -> bytes:
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


def _shard(file: Path) -> Rows:
    """Samples of a WebDataset shard: members with one name up to its first dot, one after the other.

    By tarfile: `webdataset` takes a shard that was cut off for a whole one, `datasets` stops at one broken member.
    """
    try:
        with tarfile.open(file, "r|*") as tar:
            members = (m for m in tar if m.isfile() and not os.path.basename(m.name).startswith("."))
            for name, group in itertools.groupby(members, lambda m: re.sub(r"\.[^/]*$", "", m.name)):
                row: Row = {"id": name}
                others = []
                for member in group:
                    suffix = Path(member.name).suffix.lower()
                    content = tar.extractfile(member)
                    if content is None or suffix not in (*AUDIO, ".txt", ".json"):
                        others.append(member.name)
                        continue
                    data = content.read()
                    try:
                        row |= {"bytes": data} if suffix in AUDIO else _told(suffix, data)
                    except ValueError as e:
                        row["error"] = f"{member.name}: {e}"
                if "bytes" not in row:
                    row.setdefault("error", f"{name}: {_no_recording(others)}")
                yield f"{file}:{name}", ValueError(row["error"]) if "error" in row else row
            if tar.fileobj is not None and tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end")  # which tarfile passes over where a header is cut off
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"{file}: not readable as a tar file: {e}") from e


def _told(suffix: str, data: bytes) -> Row:
    """What a member beside a recording tells. Raises ValueError."""
    text = data.decode("utf-8-sig")
    if suffix == ".txt":
        return {"transcript": text}
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    names = {what: next((n for n in usual if n in content), None) for what, usual in COLUMNS.items()}
    return {what: content[name] for what, name in names.items() if name and what not in ("audio", "id")}


def _beside(root: Path, files: list[Path], folder_is: str | None, longest: float, pause: float) -> Rows:
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix()
        row: Row = {"id": name, "path": str(file.resolve())}
        row |= {folder_is: file.parent.name} if folder_is and file.parent != root else {}
        plain = file.with_suffix(".txt")
        timed = next((t for s in TIMED if (t := file.with_suffix(s)).is_file()), None)
        try:
            if timed is None:
                yield str(file), row | {"transcript": read_text(plain) if plain.is_file() else None}
                continue
            segments = read_segments(timed)
            seconds = _seconds(file)
            if seconds is None or seconds <= longest:
                yield str(file), row | {"transcript": " ".join(s.text for s in segments)}
                continue
            cuts = pieces(segments, seconds, longest, partial(_pause, file, pause))
            for i, (start, end, text) in enumerate(cuts, 1):
                yield f"{file}:{i}", row | {"id": f"{name}/{i}", "piece": [start, end], "transcript": text}
        except UnicodeDecodeError as e:
            yield str(file), ValueError(f"transcript: not valid UTF-8 at byte {e.start + 1}")
        except ValueError as e:
            yield str(file), ValueError(f"{timed}: {e}")


def _left_over(files: list[Path]) -> Rows:
    """What lies beside a transcript where a recording should; a text that is alone may be about the folder."""
    for stem, group in itertools.groupby(sorted(files, key=lambda f: f.with_suffix("")), lambda f: f.with_suffix("")):
        names = {file.suffix.lower(): file.name for file in group}
        told = names.keys() & {*TIMED, ".txt"}
        others = [name for suffix, name in names.items() if suffix not in told]
        if told and not names.keys() & {*AUDIO} and (others or told & {".srt", ".vtt"}):
            yield str(stem), ValueError(f"a transcript with {_no_recording(others)}")


def _no_recording(others: list[str]) -> str:
    return f"no recording beside it ({', '.join(AUDIO)})" + (f", only {', '.join(sorted(others))}" if others else "")


def read_segments(file: Path) -> list[Segment]:
    """A transcript with times, in order: Whisper's JSON ({"segments": [{start, end, text}]}), SRT or WebVTT.

    Raises ValueError, which a UnicodeDecodeError is. No library does it: pysubs2 takes WebVTT's notes and names of cues
    for speech, webvtt-py passes over SRT whose times have no hours, and refuses SRT without numbers.
    """
    text = read_text(file)
    if file.suffix == ".json":
        content = json.loads(text)
        try:
            found = [Segment(float(s["start"]), float(s["end"]), str(s["text"]).strip()) for s in content["segments"]]
        except (KeyError, TypeError) as e:
            raise ValueError('expected {"segments": [{"start", "end", "text"}, …]}') from e
    else:
        found = []
        for block in re.split(r"\n\s*\n", text):
            if time := TIME.search(block):
                h, m, s, part, *end = (g or "0" for g in time.groups())
                start = int(h) * 3600 + int(m) * 60 + float(f"{s}.{part}")
                stop = int(end[0]) * 3600 + int(end[1]) * 60 + float(f"{end[2]}.{end[3]}")
                words = re.sub(r"<[^>]*>", "", block[time.end() :].partition("\n")[2])
                found.append(Segment(start, stop, " ".join(words.split())))
    found = [s for s in found if s.text]
    if not found:
        raise ValueError("holds no text with times")
    if not all(0 <= s.start <= s.end < math.inf for s in found) or found != sorted(found, key=lambda s: s.start):
        raise ValueError("times are not in order")
    return found


def pieces(segments: list[Segment], seconds: float, longest: float, pause: Pause) -> Iterator[Segment]:
    """Cut a recording of so many seconds at silence into pieces of at most `longest` seconds, as few as can be.

    `pause` gives (first second, last second) of the silence between two segments, none where there is none. What has no
    silence inside is one piece, however long.
    """
    start = max(0.0, segments[0].start - EDGE_S)
    texts: list[str] = []
    whole: Segment | None = None
    for segment, after in itertools.zip_longest(segments, segments[1:]):
        texts.append(segment.text)
        quiet = pause(segment, after) if after else (min(segment.end, seconds), seconds)
        if quiet is None:
            continue
        edge = min(EDGE_S, max(0.0, (quiet[1] - quiet[0]) / 2))
        part = Segment(start, quiet[0] + edge, " ".join(texts))
        start, texts = quiet[1] - edge, []
        if whole and part.end - whole.start <= longest:
            whole = Segment(whole.start, part.end, f"{whole.text} {part.text}")
            continue
        if whole:
            yield whole
        whole = part
    if whole:
        yield whole


def _pause(file: Path, least: float, before: Segment, after: Segment) -> tuple[float, float] | None:
    """The longest silence about the time between two segments: quieter by QUIET_DB than the speech at both sides."""
    margin = 2 * REACH_S  # the outer half of it is taken for speech
    first = max(0.0, before.end - margin)
    sound = audio.read(file, start=first, stop=after.start + margin)
    wave, frame = audio.mono(sound.wave), max(1, int(FRAME_S * sound.rate))
    count, sides = len(wave) // frame, int(margin / FRAME_S)
    levels = 10 * np.log10((wave[: count * frame].reshape(count, frame) ** 2).mean(axis=1) + 1e-14)
    if not count:
        return None
    loud = np.quantile(np.concatenate([levels[:sides], levels[-sides:]]), 0.95)
    inner = int((max(0.0, before.end - REACH_S) - first) / FRAME_S)
    best, run = (0, 0), 0
    for i in range(max(0, inner), min(count, count - sides // 2)):
        run = run + 1 if levels[i] < loud - QUIET_DB else 0
        best = max(best, (run, i + 1))
    length, end = best
    if length * FRAME_S < least:
        return None
    return first + (end - length) * FRAME_S, first + end * FRAME_S


def _seconds(file: Path) -> float | None:
    try:
        return audio.seconds(file)
    except audio.BadAudio:
        return None  # whoever decodes it says so
