"""Loudness by EBU R128, against values that the standard gives."""

from __future__ import annotations

import numpy as np
import pytest

from opd.data.stages.speak import lufs, normalised, true_peak
from opd.types import BadAudio

RATE = 16000


def sine(seconds: float, level: float = 1.0, hertz: float = 997.0, phase: float = 0.0) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE + phase)).astype(np.float32)


@pytest.mark.parametrize("level, expected", [(1.0, -3.01), (0.1, -23.01)])
def test_a_sine_has_the_loudness_of_the_standard(level, expected):
    """BS.1770: 997 Hz at full scale in one channel reads -3.01 LUFS."""
    assert lufs(sine(3, level), RATE) == pytest.approx(expected, abs=0.1)


def test_a_clip_shorter_than_a_block_sounds_as_loud_as_a_long_one():
    assert lufs(sine(0.1, 0.1), RATE) == pytest.approx(lufs(sine(3, 0.1), RATE), abs=0.2)


@pytest.mark.parametrize("seconds", [0.1, 0.399, 0.4, 2.0])
@pytest.mark.parametrize("level", [0.001, 0.9])
def test_clips_are_brought_to_the_target(seconds, level):
    made = normalised(sine(seconds, level), RATE, -23.0)
    assert lufs(made, RATE) == pytest.approx(-23.0, abs=0.1)
    assert made.dtype == np.float32


def test_true_peak_lies_between_samples():
    """A sine at a quarter of the rate, sampled half-way to its peaks: samples at 0.707, peak at 1."""
    wave = sine(1, hertz=RATE / 4, phase=np.pi / 4)
    assert np.abs(wave).max() == pytest.approx(0.7071, abs=1e-3)
    assert true_peak(wave) == pytest.approx(1.0, abs=0.05)


def test_nothing_clips_and_a_peak_keeps_its_clip_soft():
    clicks = sine(2, 0.01)
    clicks[::4000] = 0.5
    made = normalised(clicks, RATE, -14.0)
    assert 20 * np.log10(true_peak(made)) == pytest.approx(-1.0, abs=0.01)
    assert lufs(made, RATE) < -14.5
    assert np.allclose(made / clicks, made[0] / clicks[0] if clicks[0] else made[4000] / clicks[4000], rtol=1e-3)


def test_silence_has_no_loudness():
    with pytest.raises(BadAudio, match="silent"):
        normalised(sine(1, 1e-5), RATE, -23.0)
