"""Speech of the tiny world: espeak-ng in memory, four voices, and the time at which each word starts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torchaudio.transforms import Resample

from opd.data.stages import espeak

RATE = 16000  # Hz, of everything that leaves this file
MAX_SECONDS = 3.0
VOICES = {"en-us+m1": "man", "en-us+m3": "man", "en-us+f2": "woman", "en-us+f4": "woman"}


@dataclass(frozen=True)
class Clip:
    """One spoken text."""

    wave: np.ndarray  # [samples] float32 at RATE, within [-1, 1]
    word_starts: tuple[float, ...]  # seconds, one per word
    speaker: str  # man | woman

    @property
    def seconds(self) -> float:
        """Length of the utterance."""
        return len(self.wave) / RATE


class Synthesizer:
    """espeak-ng at RATE; what it says depends on its own calls alone."""

    def __init__(self) -> None:
        self._engine = espeak.Synthesizer()
        self._resample = Resample(self._engine.rate, RATE)

    def say(self, text: str, voice: str, rate: int, pitch: int) -> Clip:
        """Speak `text` with one of VOICES at `rate` words per minute; `pitch` 0 to 99, 50 is the voice's own."""
        if voice not in VOICES:
            raise ValueError(f"voice: expected one of {', '.join(VOICES)}, found {voice!r}")
        said = self._engine.say(text, voice, rate, pitch)
        if len(said.word_starts) != len(text.split()):
            raise RuntimeError(
                f"{text!r}: espeak-ng reported {len(said.word_starts)} words, expected {len(text.split())}"
            )
        wave = self._resample(torch.from_numpy(said.samples.astype(np.float32) / 32768)).numpy()
        return Clip(wave, said.word_starts, VOICES[voice])


def speak(synthesizer: Synthesizer, text: str, rng: random.Random) -> Clip:
    """Speak `text` with a voice, rate, pitch, loudness and light noise drawn from `rng`.

    Raises ValueError when the clip is longer than MAX_SECONDS, which is what the tower is trained on.
    """
    voice = rng.choice(list(VOICES))
    clip = synthesizer.say(text, voice, rate=rng.randint(155, 185), pitch=rng.randint(45, 55))
    if clip.seconds > MAX_SECONDS:
        raise ValueError(f"{text!r}: {clip.seconds:.2f} s of speech, at most {MAX_SECONDS} s expected")
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(len(clip.wave), dtype=np.float32)
    wave = clip.wave * np.float32(rng.uniform(0.4, 0.9) / np.abs(clip.wave).max()) + noise * np.float32(
        rng.uniform(0, 0.002)
    )
    return Clip(np.clip(wave, -1, 1), clip.word_starts, clip.speaker)
