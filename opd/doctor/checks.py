"""What a check of a recipe is, and what checks find out for each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.settings import UserError
from opd.types import Prompt, Rollout

if TYPE_CHECKING:
    from opd.doctor.probe import PlainStudent
    from opd.models.base import Family  # needs torch

# Facts that a check finds out and keeps: by which. Whoever reads one before is skipped.
FOUND_BY = {"student": "student", "family": "student", "teacher": "teacher", "tokenizer": "tokenizers"}
FOUND_BY |= {"asked": "student server", "probe": "prompt ids", "rollouts": "prompt ids"}


class Warned(str):
    """What a check found, where it is allowed and yet worth a look."""


class Skip(Exception):
    """A check has nothing to do for this recipe: why."""


class Facts:
    """A recipe and what is known of it so far. A check reads what those that it needs have put here."""

    student: str  # checkpoint folder or hub id
    family: Family
    teacher: str
    tokenizer: Any  # the teacher's
    asked: Config  # the recipe as the server is asked: its URL, short responses
    probe: PlainStudent
    rollouts: list[Rollout]

    def __init__(self, config: Config, stack: ExitStack | None = None) -> None:
        """stack: of what has to be stopped at the end."""
        self.config, self.stack = config, stack or ExitStack()
        self.teacher_ids: int | None = None  # the teacher's vocabulary; None: there is none, or it is the student
        self.routes: dict[str, Facts] = {}  # with teacher.kind routed: the same for each teacher
        self.max_model_len: int | None = None  # of the student's servers; None: there are none
        self.prompts: dict[str, list[Prompt]] = {}  # setting -> good records of its manifest
        self.bad: dict[str, list[dict[str, str]]] = {}  # setting -> bad ones
        self.clips: dict[str, np.ndarray] = {}  # audio path -> waveform, of `records`
        self.records: list[Prompt] = []  # a few training records whose clips are good

    if not TYPE_CHECKING:  # else every name would be a fact

        def __getattr__(self, name: str) -> Any:
            raise Skip(f"needs {FOUND_BY[name]}") if name in FOUND_BY else AttributeError(name)


def each_teacher(run: Callable[[Facts], str]) -> Callable[[Facts], str]:
    """The check `run` for every teacher of a recipe that routes, else as it is."""

    def checked(facts: Facts) -> str:
        if not facts.config.teacher.about.routes:
            return run(facts)
        found = {}
        for name, config in of_routes(facts.config).items():
            if name not in facts.routes:
                facts.routes[name] = copy(facts)
                facts.routes[name].config = config
            found[name] = run(facts.routes[name])
        said = "; ".join(f"{name}: {what}" for name, what in found.items())
        return Warned(said) if any(isinstance(what, Warned) for what in found.values()) else said

    return checked


def first_line(e: Exception) -> str:
    """Of what an exception says, with its type unless it is a user's mistake."""
    told = (str(e).strip().splitlines() or [""])[0]
    return told if isinstance(e, UserError) else f"{type(e).__name__}: {told}"


@dataclass(frozen=True)
class Check:
    """`run` returns what it found, and raises UserError for a fault or Skip where there is nothing to do."""

    name: str
    run: Callable[[Facts], str]
    remedy: str
    needs: tuple[str, ...] = ()  # names of checks that must have passed
    live: bool = False  # needs a vLLM server, or comes after those that do
