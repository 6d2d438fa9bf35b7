"""Speech of the tiny world: espeak-ng in memory, four voices, and the time at which each word starts."""

from __future__ import annotations

import ctypes
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
import torch
from torchaudio.transforms import Resample

RATE = 16000  # Hz, of everything that leaves this file
MAX_SECONDS = 3.0
VOICES = {"en-us+m1": "man", "en-us+m3": "man", "en-us+f2": "woman", "en-us+f4": "woman"}

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS, _UTF8 = 2, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_EVENT_END, _EVENT_WORD = 0, 1


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


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
    """espeak-ng, driven through its C interface.

    What it says depends on its own calls alone. The library keeps the phase of its oscillators from one utterance to
    the next in static variables, so every synthesizer loads a copy of its own; and it seeds the breath of a voice by
    the clock.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(espeakng_loader.get_library_path(), Path(folder) / "espeak-ng.so")
            self._library = ctypes.CDLL(copy)
        # The data folder compiled into the library is that of its build machine.
        data = espeakng_loader.get_data_path().encode()
        self._source_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self._source_rate <= 0:
            raise RuntimeError(f"espeak-ng did not start from its data in {data.decode()}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._callback = _Callback(self._receive)  # ctypes keeps no reference of its own
        self._library.espeak_SetSynthCallback(self._callback)
        self._resample = Resample(self._source_rate, RATE)

    def say(self, text: str, voice: str, rate: int, pitch: int) -> Clip:
        """Speak `text` with one of VOICES at `rate` words per minute; `pitch` 0 to 99, 50 is the voice's own."""
        if voice not in VOICES:
            raise ValueError(f"voice: expected one of {', '.join(VOICES)}, found {voice!r}")
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r} in {espeakng_loader.get_data_path()}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, 50)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks: list[np.ndarray] = []
        self._starts: list[float] = []
        raw = text.encode() + b"\0"
        self._library.espeak_Synth(raw, len(raw), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        if len(self._starts) != len(text.split()):
            raise RuntimeError(f"{text!r}: espeak-ng reported {len(self._starts)} words, expected {len(text.split())}")
        wave = self._resample(torch.from_numpy(np.concatenate(self._chunks).astype(np.float32) / 32768)).numpy()
        return Clip(wave, tuple(self._starts), VOICES[voice])

    def _receive(self, wave: ctypes._Pointer, samples: int, events: ctypes._Pointer) -> int:
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_WORD:
                self._starts.append(events[i].audio_position / 1000)
            i += 1
        if wave and samples > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, shape=(samples,)).copy())
        return 0


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
