"""Rules of VoiceBench (arXiv 2410.17196, its src/evaluator) that are lists of phrases or checkers.

They are taken from lmms-eval, which ships them, when the first answer is graded: `pip install opd[benchmarks]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, NoReturn

from opd.settings import UserError

NEEDS = {  # match -> what has to be installed
    **dict.fromkeys(("voicebench_mcq", "voicebench_bbh", "voicebench_refusal"), ("lmms_eval",)),
    "ifeval": ("lmms_eval", "langdetect", "immutabledict", "nltk"),
}
TASKS = {  # of Big Bench Hard in VoiceBench -> answers
    "hyperbaton": ("(a)", "(b)"),
    **dict.fromkeys(("navigate", "sports_understanding", "web_of_lies"), ("yes", "no")),
}
LETTERS = "ABCD"
UNDECIDED = "no answer found"
FOUR = ("strict, prompts", "strict, instructions", "loose, prompts", "loose, instructions")


@dataclass(frozen=True)
class Grade:
    """What an answer is worth."""

    score: float | None  # in [0, 1], a bool where there is only right and wrong; None: the judge talked nonsense
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)  # further numbers: numerator, denominator


class _Undecided(Exception):
    """No rule finds an answer in a response."""


def _undecided(_: Any) -> NoReturn:
    """Stands for `random.choice` in the library, which would draw an answer where its rules find none."""
    raise _Undecided


def check_installed(match: str) -> None:
    """Raise UserError unless what a match needs is installed. Imports nothing heavy."""
    for name in NEEDS.get(match, ()):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"match {match}: the module {name} is not installed: pip install opd[benchmarks]")
    if match == "ifeval":
        try:
            importlib.import_module("nltk").data.find("tokenizers/punkt_tab")
        except LookupError as e:
            told = "NLTK's table of sentences is missing: python -m nltk.downloader punkt_tab"
            raise UserError(f"match {match}: {told}") from e


def check_answer(answer: str, match: str, group: str) -> None:
    """Raise ValueError, saying what was expected, unless responses can be graded with this answer."""
    if match == "voicebench_mcq" and answer not in tuple(LETTERS):
        raise ValueError(f"answer: match {match} needs one of the letters A, B, C, D, found {answer!r}")
    if match == "voicebench_bbh":
        if group not in TASKS:
            raise ValueError(f"group: match {match} needs one of {', '.join(TASKS)}, found {group!r}")
        if answer.lower() not in TASKS[group]:
            raise ValueError(f"answer: {group} needs {' or '.join(TASKS[group])}, found {answer!r}")
    if match == "ifeval":
        instructions(answer)
    if match == "rubric":
        criteria(answer)


def criteria(answer: str) -> list[str]:
    """The criteria of a rubric, a JSON list of strings. Raises ValueError for anything else."""
    found = _listed(answer, "rubric", "criteria", lambda one: isinstance(one, str) and one.strip(), ", each a string")
    return [one.strip() for one in found]


def instructions(answer: str) -> list[dict[str, Any]]:
    """The instructions of an IFEval prompt, a JSON list of {"id", "kwargs"}. Raises ValueError for anything else."""

    def whole(one: Any) -> bool:
        return isinstance(one, dict) and isinstance(one.get("id"), str) and isinstance(one.get("kwargs"), dict)

    return _listed(answer, "ifeval", '{"id", "kwargs"}', whole)


def _listed(answer: str, match: str, what: str, whole: Callable[[Any], Any], each: str = "") -> list[Any]:
    expected, told = f"answer: match {match} needs a JSON list of {what}", f", found {answer[:60]!r}"
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{expected}{told} ({e})") from e
    if not isinstance(found, list) or not found or not all(map(whole, found)):
        raise ValueError(f"{expected}{each}{told}")
    return found


def grade(match: str, text: str, answer: str, group: str, question: str) -> Grade:
    """Grade a whole response by a rule of NEEDS. Raises UserError when a library is missing or does not fit."""
    if match == "ifeval":
        return _followed(text, instructions(answer), question)
    if match == "voicebench_refusal":
        return Grade(_voicebench().voicebench_process_results_harm({}, [text])["accuracy"] == 100)
    options = TASKS[group] if match == "voicebench_bbh" else tuple(LETTERS)
    if not any(_says(match, text, group, option) for option in options):
        # VoiceBench draws an option where its rules find none: what that is worth on average, without the draw
        return Grade(1 / len(options), {UNDECIDED: (1.0, 1.0)})
    return Grade(_says(match, text, group, answer), {UNDECIDED: (0.0, 1.0)})


def _says(match: str, text: str, task: str, answer: str) -> bool:
    """Whether VoiceBench's rules read this answer in a response."""
    rule = getattr(_voicebench(), match.replace("voicebench_", "voicebench_process_results_"))
    try:
        return rule({"id": task, "reference": answer}, [text])["accuracy"] == 100
    except _Undecided:
        return False


def _followed(text: str, asked: list[dict[str, Any]], question: str) -> Grade:
    """IFEval (arXiv 2311.07911) as VoiceBench reports it: the mean of strict and loose, of prompts and instructions.

    strict: the response itself. loose: any of it without asterisks, without its first line, its last, or both.
    """
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    loose = [*cut, *(c.replace("*", "") for c in cut)]
    found: list[tuple[float, float]] = []
    for versions in ([text], loose):
        kept = [_keeps(versions, one, question) for one in asked]
        found += [(float(all(kept)), 1.0), (float(sum(kept)), float(len(kept)))]
    return Grade(sum(a / b for a, b in found) / len(found), dict(zip(FOUR, found, strict=True)))


def _keeps(versions: list[str], asked: dict[str, Any], question: str) -> bool:
    checker = _checkers().get(asked["id"])
    if checker is None:
        raise UserError(f"match ifeval: lmms-eval knows no instruction {asked['id']!r}")
    rule = checker(asked["id"])
    rule.build_description(**{k: v for k, v in asked["kwargs"].items() if v})
    if "prompt" in (rule.get_instruction_args() or {}):
        rule.build_description(prompt=question)
    return any(v.strip() and rule.check_following(v) for v in versions)


def rating_prompt() -> str:
    """The prompt by which VoiceBench's judge rates an answer from 1 to 5, with {question} and {response}."""
    return _voicebench().VOICEBENCH_OPEN_JUDGE_PROMPT.replace("{prompt}", "{question}")


def system_message() -> str:
    """The system message of VoiceBench's judge."""
    text = getattr(_voicebench(), "_VOICEBENCH_OPEN_SYSTEM_INSTRUCTION", None)
    if not isinstance(text, str):
        raise UserError("lmms-eval: its VoiceBench has no system message any more: write eval.judge.system yourself")
    return text


@cache
def qa_prompt() -> str:
    """The prompt of VoiceBench's judge for sd-qa, with {question}, {answer} and {response}.

    It is a constant in a function of the library, which would ask a judge if it were called.
    """
    names = {"{prompt}": "{question}", "{reference}": "{answer}", "{response}": "{response}"}
    constants = _voicebench().voicebench_process_results_qa.__code__.co_consts
    found = [c for c in constants if isinstance(c, str) and all(n in c for n in names)]
    if len(found) != 1:
        raise UserError("lmms-eval: its VoiceBench has no prompt for sd-qa any more: write eval.judge.prompt yourself")
    for theirs, ours in names.items():
        found[0] = found[0].replace(theirs, ours)
    return found[0]


@cache
def _voicebench() -> Any:
    module = _loaded("lmms_eval.tasks.voicebench.utils")
    module.random = SimpleNamespace(choice=_undecided)
    return module


@cache
def _checkers() -> dict[str, Any]:
    importlib.import_module("langdetect").DetectorFactory.seed = 0  # it guesses languages by chance
    return _loaded("lmms_eval.tasks.voicebench.instruction_following_eval.instructions_registry").INSTRUCTION_DICT


def _loaded(name: str) -> Any:
    try:
        from unittest.mock import patch

        with patch.dict(os.environ, API_TYPE="dummy"):  # else its client of a judge of its own asks for a key
            return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"{name}: cannot be imported ({e}): pip install opd[benchmarks]") from e
