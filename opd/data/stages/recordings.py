"""Recordings with transcripts, in the layouts that they come in, as rows for the stage `natural`.

A row has `path` or `bytes`, `transcript`, and where known id, speaker, accent and group. A long recording whose
transcript has times is several rows, each with `piece`: [first second, last second].
"""

from __future__ import annotations

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
from opd.prompts.manifest import clip_of, folder_of, within
from opd.prompts.tables import AUDIO_COLUMNS, Rows, is_table, records, table
from opd.settings import UserError, attempt, plain_text, read_text, shown, text_lines

AUDIO = audio.SUFFIXES
TIMED = (".json", ".srt", ".vtt")  # transcripts with times: Whisper's JSON, subtitles
COLUMNS = {  # what it is called, the first that is there
    "audio": AUDIO_COLUMNS,
    "transcript": ("transcript", "transcription", "sentence", "text", "normalized_text", "raw_text"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "id": ("id", "utterance_id"),
    "accent": ("accent", "accents"),
    "group": ("group",),
}
TABLES = (".tsv", ".csv", ".jsonl", ".json")
SHARDS = (".tar", ".tar.gz", ".tgz")
METADATA = ("metadata.csv", "metadata.jsonl")  # of an audio folder, or of LJSpeech
LAYOUTS = (
    "x.txt, x.json, x.srt or x.vtt beside x.wav; *.trans.txt (LibriSpeech); metadata.csv or metadata.jsonl (audio "
    "folder, LJSpeech); *.tar (WebDataset). Of Common Voice, NeMo and others name the table itself: .tsv, .csv, .jsonl"
)
EDGE_S = 0.2  # of silence left at the ends of a piece
REACH_S = 0.5  # how far from the time of a transcript its silence may be
FRAME_S = 0.01
QUIET_DB = 25.0  # below the speech around it
TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)\s*-->\s*(?:(\d+):)?(\d+):(\d+)[.,](\d+)")
Row = dict[str, Any]


class Segment(NamedTuple):
    """What is said from one second to another."""

    start: float
    end: float
    text: str


Pause = Callable[[Segment, Segment], tuple[float, float] | None]


def rows(source: str, columns: dict[str, str], folder_is: str | None, longest: float, pause: float) -> Rows:
    """(place, row) of every recording; a ValueError in the place of one whose transcript cannot be read.

    `source`: a folder in one of LAYOUTS; a table that names recordings and transcripts (Common Voice's *.tsv, a NeMo
    manifest, metadata.csv); a shard; a Parquet file or hub data set with an Audio column. Raises UserError for what is
    none of these.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if source.startswith("hub:") or suffix == ".parquet" or os.path.isfile(path) and suffix in TABLES:
        return _table(source, columns)
    if os.path.isfile(path) and path.name.lower().endswith(SHARDS):
        return _shard(path)
    if not os.path.isdir(path):
        what = f"a folder, a table ({', '.join(TABLES)}), a .tar shard, a .parquet file or hub:owner/name"
        raise UserError(f"{shown(source)}: expected {what}")
    return _folder(path, columns, partial(_beside, path, folder_is, longest, pause))


def _folder(path: Path, columns: dict[str, str], beside: Callable[[list[Path]], Rows]) -> Rows:
    """What its chapters, shards and tables tell, then the recordings that none of them names."""
    files = _files(path)
    if tables := [f for f in files if f.parent == path and f.suffix.lower() == ".tsv"]:
        raise UserError(f"{path}: holds tables of Common Voice: name one of them, such as {tables[0]}")
    lists = {f: read for f in files if (read := _reader(f.name.lower(), columns))}
    named = set()
    for place, row in itertools.chain.from_iterable(read(file) for file, read in lists.items()):
        if isinstance(row, dict) and "path" in row:
            named.add(_place(row["path"]))
        yield place, row
    found = [file for file in files if file.suffix.lower() in AUDIO and _place(file) not in named]
    left = list(_left_over([file for file in files if file not in lists]))
    if not lists and not left and not any(_beside_it(file) for file in found):
        raise UserError(f"{path}: {len(found)} recordings ({', '.join(AUDIO)}), no transcript; looked for: {LAYOUTS}")
    yield from beside(found)
    yield from left


def _reader(name: str, columns: dict[str, str]) -> Callable[[Path], Rows] | None:
    """What reads the file of this name if it tells of recordings elsewhere or holds them."""
    if name.endswith(".trans.txt"):
        return _librispeech
    return _shard if name.endswith(SHARDS) else partial(_table, columns=columns) if name in METADATA else None


def _place(file: str | Path) -> str:
    """A file's name in its real folder, whichever links lead there; a file that is a link stays itself."""
    return os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))


def _files(folder: Path) -> list[Path]:
    """All files below a folder, once however many links lead there. Raises UserError for one that cannot be entered."""

    def refuse(e: OSError) -> None:
        raise UserError(f"{e.filename}: a folder that cannot be read: {e.strerror}") from e

    files, seen = [], set()
    for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort(key=lambda name: (os.path.islink(os.path.join(at, name)), name))
        if (real := os.path.realpath(at)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(at, name) for name in names]
    return sorted(files)


def _librispeech(file: Path) -> Rows:
    """A chapter: lines of `SPEAKER-CHAPTER-UTTERANCE TEXT`, recordings beside it."""
    for place, line in text_lines(file):
        yield place, line if isinstance(line, ValueError) else attempt(_utterance, file.parent, *line.split(None, 1))


def _utterance(root: Path, name: str, text: str = "") -> Row:
    path = _first(root, [f"{name}{suffix}" for suffix in (".flac", ".FLAC", *AUDIO)])
    return {"id": name, "path": path, "transcript": text, "speaker": name.split("-")[0]}


def _first(root: Path, names: list[str]) -> str:
    """The first of these files that is there, else the first. Raises ValueError for one elsewhere."""
    clips = [within(root, name) for name in names]
    return str(next((clip for clip in clips if clip.is_file()), clips[0]))


class NoColumn(ValueError):
    """A table without a column that is needed; the message says which there are, and how to name one of them."""


def _table(source: str | Path, columns: dict[str, str]) -> Rows:
    """Rows that name recordings or hold them: Common Voice, an audio folder's metadata, NeMo's manifests, data sets."""
    source, known, missing = str(source), False, None
    for place, row in table(source) if is_table(source) else records(source):
        made = row if isinstance(row, ValueError) else attempt(_told_by, folder_of(source), columns, row)
        if isinstance(made, NoColumn):
            missing = missing or made
            if is_table(source):
                break
        else:
            known = known or isinstance(row, dict)
        yield place, made
    if missing and not known:
        raise UserError(f"{source}: {missing}") from missing


def _told_by(root: Path, columns: dict[str, str], row: Row) -> Row:
    _object(row)
    made: Row = {}
    for what, usual in COLUMNS.items():
        names = [columns[what]] if what in columns else [n for n in usual if n in row]
        if what in ("audio", "transcript") and not names or what in columns and names[0] not in row:
            raise NoColumn(f"no column {columns.get(what, what)}, only {', '.join(row)[:200]}; say columns.{what}=NAME")
        made |= {what: next((row[n] for n in names if row[n] is not None), None)} if names else {}
    clip, start = made.pop("audio"), row.get("offset")
    if not isinstance(clip, str) or str(root).startswith("hub:"):
        return made | clip_of(clip, root)
    made["path"] = _first(root, [f"clips/{clip}", clip, f"wavs/{clip}.wav"])  # Common Voice, LJSpeech
    own = Path(clip).with_suffix("").as_posix()
    if start is not None:  # of NeMo: a part of the recording
        made["piece"] = [float(start), float(start) + float(row["duration"])]
        own += f"/{start:g}"
    return {**made, "id": own if made.get("id") is None else made["id"]}


def _shard(file: Path) -> Rows:
    """Samples of a WebDataset shard: members with one name up to its first dot, one after the other.

    By tarfile: `webdataset` takes a shard that was cut off for a whole one, `datasets` stops at one broken member.
    """
    try:
        with tarfile.open(file, "r|*") as tar:
            members = (m for m in tar if m.isfile() and not os.path.basename(m.name).startswith("."))
            for name, group in itertools.groupby(members, lambda m: re.sub(r"\.[^/]*$", "", m.name)):
                row: Row = {"id": name}
                others, faults = [], []
                for member in group:
                    suffix = Path(member.name).suffix.lower()
                    content = tar.extractfile(member)
                    if content is None or suffix not in (*AUDIO, ".txt", ".json"):
                        others.append(member.name)
                        continue
                    data = content.read()
                    told = {"bytes": data} if suffix in AUDIO else attempt(_told, suffix, data)
                    if isinstance(told, ValueError):
                        faults.append(f"{member.name}: {told}")
                    else:
                        row = row | told if suffix in AUDIO or _says(told.get("transcript")) else told | row
                if "bytes" not in row:
                    faults.append(f"{name}: {_no_recording(others)}")
                bad = faults and not ("bytes" in row and _says(row.get("transcript")))
                yield f"{file}:{name}", ValueError(faults[0]) if bad else row
            if tar.fileobj is not None and tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end")  # which tarfile passes over where a header is cut off
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"{file}: not readable as a tar file: {e}") from e


def _told(suffix: str, data: bytes) -> Row:
    """What a member beside a recording tells. Raises ValueError."""
    text = data.decode("utf-8-sig")
    if suffix == ".txt":
        return {"transcript": text}
    content = _object(json.loads(text))
    names = {what: next((n for n in usual if n in content), None) for what, usual in COLUMNS.items()}
    return {what: content[name] for what, name in names.items() if name and what not in ("audio", "id")}


def _object(content: Any) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    return content


def _says(transcript: object) -> bool:
    """Whether it is a transcript: what is none hides no other one."""
    return isinstance(transcript, str) and plain_text(transcript) != ""


def _beside(root: Path, folder_is: str | None, longest: float, pause: float, files: list[Path]) -> Rows:
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix()
        row: Row = {"id": name, "path": os.path.abspath(file)}
        row |= {folder_is: file.parent.name} if folder_is and file.parent != root else {}
        told, said = _beside_it(file) or (None, None)
        cuts: Any = []
        if isinstance(said, list):
            seconds = attempt(audio.seconds, file)
            if not isinstance(seconds, ValueError) and seconds > longest:  # whoever decodes a bad one says so
                cuts = attempt(list, pieces(said, seconds, longest, partial(_pause, file, pause)))
            said = cuts if isinstance(cuts, ValueError) else " ".join(s.text for s in said)
        if isinstance(said, ValueError):
            yield str(file), ValueError(f"{told}: {said}")
        elif cuts:
            for i, (start, end, text) in enumerate(cuts, 1):
                yield f"{file}:{i}", row | {"id": f"{name}/{i}", "piece": [start, end], "transcript": text}
        else:
            yield str(file), row | {"transcript": said}


def _beside_it(file: Path) -> tuple[Path, list[Segment] | str | ValueError] | None:
    """The file beside a recording that says something, with times if it can be, and what; else the last one there."""
    told = None
    for beside in (file.with_suffix(case) for suffix in (*TIMED, ".txt") for case in (suffix, suffix.upper())):
        if beside.is_file():
            read: Callable[[Path], Any] = read_text if beside.suffix.lower() == ".txt" else read_segments
            told = beside, attempt(read, beside)
            if isinstance(told[1], list) or _says(told[1]):
                break
    return told


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
    if file.suffix.lower() == ".json":
        content = json.loads(text)
        try:
            found = [Segment(float(s["start"]), float(s["end"]), s["text"]) for s in content["segments"]]
        except (KeyError, TypeError) as e:
            raise ValueError('expected {"segments": [{"start", "end", "text"}, …]}') from e
        if other := [type(s.text).__name__ for s in found if not isinstance(s.text, str)]:
            raise ValueError(f"text: expected a string, found {other[0]}")
    else:
        found = []
        for block in re.split(r"\n\s*\n", text):
            if time := TIME.search(block):
                h, m, s, part, *end = (g or "0" for g in time.groups())
                start = int(h) * 3600 + int(m) * 60 + float(f"{s}.{part}")
                stop = int(end[0]) * 3600 + int(end[1]) * 60 + float(f"{end[2]}.{end[3]}")
                words = re.sub(r"<[^>]*>", "", block[time.end() :].partition("\n")[2])
                found.append(Segment(start, stop, " ".join(words.split())))
    found = [s._replace(text=text) for s in found if (text := s.text.strip())]
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
