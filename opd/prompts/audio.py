"""Decode, validate and resample clips: soundfile reads, torchaudio resamples."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from opd.settings import UserError, regular_file
from opd.types import BadAudio, TooLong

SILENCE = 1e-4  # peak below -80 dBFS: nothing that a model could hear
SHORTEST_S = 0.05


def load(path: str, rate: int, max_seconds: float) -> np.ndarray:
    """Decode a clip (wav, flac, mp3, ogg; any sample rate; mono or more channels) to mono float32 at `rate` Hz.

    Returns [samples] in [-1, 1]. Raises BadAudio for a missing, empty, truncated, silent, non-finite, too short or
    too long clip, or a file that is no audio.
    """
    try:
        regular_file(path, "audio file")
    except UserError as e:
        raise BadAudio(str(e)) from e
    if Path(path).stat().st_size == 0:
        raise BadAudio(f"{path}: the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as f:
            declared, source_rate = f.frames, f.samplerate
            if declared > max_seconds * source_rate:
                raise TooLong(f"{path}: {declared / source_rate:.1f} s long, at most {max_seconds:g} s expected")
            wave = f.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise BadAudio(f"{path}: not readable as audio (wav, flac, mp3 or ogg expected)") from e
    _check_whole(path, declared, len(wave))
    check(wave.mean(axis=1), source_rate, path)
    return heard(wave, source_rate, rate)


def heard(wave: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """[samples, channels] as a student hears it: [samples] mono float32 at `rate` Hz, in whole frames of 10 ms."""
    return whole_frames(resample(wave.mean(axis=1), source_rate, rate), rate)


def check(wave: np.ndarray, rate: int, name: str) -> None:
    """Raise BadAudio unless `wave` [samples] is finite, long enough and audible."""
    if len(wave) < SHORTEST_S * rate:
        raise BadAudio(f"{name}: {len(wave) / rate:.3f} s of sound, at least {SHORTEST_S} s expected")
    if not np.isfinite(wave).all():
        raise BadAudio(f"{name}: contains NaN or infinite samples")
    if np.abs(wave).max() < SILENCE:
        raise BadAudio(f"{name}: silent (peak {np.abs(wave).max():.1e}, at least {SILENCE:g} expected)")


def resample(wave: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """Resample [samples] by torchaudio's windowed-sinc kernel."""
    if source_rate == rate:
        return np.ascontiguousarray(wave, dtype=np.float32)
    return _resampler(source_rate, rate)(wave)


@lru_cache(maxsize=16)
def _resampler(source_rate: int, rate: int) -> Callable[[np.ndarray], np.ndarray]:
    """Keeps the kernel, which takes many times as long to make as a clip to resample."""
    import torch
    import torchaudio

    kernel = torchaudio.transforms.Resample(source_rate, rate, dtype=torch.float32)
    return lambda wave: kernel(torch.from_numpy(wave)).numpy()


def whole_frames(wave: np.ndarray, rate: int) -> np.ndarray:
    """Fill [samples] up with silence to whole frames of 10 ms: what libraries make of half a frame differs."""
    return np.pad(wave, (0, -len(wave) % (rate // 100)))


def to_base64_wav(wave: np.ndarray, rate: int) -> str:
    """A float32 WAV in base64: the server decodes exactly the samples that the learner sees."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
    return base64.b64encode(buffer.getvalue()).decode()


def _check_whole(path: str, declared: int, decoded: int) -> None:
    """libsndfile trusts the file's size over a WAV header: compare with the header ourselves."""
    if decoded < declared:
        raise BadAudio(f"{path}: truncated: {declared} frames declared, {decoded} found")
    promised = _riff_bytes(path)
    if promised is not None and promised > Path(path).stat().st_size:
        raise BadAudio(f"{path}: truncated: {promised} bytes declared, {Path(path).stat().st_size} found")
    if not _ogg_ends(path):
        raise BadAudio(f"{path}: truncated: its Ogg stream has no last page")


@lru_cache(maxsize=1024)
def _riff_bytes(path: str) -> int | None:
    with open(path, "rb") as f:
        head = f.read(8)
    if head[:4] != b"RIFF":
        return None
    size = int.from_bytes(head[4:8], "little")
    return None if size in (0, 0xFFFFFFFF, 0xFFFFFFF7) else size + 8  # unknown lengths of streamed files


OGG_PAGE = 27 + 255 + 255 * 255  # bytes at most


@lru_cache(maxsize=1024)
def _ogg_ends(path: str) -> bool:
    """Whether an Ogg file closes with a whole page that is marked as its stream's last (RFC 3533); True for others.

    libsndfile takes the last page that it finds for the end, so a cut file looks whole to it.
    """
    with open(path, "rb") as f:
        if f.read(4) != b"OggS":
            return True
        size = f.seek(0, io.SEEK_END)
        f.seek(max(0, size - OGG_PAGE))
        tail = f.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
