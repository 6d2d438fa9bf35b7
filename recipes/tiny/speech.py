"""Real speech by espeak-ng, driven in memory through ctypes. GPL-3.0 library: only this recipe needs it."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass

import numpy as np

RATE = 16000
VOICES = {"en-us+m1": "man", "en-us+m3": "man", "en-us+f2": "woman", "en-us+f4": "woman"}

_SYNCHRONOUS, _WORD_EVENT, _END = 2, 1, 0
_SPEED, _PITCH = 1, 3  # parameters of espeak_SetParameter


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


@dataclass(frozen=True)
class Utterance:
    """`wave` [samples] mono float32 at 16 kHz; `starts`: where each word begins, in seconds; `speaker`: man or woman."""

    wave: np.ndarray
    starts: list[float]
    speaker: str


class Synthesizer:
    """One espeak-ng instance; there can be only one per process."""

    def __init__(self) -> None:
        import espeakng_loader
        import torchaudio

        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        # the built-in data path does not exist in a wheel: hand over the packaged one
        self._rate = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if self._rate <= 0:
            raise RuntimeError("espeak-ng did not start: its data files were not found")
        self._resample = torchaudio.transforms.Resample(self._rate, RATE)
        self._pieces: list[np.ndarray] = []
        self._starts: list[float] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = kind(self._receive)  # kept: C holds only a pointer to it
        self._lib.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, r: random.Random) -> Utterance:
        """Speak with a random voice, rate, pitch, loudness and a little noise."""
        import torch

        voice = r.choice(list(VOICES))
        raw = self._synthesize(text, voice, r.randint(155, 185), r.randint(45, 55))
        wave = self._resample(torch.from_numpy(raw)).numpy()
        wave = wave / (np.abs(wave).max() + 1e-5) * r.uniform(0.4, 0.9)
        noise = np.random.default_rng(r.getrandbits(32)).standard_normal(len(wave)) * r.uniform(0, 0.002)
        return Utterance((wave + noise).astype(np.float32), list(self._starts), VOICES[voice])

    def _synthesize(self, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        self._pieces, self._starts = [], []
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice}")
        self._lib.espeak_SetParameter(_SPEED, speed, 0)
        self._lib.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self._lib.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        self._lib.espeak_Synchronize()
        return np.concatenate(self._pieces).astype(np.float32) / 32768

    def _receive(self, samples, count, events) -> int:  # type: ignore[no-untyped-def] - called from C
        i = 0
        while events and events[i].type != _END:
            if events[i].type == _WORD_EVENT:
                self._starts.append(events[i].audio_position / 1000)
            i += 1
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0
