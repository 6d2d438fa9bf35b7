"""Stage `natural`: spoken prompts from recordings that have transcripts."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from opd import types
from opd.data.engine.stage import ClipStore, Drop, Record, Stage, content_id
from opd.data.stages import recordings
from opd.prompts import audio
from opd.settings import plain_text
from opd.storage.journal import digest

SUFFIXES = {"WAV": ".wav", "FLAC": ".flac", "OGG": ".ogg", "MP3": ".mp3"}  # what is kept as it is
Clip = tuple[Path, float]  # and its seconds


class Natural(Stage):
    """Settings of the stage `natural`."""

    name: ClassVar[str] = "natural"
    raw: ClassVar[bool] = True

    columns: dict[str, str] = Field(
        {}, description="of a table: {audio|transcript|speaker|id|accent|group: column}; the usual names by default"
    )
    folder_is: Literal["speaker", "accent", "group"] | None = Field(
        None, description="what the folder of a recording names"
    )
    min_seconds: PositiveFloat = Field(0.5, description="of a clip")
    max_seconds: PositiveFloat = Field(30.0, description="of a clip; recordings with times are cut to that, at silence")
    pause_s: PositiveFloat = Field(0.3, description="shortest silence to cut at")
    keep_capitals: bool = Field(False, description="leave transcripts that are all capitals as they are")

    @model_validator(mode="after")
    def _known(self) -> Natural:
        if unknown := [k for k in self.columns if k not in recordings.COLUMNS]:
            raise ValueError(f"columns: unknown {unknown[0]} (known: {', '.join(recordings.COLUMNS)})")
        return self

    def rows(self, source: str) -> Iterator[tuple[str, Any]]:
        """Recordings, or pieces of them, as opd.data.stages.recordings.rows gives them."""
        return recordings.rows(source, self.columns, self.folder_is, self.max_seconds, self.pause_s)

    def key(self, record: Record) -> str:
        """A recording is known by its bytes: where it lies does not matter."""
        known = {k: v for k, v in record.items() if k not in ("path", "bytes")}
        there = record.get("bytes") is not None or "path" in record
        return super().key(known | ({"sha256": content_digest(record)} if there else {}))

    def one(self, store: ClipStore, row: Record) -> Record:
        """Recording -> {"id", "messages", "seconds", speaker, accent, group where known}."""
        text = row.get("transcript")
        if not isinstance(text, str | None):
            raise Drop(f"transcript: expected a string, found {type(text).__name__}")
        text = " ".join(plain_text(text or "").split())
        if not text:
            raise Drop("no transcript")
        if text.isupper() and not self.keep_capitals:
            text = text.lower()
        piece = row.get("piece")
        with dropping_bad_audio("; no silence to cut at" if piece else "; its transcript has no times to cut by"):
            clip, seconds = self._encoded(store, row, self._heard(row, *piece)) if piece else self.whole(store, row)
        part = {"type": "audio", "path": str(clip), "transcript": text}
        record: Record = {"messages": [{"role": "user", "content": [part]}], "seconds": round(seconds, 3)}
        record |= {k: str(row[k]) for k in ("speaker", "accent", "group") if row.get(k) not in (None, "")}
        name = row.get("id")
        return {"id": content_id(record | {"clip": clip.stem}) if name in (None, "") else str(name)} | record

    def whole(self, store: ClipStore, row: Record) -> Clip:
        """The clip of a recording, byte by byte where training reads its format.

        Raises BadAudio, and Drop for one that is not there or too short.
        """
        path = None if row.get("bytes") is not None else Path(row["path"])
        if path is not None and not os.path.isfile(path):
            raise Drop(f"no audio: {path}")
        sound = self._heard(row)
        if (suffix := SUFFIXES.get(sound.format)) is None:
            return self._encoded(store, row, sound)
        if path is not None and path.suffix.lower() == suffix:
            return path, sound.seconds
        return store.put(path.read_bytes() if path else row["bytes"], suffix), sound.seconds

    def _heard(self, row: Record, start: float = 0.0, stop: float = math.inf) -> audio.Sound:
        """A recording or a piece of it. Raises BadAudio, and Drop for one that is too short."""
        name = f"{row.get('path') or row.get('id')}" + (f" from {start:.1f} s on" if stop < math.inf else "")
        source = Path(row["path"]) if row.get("bytes") is None else row["bytes"]
        sound = audio.read(source, name, start, stop, self.max_seconds)
        if stop < math.inf and sound.seconds < stop - start - audio.HOLE_S:
            raise types.BadAudio(f"{name}: truncated: {stop - start:.2f} s expected, {sound.seconds:.2f} s found")
        if sound.seconds < self.min_seconds:
            raise Drop(f"too short: {name}: {sound.seconds:.2f} s, at least {self.min_seconds:g} s expected")
        audio.check(audio.mono(sound.wave), sound.rate, name)
        return sound

    def _encoded(self, store: ClipStore, row: Record, sound: audio.Sound) -> Clip:
        """As a FLAC file of one channel."""
        return store.make(self.key(row), lambda: (audio.mono(sound.wave), sound.rate)), sound.seconds


@contextmanager
def dropping_bad_audio(why_long: str = "") -> Iterator[None]:
    """Drop a record whose clip cannot be used, or is too long: with the reason, if known."""
    try:
        yield
    except types.TooLong as e:
        raise Drop(f"too long: {e}{why_long}") from e
    except types.BadAudio as e:
        raise Drop(f"bad audio: {e}") from e


def content_digest(row: Record) -> str:
    """SHA-256 of a recording: of its `bytes`, else of the file at its `path`."""
    content = row.get("bytes")
    return digest(row["path"]) if content is None else hashlib.sha256(content).hexdigest()
