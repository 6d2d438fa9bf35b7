"""What a stage is: settings, the key of its work, one function from record to record, and a store of clips."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from opd.endpoint import Endpoint
from opd.prompts.tables import records
from opd.settings import Fatal, Section
from opd.storage.journal import canonical, digest, stats
from opd.types import joined

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Any]
Work = Callable[[Record], Record]
FOLDER = "audio"  # beside a manifest
RESUMES = "what is done is kept, the same command goes on"


class ClipStore:
    """The folder `audio` beside a manifest; paths in manifests are relative to `root`, the manifest's own folder.

    Clips are named by what made them: none is made twice, none is ever half written. They are written in the folder
    `aside` of the same file system and moved once they are whole; who makes a store empties that folder of what an
    earlier process left there.
    """

    def __init__(self, root: Path, aside: Path | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self._aside_folder = aside or self.root / FOLDER

    def make(self, key: str, wave: Callable[[], tuple[np.ndarray, int]]) -> Path:
        """The clip of this key; unless it is there, what `wave` gives ([samples], Hz) as 16-bit FLAC.

        What peaks above 1 is scaled down to 1: clipped, it would be another sound.
        """
        import soundfile

        def write(aside: Path) -> None:
            samples, rate = wave()
            samples = samples / max(1.0, float(abs(samples).max()))
            encoded = io.BytesIO()  # libsndfile would not tell of a disk that is full when it closes a file
            soundfile.write(encoded, samples, rate, format="FLAC", subtype="PCM_16")
            aside.write_bytes(encoded.getbuffer())

        return self._kept(key, ".flac", write)

    def put(self, content: bytes, suffix: str) -> Path:
        """A clip that is encoded already, named by its bytes."""
        return self._kept(hashlib.sha256(content).hexdigest()[:32], suffix, lambda aside: aside.write_bytes(content))

    def adopt(self, clip: str) -> str:
        """How a manifest names a clip: one that does not lie below `root` is linked or copied into the store first."""
        path = Path(os.path.abspath(clip))
        for below, root in ((path, self.root), (path.resolve(), self.root.resolve())):
            if below.is_relative_to(root):
                return below.relative_to(root).as_posix()
        with open(path, "rb") as f:
            key = hashlib.file_digest(f, "sha256").hexdigest()[:32]

        def write(aside: Path) -> None:
            try:
                os.link(path.resolve(), aside)  # of a link the file: a relative one leads nowhere from here
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, aside)

        return self._kept(key, path.suffix, write).relative_to(self.root).as_posix()

    def _kept(self, key: str, suffix: str, write: Callable[[Path], Any]) -> Path:
        """The clip of this key; unless it is there, what `write` makes, which takes its name once it is on the disk."""
        path = self.root / FOLDER / key[:2] / f"{key}{suffix}"
        if path.is_file():
            return path
        aside = self._aside_folder / f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            for folder in (path.parent, self._aside_folder):
                folder.mkdir(parents=True, exist_ok=True)
            write(aside)
            with open(aside, "rb") as f:
                os.fsync(f.fileno())
            aside.replace(path)
        except OSError as e:  # the folder's fault, not the record's
            raise Fatal(f"{e.filename or path}: {e.strerror or e}; {RESUMES}") from e
        finally:
            with suppress(OSError):
                aside.unlink()
        return path


class Stage(Section):
    """One step of making data. Fields are its settings, and a record is made again when one of them changes.

    A subclass says what works on its records: `process` for work of this machine's cores, else `thread`, which a stage
    with an endpoint has always.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # higher when the same settings give something else than before
    workers: ClassVar[Literal["process", "thread"]] = "process"
    raw: ClassVar[bool] = False  # reads rows of any shape, not records of a manifest
    elsewhere: ClassVar[tuple[str, ...]] = ()  # settings that say where work is done, not what comes out
    files: ClassVar[tuple[str, ...]] = ()  # settings that may name a file or folder, whose content decides too

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """The servers that the settings name, by setting."""
        return {name: value for name, value in self if isinstance(value, Endpoint)}

    def check(self) -> None:
        """Look, before anything starts, at what the settings name outside of them. Raises UserError."""
        for name, endpoint in self.endpoints.items():
            endpoint.check(name)

    def rows(self, source: str) -> Iterator[tuple[str, Any]]:
        """(place, row) of what is read; a ValueError in the place of a row that cannot be. Raises UserError."""
        return records(source, streaming=True)

    def begin(self, store: ClipStore) -> Work:
        """The function that makes a record; called once in each process. New clips go to the store.

        It takes a record whose clips have absolute paths, and may change it. It raises Drop, Failed or Unavailable.
        """
        return partial(self.one, store)

    def one(self, store: ClipStore, record: Record) -> Record:
        """Make one record: of a stage that has nothing to begin with."""
        raise NotImplementedError

    def advice(self, source: str, out: Path) -> list[str]:
        """Lines for the user once the manifest `out` is written: what comes next."""
        return []

    def chosen(self) -> Callable[[Record], str | None]:
        """What sees the finished records in their order and gives a reason to leave one out; none: it stays."""
        return lambda record: None

    def key(self, record: Record) -> str:
        """Digest of all that a record's result depends on: stage, settings, the record, the bytes of its clips.

        Of a file that a setting names its bytes count; of a folder names, sizes and times of change.
        """
        clips = [digest(str(part.get("path"))) for part in audio_parts(record)]
        content = [self.name, self.version, deciding(self), _without_paths(record), clips]
        named = [Path(v) for v in (getattr(self, name) for name in self.files) if isinstance(v, str)]
        if there := [stats(p) if p.is_dir() else digest(str(p)) for p in named if p.exists()]:
            content.append(there)
        return hashlib.sha256(canonical(content)).hexdigest()[:32]


def deciding(section: Section) -> dict[str, Any]:
    """The settings that decide what comes out: all but those that a section names in `elsewhere`."""
    elsewhere = getattr(section, "elsewhere", ())
    values = {name: getattr(section, name) for name in type(section).model_fields if name not in elsewhere}
    return {name: deciding(v) if isinstance(v, Section) else v for name, v in values.items()}


def content_id(record: Record) -> str:
    """An id for a record that brings none: of what is in it."""
    return hashlib.sha256(canonical(_without_paths(record))).hexdigest()[:16]


def audio_parts(record: Record) -> Iterator[dict[str, Any]]:
    """The audio parts of a record's messages, in order."""
    messages = record.get("messages")
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "audio":
                yield part


def last_question(record: Record) -> tuple[dict[str, Any], str]:
    """The last user turn, which must be text: the message itself, to be changed in place, and its text.

    Raises Drop where there is none, it is empty, or it holds audio.
    """
    message = next((m for m in reversed(record["messages"]) if m["role"] == "user"), None)
    if message is None:
        raise Drop("no user turn")
    if any(part["type"] != "text" for part in message["content"] if isinstance(part, dict)):
        raise Drop("spoken already")
    text = joined(message)["content"].strip()
    if not text:
        raise Drop("empty")
    return message, text


def _without_paths(record: Record) -> Record:
    """A clip is known by its bytes: where it lies does not matter."""
    if next(audio_parts(record), None) is None:
        return record
    copy = json.loads(canonical(record))
    for part in audio_parts(copy):
        part.pop("path", None)
    return copy


class Drop(Exception):
    """This record is left out for good. The message: a reason to count, such as `too long`, a colon, details."""
