"""What lmms-eval's tasks give for sound, as waveforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opd.prompts import audio
from opd.types import BadAudio, TooLong


def clip(value: Any, rate: int, limit: float, cut: bool) -> tuple[np.ndarray, bool]:
    """[samples] mono float32 at `rate` Hz as training hears it, and whether it was cut off after `limit` seconds.

    Silence is left alone: a benchmark may hold some. Raises BadAudio for what is no sound, TooLong unless `cut`.
    """
    wave, source_rate = decode(value)
    if not len(wave):
        raise BadAudio("the clip is empty")
    if not np.isfinite(wave).all():
        raise BadAudio("the clip contains NaN or infinite samples")
    most = int(limit * source_rate)
    if (long := len(wave) > most) and not cut:
        raise TooLong(f"the clip is {len(wave) / source_rate:.1f} s long, at most {limit:g} s expected")
    return audio.heard(wave[:most], source_rate, rate), long


def seconds(value: Any) -> float:
    """Length of what `decode` takes. Raises BadAudio."""
    value = _stored(value)
    if isinstance(value, bytes | str):
        return audio.seconds(value)
    wave, rate = decode(value)
    return len(wave) / rate


def _stored(value: Any) -> Any:
    """Bytes or path of a dict that has no array."""
    if isinstance(value, dict) and value.get("array") is None:
        return value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value


def decode(value: Any) -> tuple[np.ndarray, int]:
    """([samples, channels] float32, Hz) of a path, an audio file's bytes, the dicts and decoders of `datasets`.

    An array of two dimensions has its channels in the shorter one. Raises BadAudio.
    """
    value = _stored(value)
    if isinstance(value, dict):
        return _array(value["array"], value.get("sampling_rate"))
    if isinstance(value, bytes) or (isinstance(value, str) and Path(value).is_file()):
        sound = audio.read(value)
        return sound.wave, sound.rate
    if hasattr(value, "get_all_samples"):  # torchcodec's decoder
        samples = value.get_all_samples()
        return _array(samples.data, samples.sample_rate)
    raise BadAudio(f"expected sound: a file, its bytes or an array with its sampling rate; found {str(value)[:80]!r}")


def _array(array: Any, rate: Any) -> tuple[np.ndarray, int]:
    wave = np.asarray(array, dtype=np.float32)
    if wave.ndim not in (1, 2) or not isinstance(rate, int | float | np.number) or rate <= 0:
        raise BadAudio(f"expected [samples] or two channels at a sampling rate, found shape {wave.shape} at {rate} Hz")
    if wave.ndim == 2 and wave.shape[0] < wave.shape[1]:
        wave = wave.T
    return wave if wave.ndim == 2 else wave[:, None], int(rate)
