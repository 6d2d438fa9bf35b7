"""Grades the answers of an evaluation as its records and settings say, by rules or by a judge. Imports no torch.

A judge is an LLM behind an endpoint that says yes or no, rates, or checks criteria.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import compress
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt

from opd.endpoint import Endpoint, Failed
from opd.scoring import voicebench as official
from opd.scoring.answers import NO_ANSWER, check_answer, correct
from opd.scoring.voicebench import FOUR, Grade, criteria, instructions, qa_prompt, rating_prompt, system_message
from opd.settings import Section, T, UserError
from opd.types import Match, Prompt, joined, render, transcript

SCALE = 5  # of a rating, from 1; VoiceBench's own overall score takes a rating for r / 5
RATED, MET = "rating, 1 to 5", "criteria met"
PROMPTS = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
VOICEBENCH_QA, VOICEBENCH = "voicebench_qa", "voicebench"  # prompt and system message that lmms-eval has


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
    names = ("question", "answer", "response")
    return value if value == VOICEBENCH_QA else template(PROMPTS["judge"].get(value, value), names)


Judging = Annotated[str, AfterValidator(_judging)]
Rating = Annotated[str, AfterValidator(partial(template, names=("question", "response")))]
Checking = Annotated[str, AfterValidator(partial(template, names=("conversation", "criterion")))]


class Judge(Endpoint):
    """An LLM behind an OpenAI-compatible endpoint that says what an answer is worth."""

    prompt: Judging = Field(
        PROMPTS["judge"]["default"],
        description="match judge: big_bench_audio, voicebench_qa (VoiceBench's own, from lmms-eval), or a text with "
        "{question}, {answer} and {response} that asks for yes or no, or correct or incorrect",
    )
    rating_prompt: Rating | None = Field(
        None, description="match rating: with {question} and {response}; none: VoiceBench's own, from lmms-eval"
    )
    rubric_prompt: Checking = Field(
        PROMPTS["rubric"],
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
            if not found:
                return Grade(None)
            mean = sum(found) / len(found)
            return Grade(mean / SCALE, {RATED: (mean, 1.0)})
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
            options |= {"n": self.samples} if self.samples > 1 else {}
            options |= {} if self.top_p is None else {"top_p": self.top_p}
            answer = client.chat.completions.create(model=self.model, messages=messages, **options)
            return [choice.message.content or "" for choice in answer.choices]

        try:
            return [found for text in self.ask(call) if (found := read(text)) is not None]
        except Failed:
            return []


def worst(match: str, answer: str) -> Grade:
    """The grade of an answer that never ended."""
    if match == "ifeval":
        count = float(len(instructions(answer)))
        return Grade(0.0, dict(zip(FOUR, [(0.0, 1.0), (0.0, count)] * 2, strict=True)))
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


JUDGED = ("judge", "rating", "rubric")


class ScoringConfig(Section):
    """How answers are compared, where the records do not say it or all are to be compared alike."""

    match: Match | None = Field(None, description="of all answers; none: as each record says")
    tolerance: NonNegativeFloat | None = Field(None, description="number: greatest difference, where a record has none")
    judge: Judge | None = Field(None, description="grades answers whose match is judge, rating or rubric")


class Scorer:
    """Grades answers."""

    def __init__(self, config: ScoringConfig) -> None:
        self.match, self.tolerance, self.judge = config.match, config.tolerance, config.judge

    def check(self, prompts: Sequence[Prompt], where: str = "eval") -> None:
        """Raise UserError, naming the record, unless every answer can be compared; of an endpoint, see its `check`."""
        for p in prompts:
            match = self._match(p)
            if p.answer is None and match not in NO_ANSWER:
                raise UserError(f"{where}: {p.place}: an evaluation needs an `answer`, the record has none")
            try:
                check_answer(p.answer, match, p.choices, p.group)
            except ValueError as e:
                raise UserError(f"{where}: {p.place}: {e}") from e
            if match in JUDGED and self.judge is None:
                raise UserError(f"{where}: {p.place}: match {match} needs eval.judge with url and model, found none")
        for match in {self._match(p) for p in prompts}:
            official.check_installed(match)
            if match in JUDGED and self.judge is not None and self.judge.needs_lmms_eval(match):
                official.check_installed("voicebench_mcq")
        if self.judge is not None:
            self.judge.check("eval.judge")

    def grade(self, answers: Sequence[tuple[Prompt, str, bool]]) -> list[Grade]:
        """What each answer, of (prompt, text, whether the length limit cut it off), is worth.

        An answer that never ended is worth nothing whatever it says. Raises Unavailable when the judge is, and
        UserError for a library that is missing.
        """
        asked = [not cut and self._match(p) in JUDGED for p, _, cut in answers]
        with ThreadPoolExecutor(self.judge.concurrency if self.judge else 1) as pool:
            verdicts = pool.map(self._judged, compress(answers, asked))
            return [next(verdicts) if one else self._own(*answer) for one, answer in zip(asked, answers, strict=True)]

    def _match(self, prompt: Prompt) -> str:
        return self.match or prompt.match

    def _own(self, prompt: Prompt, text: str, cut: bool) -> Grade:
        match, answer = self._match(prompt), prompt.answer or ""
        if cut:
            return worst(match, answer)
        if match in official.NEEDS:
            return official.grade(match, text, answer, prompt.group, asked_last(prompt))
        return Grade(correct(prompt, text, self.match, self.tolerance))

    def _judged(self, given: tuple[Prompt, str, bool]) -> Grade:
        assert self.judge is not None, "check() refuses records that need a judge without one"
        return self.judge.grade(given[0], given[1], self._match(given[0]))
