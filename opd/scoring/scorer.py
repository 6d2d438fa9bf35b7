"""Grades the answers of an evaluation as its records and settings say. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress

from pydantic import Field, NonNegativeFloat

from opd.scoring import voicebench as official
from opd.scoring.answers import NO_ANSWER, check_answer, correct
from opd.scoring.judge import Judge, asked_last, worst
from opd.scoring.voicebench import Grade
from opd.settings import Section, UserError
from opd.types import Match, Prompt

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
