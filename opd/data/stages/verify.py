"""Stage `verify`: does a speech recogniser hear what each clip is said to say?"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

import numpy as np
import regex
from pydantic import Field, NonNegativeFloat

from opd.data.engine.stage import ClipStore, Drop, Record, Stage, Work, audio_parts
from opd.endpoint import Endpoint, Failed
from opd.prompts.audio import load
from opd.settings import UserError, first_line, read_text
from opd.types import BadAudio

RATE = 16000  # Hz
WINDOW_S = 30  # of Whisper, which needs its own time stamps to go on behind it
Hear = Callable[[str, np.ndarray], str]  # path and samples at RATE -> text


class Verify(Stage):
    """Settings of the stage `verify`."""

    name: ClassVar[str] = "verify"
    workers: ClassVar[Literal["process", "thread"]] = "thread"
    elsewhere: ClassVar[tuple[str, ...]] = ("device",)
    files: ClassVar[tuple[str, ...]] = ("asr", "spellings")

    asr: Endpoint | str = Field(description="{url, model} of a /v1/audio/transcriptions; or a model's folder or Hub id")
    language: str | None = Field(None, description="ISO 639-1 code, told to the recogniser; none: it finds out")
    extra: dict[str, Any] = Field({}, description="endpoint: more fields of the request")
    device: str | None = Field(None, description="of a model that runs here, such as cuda:1; none: a GPU if any")
    normalizer: Literal["english", "basic", "characters"] = Field(
        "english", description="Whisper's, before words are compared; characters: for scripts without spaces"
    )
    spellings: str | None = Field(
        None, description="a Whisper checkpoint's normalizer.json, for British and American spelling alike"
    )
    max_wer: NonNegativeFloat = Field(0.05, description="word error rate above which a record is left out")

    def check(self) -> None:
        """Raises UserError for an endpoint that cannot be one, a missing model, or an unreadable list of spellings."""
        super().check()
        if isinstance(self.asr, str):
            folder, named = Path(self.asr), self.asr.count("/") == 1 and not self.asr.startswith((".", "/"))
            if self.extra:
                raise UserError("extra: is a setting of an endpoint, asr names a model")
            if not folder.is_dir() and not named:
                raise UserError(f"asr: expected {{url, model}}, a folder or OWNER/NAME on the Hub, found {self.asr!r}")
            if (folder / "config.json").is_file() and not list(folder.glob("*.safetensors")):
                told = "expected weights as *.safetensors, found none; pickled ones are not loaded"
                raise UserError(f"asr {self.asr}: {told}")
        _spellings(self.spellings)

    def begin(self, store: ClipStore) -> Work:
        """Record -> the same with `wer`, `heard` (a line for each clip) and `weight`, 1 - WER."""
        import jiwer

        asr = self.asr
        hear, spellings = self._asked(asr) if isinstance(asr, Endpoint) else _local(asr, self.device, self.language)
        normalize = normalizer(self.normalizer, _spellings(self.spellings) or spellings)

        def work(record: Record) -> Record:
            said, heard = [], []
            for part in audio_parts(record):
                try:
                    wave = load(part["path"], RATE, math.inf)
                except BadAudio as e:
                    raise Drop(f"unusable audio: {e}") from e
                said.append(part["transcript"])
                heard.append(" ".join(hear(part["path"], wave).split()))
            if not said:
                raise Drop("no audio")
            words = [normalize(text).strip() for text in said]
            if not all(words):
                raise Drop(f"no words in the transcript: {said[words.index('')]!r}")
            wer = float(jiwer.wer(words, [normalize(text).strip() for text in heard]))
            if wer > self.max_wer:
                raise Drop(f"misheard: WER {wer:.2f}, {heard[0][:60]!r} for {said[0][:60]!r}")
            return record | {"wer": round(wer, 4), "heard": "\n".join(heard), "weight": round(max(0.0, 1 - wer), 4)}

        return work

    def _asked(self, endpoint: Endpoint) -> tuple[Hear, dict[str, str]]:
        told: dict[str, Any] = {"model": endpoint.model, "response_format": "json", "temperature": 0.0}
        told |= {"extra_body": self.extra} | ({"language": self.language} if self.language else {})

        def hear(path: str, wave: np.ndarray) -> str:
            file = Path(path).name, Path(path).read_bytes()
            text = endpoint.ask(lambda client: client.audio.transcriptions.create(file=file, **told).text)
            if not isinstance(text, str):
                raise Failed(f"no transcription: {endpoint.url}: expected text, found {str(text)[:60]!r}")
            return text

        return hear, {}


def normalizer(kind: str, spellings: dict[str, str]) -> Callable[[str], str]:
    """Whisper's normaliser; but marks such as vowel signs stay, as letters: Whisper's takes दिन and दान for one word.

    Of Latin letters those that Unicode composes stay, and in English none.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    english = kind == "english"
    whisper = EnglishTextNormalizer(spellings) if english else BasicTextNormalizer(split_letters=kind == "characters")
    base = r"[\p{L}--\p{Latin}]" if english else r"\p{L}"
    marks = regex.compile(rf"(?V1)(?<={base}\p{{M}}*)[\p{{M}}--\p{{Default_Ignorable_Code_Point}}]")

    def normalize(text: str) -> str:  # marks to letters of the private plane, which no rule touches
        text = unicodedata.normalize("NFD" if english else "NFKC", text)
        return whisper(marks.sub(lambda m: chr(0xF0000 + ord(m[0]) % 0xFFFE), text))

    return normalize


def _local(model: str, device: str | None, language: str | None) -> tuple[Hear, dict[str, str]]:
    """A transformers pipeline, one clip at a time, and the spellings that its tokenizer knows."""
    import torch
    from transformers import pipeline

    try:
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        more: dict[str, Any] = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
        recogniser = pipeline("automatic-speech-recognition", model=model, device=where, **more)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise UserError(f"asr {model}: cannot be loaded as a speech recogniser: {first_line(e)[:300]}") from e
    try:
        recogniser({"raw": np.zeros(RATE // 2, dtype=np.float32), "sampling_rate": RATE})
    except Exception as e:  # a model that hears and does something else fails in ways of its own
        raise UserError(f"asr {model}: is no speech recogniser: {type(e).__name__}: {str(e)[:200]}") from e
    whisper = recogniser.type == "seq2seq_whisper"
    generate: dict[str, Any] = {"num_beams": 1}  # the pipeline's own five take as many times as long
    if whisper and language and getattr(recogniser.model.generation_config, "is_multilingual", False):
        generate |= {"language": language, "task": "transcribe"}
    told = {"generate_kwargs": generate} if recogniser.type.startswith("seq2seq") else {}
    turn = Lock()

    def hear(path: str, wave: np.ndarray) -> str:
        more = {"return_timestamps": True} if whisper and len(wave) > WINDOW_S * RATE else {}
        with turn:
            return recogniser({"raw": wave, "sampling_rate": RATE}, **told, **more)["text"]

    return hear, getattr(recogniser.tokenizer, "english_spelling_normalizer", None) or {}


def _spellings(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as e:
        raise UserError(f"spellings {path}: expected a JSON file: {e}") from e
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UserError(f"spellings {path}: expected an object of words, found {type(found).__name__}")
    return found
