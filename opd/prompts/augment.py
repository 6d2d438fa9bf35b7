"""What training hears instead of the clean clip: speed, reverberation, noise, clipping, a telephone line.

A function of seed, record, the clip's place in it and epoch alone: every rank, every resumption and the listening page
hear the same. torch is imported when a clip is changed, not before: the recipe's settings are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from opd.config.schema import AugmentConfig, Effect, Noise
from opd.prompts.audio import SUFFIXES, load, resample
from opd.settings import UserError

PEAK = 0.99  # full scale is left alone: codecs and the sampler's WAV agree below it
TELEPHONE_HZ = (8000, 300.0, 3400.0)  # sampling rate and band of G.711's narrow band
MU_LAW = 256  # its steps


class Augmenter:
    """Changes clips as data.augment says. Raises UserError for a folder of noise that has none."""

    def __init__(self, config: AugmentConfig, seed: int, rate: int) -> None:
        self.config, self.seed, self.rate = config, seed, rate
        self._noises = _recordings(config.noise) if config.noise.share and config.noise.files else []

    def __call__(self, wave: np.ndarray, name: str, epoch: int) -> tuple[np.ndarray, list[str]]:
        """A clip [samples] float32 in [-1, 1] as it is heard in an epoch, and what was done to it, in words.

        `name`: what tells clips apart, such as a record's id and the clip's place in it.
        """
        key = hashlib.sha256(f"{self.seed}/{epoch}/{name}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
        told: list[str] = []
        steps: Sequence[tuple[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray], str]] = (
            ("speed", self._speed, "speed × {:.2f}"),
            ("reverb", self._reverb, "reverberation {:.2f} s"),
            ("noise", self._noise, "noise {:.0f} dB below"),
            ("clipping", self._clipping, "clipped by {:.0f} dB"),
            ("telephone", self._telephone, "telephone"),
        )
        for effect, change, words in steps:
            settings: Effect = getattr(self.config, effect)
            chance, strength = rng.random(), rng.random()  # drawn for each: one effect's share moves no other's
            own = np.random.default_rng(rng.integers(2**63))
            if chance < settings.share:
                low, high = settings.range or (0.0, 0.0)
                value = low + strength * (high - low)
                wave = change(wave, value, own)
                told.append(words.format(value))
        if told and (peak := float(np.abs(wave).max())) > PEAK:
            wave = wave * np.float32(PEAK / peak)
        return np.ascontiguousarray(wave, dtype=np.float32), told

    def _speed(self, wave: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
        # A rate that torchaudio's kernel takes exactly: steps of a hundredth keep its filter small.
        return resample(wave, round(100 * factor), 100)

    def _reverb(self, wave: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
        """The direct sound, then noise that falls by 60 dB in `seconds`: Moorer's (1979) model of a late room response,
        with half of the direct sound's energy."""
        import torch
        from torchaudio.functional import fftconvolve

        t = np.arange(round(seconds * self.rate)) / self.rate
        tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / seconds)
        tail[: max(1, self.rate // 500)] = 0.0  # 2 ms until the first reflection
        tail *= np.sqrt(0.5 / max(1e-12, float((tail**2).sum())))
        tail[0] = 1.0
        room = torch.from_numpy(tail.astype(np.float32))
        return fftconvolve(torch.from_numpy(wave), room).numpy()[: len(wave)]

    def _noise(self, wave: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
        import torch
        from torchaudio.functional import add_noise

        noise = self._recording(len(wave), rng) if self._noises else _pink(len(wave), rng)
        return add_noise(torch.from_numpy(wave), torch.from_numpy(noise), torch.tensor(snr)).numpy()

    def _clipping(self, wave: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
        level = np.float32(np.abs(wave).max() * 10 ** (-decibels / 20))
        return np.clip(wave, -level, level)

    def _telephone(self, wave: np.ndarray, _: float, rng: np.random.Generator) -> np.ndarray:
        import torch
        from torchaudio import functional

        rate, low, high = TELEPHONE_HZ
        narrow = torch.from_numpy(resample(wave, self.rate, rate))
        narrow = functional.lowpass_biquad(functional.highpass_biquad(narrow, rate, low), rate, high).clamp(-1, 1)
        heard = functional.mu_law_decoding(functional.mu_law_encoding(narrow, MU_LAW), MU_LAW)
        back = resample(heard.numpy(), rate, self.rate)[: len(wave)]
        return np.pad(back, (0, len(wave) - len(back)))

    def _recording(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """[length] of a recording of noise, from a random place, repeated where it is too short."""
        noise = load(str(self._noises[rng.integers(len(self._noises))]), self.rate, float("inf"))
        start = int(rng.integers(len(noise)))
        return np.take(noise, np.arange(start, start + length), mode="wrap").astype(np.float32)


def _pink(length: int, rng: np.random.Generator) -> np.ndarray:
    """[length] of noise with as much power in every octave."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0.0
    return np.fft.irfft(spectrum, length).astype(np.float32)


def _recordings(noise: Noise) -> list[Path]:
    folder = Path(noise.files or "")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"data.augment.noise.files {folder}: expected a folder with {', '.join(SUFFIXES)} files")
    return found
