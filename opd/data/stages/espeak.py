"""espeak-ng in memory, through its C interface. The library is GPL-3.0: it comes with the extra `espeak` alone."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd.settings import UserError

RATES = 80, 450  # words per minute that the library takes
PITCHES = 0, 99  # 50 is the voice's own

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
class Utterance:
    """One spoken text."""

    samples: np.ndarray  # [samples] int16 at the synthesizer's rate
    word_starts: tuple[float, ...]  # seconds, one per word


class Synthesizer:
    """What it says depends on its own calls alone.

    The library keeps the phase of its oscillators from one utterance to the next in static variables, so every
    synthesizer loads a copy of its own; and it seeds the breath of a voice by the clock.
    """

    def __init__(self) -> None:
        """Raises UserError where the library is not installed."""
        loader = _loader()
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copy(loader.get_library_path(), f"{folder}/espeak-ng.so")
            self._library = ctypes.CDLL(copy)
        # The data folder compiled into the library is that of its build machine.
        self._data = Path(loader.get_data_path())
        self.rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(self._data).encode(), 0)  # Hz
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start from its data in {self._data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._callback = _Callback(self._receive)  # ctypes keeps no reference of its own
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> Synthesizer:
        return self

    def __exit__(self, *_: object) -> None:
        """Unload the copy, with all that it kept."""
        import _ctypes

        self._library.espeak_Terminate()
        _ctypes.dlclose(self._library._handle)

    def has(self, voice: str) -> bool:
        """Whether there is a voice of this name, such as `de` or, with a variant of its sound, `en-us+f2`."""
        name, plus, variant = voice.partition("+")
        sounds = self._data / "voices" / "!v"
        if plus and variant not in {path.name for path in sounds.iterdir()}:  # the library passes over an unknown one
            return False
        return name[:1] not in ("", "!") and self._library.espeak_SetVoiceByName(voice.encode()) == 0

    def say(self, text: str, voice: str, rate: int, pitch: int) -> Utterance:
        """Speak `text` at `rate` words per minute; `pitch` 0 to 99, 50 is the voice's own. `voice`: one that it has."""
        if not self.has(voice):
            raise ValueError(f"espeak-ng has no voice {voice!r} in {self._data}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, 50)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks: list[np.ndarray] = []
        self._starts: list[float] = []
        raw = text.replace("\0", " ").encode() + b"\0"
        self._library.espeak_Synth(raw, len(raw), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return Utterance(np.concatenate([np.zeros(0, np.int16), *self._chunks]), tuple(self._starts))

    def _receive(self, wave: ctypes._Pointer, samples: int, events: ctypes._Pointer) -> int:
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_WORD:
                self._starts.append(events[i].audio_position / 1000)
            i += 1
        if wave and samples > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, shape=(samples,)).copy())
        return 0


def version() -> str:
    """Of the wheel that carries the library: another one may say a text otherwise."""
    import importlib.metadata

    _loader()
    return importlib.metadata.version("espeakng-loader")


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as e:
        raise UserError(
            "espeak-ng is not installed: pip install 'opd[espeak]' (espeakng-loader, GPL-3.0), or name an endpoint "
            "that speaks"
        ) from e
    return espeakng_loader
