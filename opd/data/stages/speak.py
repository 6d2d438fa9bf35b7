"""Stage `speak`: each record's last question, spoken by espeak-ng or an endpoint; its text becomes the transcript."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import soundfile
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from opd.data.engine.clip_store import ClipStore
from opd.data.engine.stage import Drop, Record, Stage, Work, content_id, deciding
from opd.data.stages import espeak
from opd.data.stages.loudness import normalised
from opd.data.stages.turns import last_question
from opd.endpoint import Endpoint, Failed
from opd.prompts.audio import check, load, resample, whole_frames
from opd.settings import UserError
from opd.storage.digests import canonical
from opd.types import BadAudio, TooLong

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

    def pool(self) -> Literal["process", "thread"]:
        return "thread" if self.endpoint else "process"

    def check(self) -> None:
        """Raises UserError for an endpoint that cannot be one, a voice that espeak-ng lacks, or a missing espeak-ng."""
        if self.endpoint:
            self.endpoint.check("endpoint")
            return
        with espeak.Synthesizer() as engine:
            if unknown := [voice for voice in self.voices or ESPEAK_VOICES if not engine.has(voice)]:
                raise UserError(
                    f"voices: espeak-ng has no voice {unknown[0]!r}; expected LANGUAGE or LANGUAGE+VARIANT, such as "
                    "de or en-us+f2"
                )

    def begin(self, store: ClipStore) -> Work:
        """Record whose last question is text -> the same, spoken, with `voice` and `seconds`."""
        voices = self.voices or ESPEAK_VOICES
        speak: Callable[[Said], np.ndarray] = self._ask if self.endpoint else self._synthesize
        settings = self._deciding()

        def work(record: Record) -> Record:
            question = last_question(record)
            said = self._draw(record, question.text, voices)
            key = hashlib.sha256(canonical([settings, said])).hexdigest()[:32]
            path = store.make(key, lambda: (self._made(speak, said), self.sample_rate))
            seconds = self._fitting(soundfile.info(path).duration)
            question.message["content"] = [{"type": "audio", "path": str(path), "transcript": said.text}]
            return record | {"voice": said.voice, "seconds": round(seconds, 3)}

        return work

    def _deciding(self) -> dict[str, Any]:
        """What of the settings is in a clip; ranges, limits and seed are in what was drawn, or leave no trace."""
        of_engine = ("endpoint", "format", "extra") if self.endpoint else ()
        values = {k: v for k, v in deciding(self).items() if k in (*of_engine, "sample_rate", "lufs")}
        return values if self.endpoint else values | {"espeak": espeak.version()}

    def _draw(self, record: Record, text: str, voices: list[str]) -> Said:
        """The voice by the record, all else by text and voice: one text in one voice is one clip."""
        of = content_id({"id": record["id"], "messages": record["messages"]})
        voice = random.Random(f"{self.seed}/{of}").choice(voices)
        rng = random.Random(f"{self.seed}/{voice}/{text}")
        rate, pitch = rng.randint(*self.rate), rng.randint(*self.pitch)
        speed = round(rng.uniform(*self.speed), 2)
        return Said(text, voice, 0, 0, speed) if self.endpoint else Said(text, voice, rate, pitch, 1.0)

    def _made(self, speak: Callable[[Said], np.ndarray], said: Said) -> np.ndarray:
        try:
            wave = speak(said)
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
        check(wave, source_rate, "espeak-ng")
        return whole_frames(resample(wave, source_rate, self.sample_rate), self.sample_rate)

    def _ask(self, said: Said) -> np.ndarray:
        endpoint = self.endpoint
        assert endpoint is not None
        asked: dict[str, Any] = {"model": endpoint.model, "voice": said.voice, "input": said.text}
        asked |= {"response_format": self.format, "extra_body": self.extra}
        asked |= {} if said.speed == 1.0 else {"speed": said.speed}
        sent: bytes = endpoint.ask(lambda client: client.audio.speech.create(**asked).content)
        with tempfile.NamedTemporaryFile(suffix=f".{self.format}") as f:
            f.write(sent)
            f.flush()
            try:
                return load(f.name, self.sample_rate, self.max_seconds)
            except BadAudio as e:
                raise type(e)(str(e).replace(f.name, f"sent {sent[:20]!r}...")) from e
