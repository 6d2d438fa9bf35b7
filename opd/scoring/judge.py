"""Judges: an LLM behind an endpoint that says yes or no, rates, or checks criteria. Imports no torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from string import Formatter
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt

from opd.endpoint import Endpoint, Failed
from opd.scoring.voicebench import Grade, criteria, qa_prompt, rating_prompt, system_message
from opd.types import Prompt, joined, render, transcript

T = TypeVar("T")
SCALE = 5  # of a rating, from 1; VoiceBench's own overall score takes a rating for r / 5
RATED, MET = "rating, 1 to 5", "criteria met"
JUDGED = ("question", "answer", "response")  # what a judge's prompt must hold
JUDGE_PROMPT = """Question: {question}

Reference answer: {answer}

Answer to grade: {response}

Does the answer to grade mean the same as the reference answer? Reply with one word, yes or no."""
# The evaluator's rule of Big Bench Audio (huggingface.co/blog/big-bench-audio-release), in our words.
BIG_BENCH_AUDIO = """Grade an answer to a question against the official answer.

It is right when it agrees with the official answer. Where it reasons first, only what it concludes counts; where it
contradicts itself, the first answer that it gives; what does not belong to the question does not count. Numbers may be
written in digits or in words, and people's names may be spelt otherwise.

For reference, the question: {question}

The official answer: {answer}

The answer to grade: {response}

Is it right? Reply with one word, correct or incorrect."""
PROMPTS = {"default": JUDGE_PROMPT, "big_bench_audio": BIG_BENCH_AUDIO}
VOICEBENCH_QA, VOICEBENCH = "voicebench_qa", "voicebench"  # prompt and system message that lmms-eval has
# The rule of Audio MultiChallenge (arXiv 2512.14865, card of ScaleAI/audiomc), in our words.
RUBRIC_PROMPT = """Below is a conversation and one criterion for its last turn, which is the assistant's.

Conversation:
{conversation}

Criterion: {criterion}

Does the last turn meet the criterion? Reply with one word, yes or no."""


def template(value: str, names: Sequence[str]) -> str:
    """The value, when it has these names in braces and no other. Raises ValueError."""
    try:
        named = {name for _, name, _, _ in Formatter().parse(value) if name is not None}
    except ValueError as e:
        raise ValueError(f"{e}; write {{{{ and }}}} for braces") from e
    if named != set(names):
        *some, last = (f"{{{name}}}" for name in names)
        raise ValueError(f"expected {', '.join(some)} and {last}, and no other name in braces")
    return value


def _judging(value: str) -> str:
    return value if value == VOICEBENCH_QA else template(PROMPTS.get(value, value), JUDGED)


Judging = Annotated[str, AfterValidator(_judging)]
Rating = Annotated[str, AfterValidator(partial(template, names=("question", "response")))]
Checking = Annotated[str, AfterValidator(partial(template, names=("conversation", "criterion")))]


class Judge(Endpoint):
    """An LLM behind an OpenAI-compatible endpoint that says what an answer is worth."""

    prompt: Judging = Field(
        JUDGE_PROMPT,
        description="match judge: big_bench_audio, voicebench_qa (VoiceBench's own, from lmms-eval), or a text with "
        "{question}, {answer} and {response} that asks for yes or no, or correct or incorrect",
    )
    rating_prompt: Rating | None = Field(
        None, description="match rating: with {question} and {response}; none: VoiceBench's own, from lmms-eval"
    )
    rubric_prompt: Checking = Field(
        RUBRIC_PROMPT,
        description="match rubric: with {conversation} and {criterion}; asks for yes or no, or JSON with criteria_met",
    )
    system: str | None = Field(
        None, description="system message before what is asked; voicebench: VoiceBench's own, from lmms-eval"
    )
    max_tokens: PositiveInt = Field(16, description="of the verdict")
    temperature: NonNegativeFloat = Field(0.0, description="of the verdict")
    top_p: float | None = Field(None, gt=0, le=1, description="of the verdict; none: as the endpoint has it")
    samples: PositiveInt = Field(1, description="verdicts on an answer; the majority counts, of ratings the mean")
    concurrency: PositiveInt = Field(16, description="answers judged at a time")

    def needs_lmms_eval(self, match: str) -> bool:
        """Whether what it says for this match is text of lmms-eval's."""
        own = (match == "judge" and self.prompt == VOICEBENCH_QA) or (match == "rating" and self.rating_prompt is None)
        return own or self.system == VOICEBENCH

    def grade(self, prompt: Prompt, text: str, match: str) -> Grade:
        """Grade a response by match judge, rating or rubric. Raises Unavailable when the endpoint is."""
        text = text.strip()
        if match == "rating":
            asked = (self.rating_prompt or rating_prompt()).format(question=asked_last(prompt), response=text)
            found = self._replies(asked, rating_of)
            mean = sum(found) / len(found) if found else None
            return Grade(None if mean is None else mean / SCALE, {} if mean is None else {RATED: (mean, 1.0)})
        if match == "rubric":
            said = f"{transcript(prompt)}\nassistant: {text}"
            wanted = criteria(prompt.answer or "")
            met = [self._majority(self.rubric_prompt.format(conversation=said, criterion=c), met_of) for c in wanted]
            score = None if None in met else all(met)
            return Grade(score, {MET: (sum(m is True for m in met) / len(met), 1.0)})
        assert match == "judge", match
        if self.prompt == VOICEBENCH_QA:
            asked = qa_prompt().format(question=asked_last(prompt), answer=prompt.answer, response=text)
        else:
            asked = self.prompt.format(question=transcript(prompt), answer=prompt.answer, response=text)
        return Grade(self._majority(asked, verdict))

    def _majority(self, asked: str, read: Callable[[str], bool | None]) -> bool | None:
        """What most samples say, no where as many say the one as the other; None where none makes sense."""
        counts = Counter(self._replies(asked, read))
        return counts[True] > counts[False] if counts else None

    def _replies(self, asked: str, read: Callable[[str], T | None]) -> list[T]:
        """The replies that make sense."""
        system = system_message() if self.system == VOICEBENCH else self.system
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": asked})

        def call(client: Any) -> list[str]:
            options: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
            if self.samples > 1:
                options["n"] = self.samples
            if self.top_p is not None:
                options["top_p"] = self.top_p
            answer = client.chat.completions.create(model=self.model, messages=messages, **options)
            return [choice.message.content or "" for choice in answer.choices]

        try:
            return [found for text in self.ask(call) if (found := read(text)) is not None]
        except Failed:
            return []


def worst(prompt: Prompt, match: str) -> Grade:
    """The grade of an answer that never ended."""
    parts = {"rating": {RATED: (0.0, 1.0)}, "rubric": {MET: (0.0, 1.0)}}
    return Grade(False, parts.get(match, {}))


def asked_last(prompt: Prompt) -> str:
    """The words of a prompt's last user turn."""
    last = next((m for m in reversed(render(prompt, "text")) if m["role"] == "user"), {"content": ""})
    return joined(last)["content"]


def verdict(text: str) -> bool | None:
    """Yes or no, correct or incorrect, and nothing else but case, white space and punctuation; None for all else."""
    m = re.fullmatch(r"[\W_]*(yes|no|correct|incorrect)[\W_]*", text, re.IGNORECASE)
    return m[1].lower() in ("yes", "correct") if m else None


def met_of(text: str) -> bool | None:
    """A verdict in one word, or JSON with a boolean criteria_met, also in a block of Markdown; None for all else."""
    block = re.fullmatch(r"\s*(?:```(?:json)?)?\s*(\{.*\})\s*(?:```)?\s*", text, re.DOTALL)
    if block is None:
        return verdict(text)
    try:
        met = json.loads(block[1], strict=False).get("criteria_met")
    except (ValueError, RecursionError):
        return None
    return met if isinstance(met, bool) else None


def rating_of(text: str) -> float | None:
    """A number from 1 to 5, alone or as [[4]]; None for all else."""
    m = re.fullmatch(r"\W*(\d(?:\.\d+)?)\W*", text) or re.search(r"\[\[(\d)\]\]", text)
    return float(m[1]) if m and 1 <= float(m[1]) <= SCALE else None
