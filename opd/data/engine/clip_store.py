"""Clips beside manifests, named by what made them: none is made twice, none is ever half written."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "audio"


class ClipStore:
    """The folder `audio` beside a manifest; paths in manifests are relative to `root`, the manifest's own folder.

    Clips are written in the folder `aside` of the same file system and moved once they are whole; who makes a store
    empties that folder of what an earlier process left there.
    """

    def __init__(self, root: Path, aside: Path | None = None) -> None:
        self.root = root.resolve()
        self._aside_folder = aside or self.root / FOLDER

    def make(self, key: str, wave: Callable[[], tuple[np.ndarray, int]]) -> Path:
        """The clip of this key; unless it is there, what `wave` gives ([samples] in [-1, 1], Hz) as 16-bit FLAC."""
        import soundfile

        def write(aside: Path) -> None:
            samples, rate = wave()
            encoded = io.BytesIO()  # libsndfile would not tell of a disk that is full when it closes a file
            soundfile.write(encoded, samples, rate, format="FLAC", subtype="PCM_16")
            aside.write_bytes(encoded.getbuffer())

        return self._kept(key, ".flac", write)

    def put(self, content: bytes, suffix: str) -> Path:
        """A clip that is encoded already, named by its bytes."""
        return self._kept(hashlib.sha256(content).hexdigest()[:32], suffix, lambda aside: aside.write_bytes(content))

    def adopt(self, path: Path) -> Path:
        """A clip that lies elsewhere, linked or copied into the store; one below `root` is taken as it is."""
        path = path.resolve()
        if path.is_relative_to(self.root):
            return path
        with open(path, "rb") as f:
            key = hashlib.file_digest(f, "sha256").hexdigest()[:32]

        def write(aside: Path) -> None:
            try:
                os.link(path, aside)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, aside)

        return self._kept(key, path.suffix, write)

    def relative(self, path: Path) -> str:
        """How a manifest names a clip of the store."""
        return path.resolve().relative_to(self.root).as_posix()

    def _kept(self, key: str, suffix: str, write: Callable[[Path], Any]) -> Path:
        """The clip of this key; unless it is there, what `write` makes, which takes its name once it is on the disk."""
        path = self.root / FOLDER / key[:2] / f"{key}{suffix}"
        if path.is_file():
            return path
        for folder in (path.parent, self._aside_folder):
            folder.mkdir(parents=True, exist_ok=True)
        aside = self._aside_folder / f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            write(aside)
            with open(aside, "rb") as f:
                os.fsync(f.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path
