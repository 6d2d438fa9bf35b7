"""Stage `speak`: each record's last question, spoken by espeak-ng or an endpoint; its text becomes the transcript."""

from __future__ import annotations

import hashlib
import random
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from opd.data.engine.stage import ClipStore, Drop, Record, Stage, Work, content_id, deciding, last_question
from opd.data.stages import espeak
from opd.endpoint import Endpoint, Failed
from opd.prompts import audio
from opd.settings import UserError
from opd.storage.journal import canonical
from opd.types import BadAudio, TooLong

BLOCK_S = 0.4  # the gating block of EBU R128
CEILING = -1.0  # dB true peak, the most that R128 permits
SOUNDS = "m1", "m3", "m7", "f2", "f4", "f5"
ESPEAK_VOICES = [f"{accent}+{sound}" for accent in ("en-us", "en-gb-x-rp") for sound in SOUNDS]
Whole = Annotated[list[int], Field(min_length=2, max_length=2)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]


class Said(NamedTuple):
    """All that a clip depends on beside the settings."""

    text: str
    voice: str
    rate: int  # words per minute, of espeak-ng
    pitch: int
    speed: float  # of an endpoint


class Speak(Stage):
    """Settings of the stage `speak`."""

    name: ClassVar[str] = "speak"

    endpoint: Endpoint | None = Field(None, description="an OpenAI-compatible /v1/audio/speech; none: espeak-ng")
    voices: list[str] = Field([], description="one is drawn for each record; espeak-ng: LANGUAGE[+VARIANT]")
    seed: int = Field(0, description="of the draws")
    rate: Whole = Field([150, 190], description="espeak-ng: words per minute, from and to")
    pitch: Whole = Field([40, 60], description="espeak-ng: 0 to 99, from and to; 50 is the voice's own")
    speed: Range = Field([1.0, 1.0], description="endpoint: times the voice's own, from and to")
    format: Literal["wav", "flac", "mp3"] = Field("wav", description="endpoint: what it is asked to send")
    extra: dict[str, Any] = Field({}, description="endpoint: more fields of the request")
    sample_rate: int = Field(16000, ge=8000, le=48000, description="Hz, of the clips")
    lufs: float = Field(-23.0, ge=-50, le=-5, description="loudness by EBU R128; softer where the peak would clip")
    min_seconds: NonNegativeFloat = Field(0.3, description="a shorter clip is left out")
    max_seconds: PositiveFloat = Field(30.0, description="a longer clip is left out")

    @model_validator(mode="after")
    def _fits(self) -> Speak:
        foreign = ("rate", "pitch") if self.endpoint else ("speed", "format", "extra")
        if wrong := [name for name in foreign if name in self.model_fields_set]:
            raise ValueError(f"{wrong[0]}: is a setting of {'espeak-ng' if self.endpoint else 'an endpoint'}")
        if self.endpoint and not self.voices:
            raise ValueError("voices: expected the names of voices that the endpoint has, found none")
        limits = {"rate": espeak.RATES, "pitch": espeak.PITCHES, "speed": (0.25, 4)}
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name}: expected [FROM, TO] within {least} and {most}, found [{low}, {high}]")
        return self

    def check(self) -> None:
        """Raises UserError for an endpoint that cannot be one, a voice that espeak-ng lacks, or a missing espeak-ng."""
        super().check()
        if self.endpoint:
            return
        with espeak.Synthesizer() as engine:
            expected = "expected LANGUAGE or LANGUAGE+VARIANT, such as de or en-us+f2"
            if unknown := [voice for voice in self.voices or ESPEAK_VOICES if not engine.has(voice)]:
                raise UserError(f"voices: espeak-ng has no voice {unknown[0]!r}; {expected}")

    def begin(self, store: ClipStore) -> Work:
        """Record whose last question is text -> the same, spoken, with `voice` and `seconds`."""
        # what of the settings is in a clip; ranges, limits and seed are in what was drawn, or leave no trace
        of_engine = ("endpoint", "format", "extra") if self.endpoint else ()
        settings = {k: v for k, v in deciding(self).items() if k in (*of_engine, "sample_rate", "lufs")}
        settings |= {} if self.endpoint else {"espeak": espeak.version()}

        def work(record: Record) -> Record:
            message, text = last_question(record)
            said = self._draw(record, text)
            key = hashlib.sha256(canonical([settings, said])).hexdigest()[:32]
            path = store.make(key, lambda: (self._made(said), self.sample_rate))
            seconds = self._fitting(audio.seconds(path))
            message["content"] = [{"type": "audio", "path": str(path), "transcript": said.text}]
            return record | {"voice": said.voice, "seconds": round(seconds, 3)}

        return work

    def _draw(self, record: Record, text: str) -> Said:
        """The voice by the record, all else by text and voice: one text in one voice is one clip."""
        of = content_id({"id": record["id"], "messages": record["messages"]})
        voice = random.Random(f"{self.seed}/{of}").choice(self.voices or ESPEAK_VOICES)
        rng = random.Random(f"{self.seed}/{voice}/{text}")
        rate, pitch = rng.randint(*self.rate), rng.randint(*self.pitch)
        speed = round(rng.uniform(*self.speed), 2)
        return Said(text, voice, 0, 0, speed) if self.endpoint else Said(text, voice, rate, pitch, 1.0)

    def _made(self, said: Said) -> np.ndarray:
        try:
            wave = self._ask(said, self.endpoint) if self.endpoint else self._synthesize(said)
            self._fitting(len(wave) / self.sample_rate)
            return normalised(wave, self.sample_rate, self.lufs)
        except TooLong as e:
            raise Drop(f"clip too long: {e}") from e
        except BadAudio as e:
            if self.endpoint:
                raise Failed(f"no usable audio: {self.endpoint.url}: {e}") from e
            raise Drop(f"nothing to say: {said.text[:40]!r}") from e

    def _fitting(self, seconds: float) -> float:
        if seconds > self.max_seconds:
            raise Drop(f"clip too long: {seconds:.1f} s")
        if seconds < self.min_seconds:
            raise Drop(f"clip too short: {seconds:.2f} s")
        return seconds

    def _synthesize(self, said: Said) -> np.ndarray:
        with espeak.Synthesizer() as engine:  # a new one, so that a clip does not depend on those before it
            samples, source_rate = engine.say(said.text, said.voice, said.rate, said.pitch).samples, engine.rate
        wave = samples.astype(np.float32) / 32768
        audio.check(wave, source_rate, "espeak-ng")
        return audio.heard(wave[:, None], source_rate, self.sample_rate)

    def _ask(self, said: Said, endpoint: Endpoint) -> np.ndarray:
        asked: dict[str, Any] = {"model": endpoint.model, "voice": said.voice, "input": said.text}
        asked |= {"response_format": self.format, "extra_body": self.extra}
        asked |= {} if said.speed == 1.0 else {"speed": said.speed}
        sent: bytes = endpoint.ask(lambda client: client.audio.speech.create(**asked).content)
        return audio.load(sent, self.sample_rate, self.max_seconds, f"sent {sent[:20]!r}...")


def lufs(wave: np.ndarray, rate: int) -> float:
    """Integrated loudness (EBU R128, ITU-R BS.1770) of [samples] at `rate` Hz in LUFS.

    It is -inf where all is below the gate of -70 LUFS.
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
