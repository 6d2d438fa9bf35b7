"""Loudness of speech by EBU R128 (ITU-R BS.1770): measured by pyloudnorm, limited in true peak."""

from __future__ import annotations

import numpy as np

from opd.types import BadAudio

BLOCK_S = 0.4  # the standard's gating block
CEILING = -1.0  # dB true peak, the most that R128 permits


def lufs(wave: np.ndarray, rate: int) -> float:
    """Integrated loudness of [samples] at `rate` Hz in LUFS; -inf where all of it is below the gate of -70 LUFS.

    A clip shorter than one block is measured as if it were repeated until it fills one: silence behind it would make
    it look softer than it sounds.
    """
    from pyloudnorm import Meter

    block = int(np.ceil(BLOCK_S * rate))
    return float(Meter(rate).integrated_loudness(np.resize(wave, max(len(wave), block)).astype(np.float64)))


def true_peak(wave: np.ndarray) -> float:
    """Peak of the continuous signal behind [samples], at four times their rate (BS.1770 Annex 2)."""
    from scipy.signal import resample_poly

    return float(max(np.abs(wave).max(), np.abs(resample_poly(wave.astype(np.float64), 4, 1)).max()))


def normalised(wave: np.ndarray, rate: int, target: float) -> np.ndarray:
    """[samples] float32 brought to `target` LUFS by one gain.

    The gain is lower where the true peak would pass CEILING: the clip is then softer than the target, but nothing of it
    is bent. Raises BadAudio when there is no loudness to measure.
    """
    loudness = lufs(wave, rate)
    if not np.isfinite(loudness):
        raise BadAudio("silent: nothing above -70 LUFS")
    gain = min(10 ** ((target - loudness) / 20), 10 ** (CEILING / 20) / true_peak(wave))
    return (wave * gain).astype(np.float32)
