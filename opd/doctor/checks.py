"""What a check of a recipe is, and what checks find out for each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.types import Prompt, Rollout

if TYPE_CHECKING:
    from opd.doctor.probe import PlainStudent
    from opd.models.base import Family  # needs torch


class Warned(str):
    """What a check found, where it is allowed and yet worth a look."""


class Skip(Exception):
    """A check has nothing to do for this recipe: why."""


@dataclass(repr=False)  # what is not known yet has no value
class Facts:
    """A recipe and what is known of it so far. A check reads what those that it needs have put here."""

    config: Config
    student: str = field(init=False)  # checkpoint folder or hub id
    family: Family = field(init=False)
    teacher: str = field(init=False)
    teacher_ids: int | None = None  # its vocabulary; None: there is none, or it is the student
    tokenizer: Any = field(init=False)  # the teacher's
    routes: dict[str, Facts] = field(default_factory=dict)  # with teacher.kind routed: the same for each teacher
    max_model_len: int | None = None  # of the student's servers; None: there are none
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)  # setting -> good records of its manifest
    bad: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # setting -> bad ones
    clips: dict[str, np.ndarray] = field(default_factory=dict)  # audio path -> waveform, of `heard`
    heard: list[Prompt] = field(default_factory=list)  # a few training records whose clips are good
    asked: Config = field(init=False)  # the recipe as the live server is asked: its URL, short responses
    probe: PlainStudent | None = None
    rollouts: list[Rollout] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)  # of what has to be stopped at the end


def each_teacher(run: Callable[[Facts], str]) -> Callable[[Facts], str]:
    """The check `run` for every teacher of a recipe that routes, else as it is."""

    def checked(facts: Facts) -> str:
        if facts.config.teacher.kind != "routed":
            return run(facts)
        found = {}
        for name, config in of_routes(facts.config).items():
            one = facts.routes.setdefault(name, replace_with(facts, config))
            found[name] = run(one)
        said = "; ".join(f"{name}: {what}" for name, what in found.items())
        return Warned(said) if any(isinstance(what, Warned) for what in found.values()) else said

    return checked


def replace_with(facts: Facts, config: Config) -> Facts:
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
