"""Whether an answer is right: exact, regular expression, multiple choice, number, or a judge. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from string import Formatter, ascii_uppercase
from typing import Any, get_args

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from opd.data.endpoint import Endpoint
from opd.data.errors import Failed
from opd.settings import Section, UserError
from opd.types import Match, Prompt
from opd.views import transcript

MATCHES: tuple[str, ...] = get_args(Match)
HAIR = 1e-9  # of rounding, relative, on top of a tolerance
JUDGED = ("question", "answer", "response")  # what a judge's prompt must hold
JUDGE_PROMPT = """Question: {question}

Reference answer: {answer}

Answer to grade: {response}

Does the answer to grade mean the same as the reference answer? Reply with one word, yes or no."""


class Judge(Endpoint):
    """An LLM behind an OpenAI-compatible endpoint that says whether an answer is right."""

    prompt: str = Field(JUDGE_PROMPT, description="with {question}, {answer} and {response}; must ask for yes or no")
    max_tokens: PositiveInt = Field(16, description="of the verdict")
    concurrency: PositiveInt = Field(16, description="answers judged at a time")

    @field_validator("prompt")
    @classmethod
    def _whole(cls, value: str) -> str:
        try:
            named = {name for _, name, _, _ in Formatter().parse(value) if name is not None}
        except ValueError as e:
            raise ValueError(f"{e}; write {{{{ and }}}} for braces") from e
        if named != set(JUDGED):
            raise ValueError("expected {question}, {answer} and {response}, and no other name in braces")
        return value


class ScoringConfig(Section):
    """How answers are compared, where the records do not say it or all are to be compared alike."""

    match: Match | None = Field(None, description="of all answers; none: as each record says")
    tolerance: NonNegativeFloat | None = Field(None, description="number: greatest difference, where a record has none")
    judge: Judge | None = Field(None, description="grades answers whose match is judge")


class Scorer:
    """Grades answers."""

    def __init__(self, config: ScoringConfig) -> None:
        self.match, self.tolerance, self.judge = config.match, config.tolerance, config.judge

    def check(self, prompts: Sequence[Prompt], where: str = "eval") -> None:
        """Raise UserError, naming the record, unless every answer can be compared; of an endpoint, see its `check`."""
        for p in prompts:
            if p.answer is None:
                raise UserError(f"{where}: {p.place}: an evaluation needs an `answer`, the record has none")
            try:
                check_answer(p.answer, self._match(p), p.choices)
            except ValueError as e:
                raise UserError(f"{where}: {p.place}: {e}") from e
            if self._match(p) == "judge" and self.judge is None:
                raise UserError(f"{where}: {p.place}: match judge needs eval.judge with url and model, found none")
        if self.judge is not None:
            self.judge.check("eval.judge")

    def grade(self, answers: Sequence[tuple[Prompt, str, bool]]) -> list[bool | None]:
        """Of (prompt, text, whether the length limit cut it off), which are right; None where the judge talks nonsense.

        An answer that never ended is wrong whatever it says. Raises Unavailable when the judge is.
        """
        judged = [i for i, (p, _, cut) in enumerate(answers) if not cut and self._match(p) == "judge"]
        right: list[bool | None] = [
            not cut and self._match(p) != "judge" and correct(p, text, self.match, self.tolerance)
            for p, text, cut in answers
        ]
        if judged:
            assert self.judge is not None, "check() refuses records that need a judge without one"
            with ThreadPoolExecutor(self.judge.concurrency) as pool:
                verdicts = list(pool.map(self._verdict, [answers[i] for i in judged]))
            for i, found in zip(judged, verdicts, strict=True):
                right[i] = found
        return right

    def _match(self, prompt: Prompt) -> str:
        return self.match or prompt.match

    def _verdict(self, given: tuple[Prompt, str, bool]) -> bool | None:
        prompt, text, _ = given
        assert self.judge is not None
        judge = self.judge
        asked = judge.prompt.format(question=transcript(prompt), answer=prompt.answer, response=text.strip())

        def call(client: Any) -> bool | None:
            message = [{"role": "user", "content": asked}]
            options: dict[str, Any] = {"temperature": 0.0, "max_tokens": judge.max_tokens}
            answer = client.chat.completions.create(model=judge.model, messages=message, **options)
            return verdict(answer.choices[0].message.content or "")

        try:
            return judge.ask(call)
        except Failed:
            return None


def correct(prompt: Prompt, text: str, match: Match | None = None, tolerance: float | None = None) -> bool:
    """Whether a whole response gives the prompt's answer, compared as `match` or else the record says; no judge.

    exact: equal after trimming white space. regex: `re.fullmatch` of the trimmed response. choice: `choice_of`.
    number: `number_of`, at most the tolerance away from the answer's (the record's own, else the given, else 0).
    """
    if prompt.answer is None:
        return False
    kind = match or prompt.match
    if kind == "regex":
        return re.fullmatch(prompt.answer, text.strip()) is not None
    if kind == "choice":
        return choice_of(text, prompt.choices) == key_of(prompt.answer, prompt.choices)
    if kind == "number":
        found, wanted = number_of(text), number_of(prompt.answer)
        assert wanted is not None, "check_answer refuses an answer without a number"
        allowed = (prompt.tolerance if prompt.tolerance is not None else tolerance) or 0.0
        return found is not None and abs(found - wanted) <= allowed + HAIR * max(1.0, abs(wanted))
    assert kind == "exact", kind
    return text.strip() == prompt.answer.strip()


def check_answer(answer: str, match: str, choices: Sequence[str]) -> None:
    """Raise ValueError, saying what was expected, unless answers can be compared with this one."""
    if match == "regex":
        try:
            re.compile(answer)
        except re.error as e:
            raise ValueError(f"answer: expected a regular expression, found {answer!r} ({e})") from e
    elif match == "number" and number_of(answer) is None:
        raise ValueError(f"answer: match number needs one with a number in digits, found {answer!r}")
    elif match == "choice":
        if len(choices) == 1 or len(choices) > len(ascii_uppercase):
            raise ValueError(f"choices: expected 2 to {len(ascii_uppercase)} options, found {len(choices)}")
        if len({_plain(c) for c in choices}) < len(choices) or not all(map(_plain, choices)):
            raise ValueError("choices: expected options that differ in their words")
        if key_of(answer, choices) is None:
            expected = f"one of {', '.join(map(repr, choices))}, or its letter" if choices else "a letter"
            raise ValueError(f"answer: match choice needs {expected}, found {answer!r}")


# ---- multiple choice ------------------------------------------------------------------------------------------------

ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
# "the answer is (B)", "option b", "I choose B."
NAMED = re.compile(
    r"\b(?P<by>answer|option|choice|choose|pick|select|go with|going with)\b(?: (?:is|would be|must be|should be))?"
    r"(?: (?P<as>option|choice|letter|answer))?\s*[:=]?\s*[*\"'“‘(\[]*(?P<letter>[A-Z])\b(?!['’])",
    re.IGNORECASE,
)
CLOSED = re.compile(r"[*\"'”’]*([).\]:,;!?]|\s*$)")
LABEL = re.compile(r"[\W_]*([A-Za-z])[*_]*[).:\]]")
LETTER = re.compile(r"(?<![\w'’])([B-HJ-Z])(?![\w'’])")  # A and I are words of English


def key_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of a gold answer that is a letter ("B", "(b)") or the text of an option; None for anything else."""
    texts = [_plain(c) for c in choices]
    if _plain(answer) in texts:
        return ascii_uppercase[texts.index(_plain(answer))]
    alone = ALONE.fullmatch(answer.strip())
    return alone[1].upper() if alone and alone[1].upper() in _letters(choices) else None


def choice_of(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that a response chooses; None when it chooses none, or leaves open which.

    The first that applies:
    1. the response is a letter and no more: "B", "(b).", "**B**"
    2. it names a letter, and the last one counts: "the answer is B", "option b", "I choose (B)"
    3. it begins with a letter as a label: "B. Paris", "b) Paris"
    4. it holds the words of exactly one option; of options within one another the longest
    5. it holds exactly one capital letter by itself that is no English word, as A and I are

    Letters count only as far as there are options, when `choices` gives them.
    """
    letters = _letters(choices)
    text = text.strip()
    if (m := ALONE.fullmatch(text)) and m[1].upper() in letters:
        return m[1].upper()
    named = [m["letter"].upper() for m in NAMED.finditer(text) if _is_label(m)]
    named = [letter for letter in named if letter in letters]
    if named:
        return named[-1]
    if (m := LABEL.match(text)) and m[1].upper() in letters:
        return m[1].upper()
    told = _mentioned(text, choices)
    if len(told) == 1:
        return told.pop()
    alone = {m[1] for m in LETTER.finditer(text)} & set(letters)
    return alone.pop() if len(alone) == 1 and not told else None


def _is_label(m: re.Match[str]) -> bool:
    """Whether a match of NAMED means its letter: in "the answer is a dog" and "the answer is I think" it does not."""
    if CLOSED.match(m.string, m.end()) or m["letter"].isupper() and m["letter"] != "I":
        return True
    return (m["as"] or m["by"]).lower() in ("option", "choice", "letter") and m["letter"] not in "aI"


def _mentioned(text: str, choices: Sequence[str]) -> set[str]:
    """Letters of the options whose words are in the text, where no longer option's words have them."""
    left, found = f" {_plain(text)} ", set()
    order = sorted(range(len(choices)), key=lambda i: -len(_plain(choices[i])))
    for i in order:
        words = f" {_plain(choices[i])} "
        if words in left:
            found.add(ascii_uppercase[i])
            left = left.replace(words, " | ")
    return found


def _letters(choices: Sequence[str]) -> str:
    return ascii_uppercase[: len(choices)] if choices else ascii_uppercase


def _plain(text: str) -> str:
    """Words and numbers in small letters, one space between."""
    return " ".join(re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", text.casefold().replace("’", "'").replace("'", "")))


# ---- numbers --------------------------------------------------------------------------------------------------------

SIGNED = r"(?:(?<![\w.,)])[-+])?"
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
NUMBER = re.compile(rf"({SIGNED}(?:\$\s?)?(?:{DIGITS}))(?:\s?/\s?(\d+(?:\.\d+)?))?")


def number_of(text: str) -> float | None:
    """The last number of a text, in digits: 1,234.5, -3, $7, 2e-5, 3/4, 12 of "12%"; None without one.

    Numbers in words are not read. A hyphen after a word or a digit is no sign: the last number of "10-12" is 12.
    """
    found = None
    for m in NUMBER.finditer(text.replace("\u2212", "-")):
        value = float(re.sub(r"[,$\s]", "", m[1]))
        if m[2] is not None and float(m[2]) != 0:
            value /= float(m[2])
        if math.isfinite(value):
            found = value
    return found


# ---- judge ----------------------------------------------------------------------------------------------------------


def verdict(text: str) -> bool | None:
    """A judge's word: yes or no and nothing else but case, white space and punctuation; None for all else."""
    m = re.fullmatch(r"[\W_]*(yes|no)[\W_]*", text, re.IGNORECASE)
    return m[1].lower() == "yes" if m else None
