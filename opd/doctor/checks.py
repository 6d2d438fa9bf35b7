"""What a check of a recipe is, and what checks find out for each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.types import Prompt, Rollout

if TYPE_CHECKING:
    from opd.doctor.probe import PlainStudent
    from opd.models.base import Family  # needs torch


T = TypeVar("T")


class Warned(str):
    """What a check found, where it is allowed and yet worth a look."""


class Skip(Exception):
    """A check has nothing to do for this recipe: why."""


class Known(Generic[T]):
    """A fact that the check by this name finds out and keeps; whoever reads it before is skipped."""

    def __init__(self, check: str) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, facts: Facts, owner: type | None = None) -> T:
        if self.name not in vars(facts):
            raise Skip(f"needs {self.check}")
        return vars(facts)[self.name]

    def __set__(self, facts: Facts, value: T) -> None:
        vars(facts)[self.name] = value

    def __delete__(self, facts: Facts) -> None:
        vars(facts).pop(self.name, None)


class Facts:
    """A recipe and what is known of it so far. A check reads what those that it needs have put here."""

    student: Known[str] = Known("student")  # checkpoint folder or hub id
    family: Known[Family] = Known("student")
    teacher: Known[str] = Known("teacher")
    tokenizer: Known[Any] = Known("tokenizers")  # the teacher's
    asked: Known[Config] = Known("student server")  # the recipe as the server is asked: its URL, short responses
    probe: Known[PlainStudent] = Known("prompt ids")
    rollouts: Known[list[Rollout]] = Known("prompt ids")

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


def each_teacher(run: Callable[[Facts], str]) -> Callable[[Facts], str]:
    """The check `run` for every teacher of a recipe that routes, else as it is."""

    def checked(facts: Facts) -> str:
        if facts.config.teacher.kind != "routed":
            return run(facts)
        found = {}
        for name, config in of_routes(facts.config).items():
            one = facts.routes.setdefault(name, _replaced(facts, config))
            found[name] = run(one)
        said = "; ".join(f"{name}: {what}" for name, what in found.items())
        return Warned(said) if any(isinstance(what, Warned) for what in found.values()) else said

    return checked


def _replaced(facts: Facts, config: Config) -> Facts:
    """The same facts, shared, under another config."""
    found = copy(facts)
    found.config = config
    return found


@dataclass(frozen=True)
class Check:
    """`run` returns what it found, and raises UserError for a fault or Skip where there is nothing to do."""

    name: str
    run: Callable[[Facts], str]
    remedy: str
    needs: tuple[str, ...] = ()  # names of checks that must have passed
    live: bool = False  # needs a vLLM server, or comes after those that do
