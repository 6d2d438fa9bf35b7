"""Which teachers there are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opd.config.needs import uses_start
from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.models.base import Family
from opd.teachers.base import Teacher
from opd.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd.teachers.local import LocalTeacher
from opd.teachers.reference import ReferenceModel, Running, SelfTeacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.server import ServerTeacher

Make = Callable[[Config, Family, torch.device, ReferenceModel | None], Teacher]


def make_teacher(config: Config, family: Family, device: torch.device, start: ReferenceModel | None = None) -> Teacher:
    """The teacher that the recipe asks for; `start`: what `make_start` gave."""
    return TEACHERS[config.teacher.kind or "local"](config, family, device, start)


def make_start(config: Config, family: Family, device: torch.device, learner: Running | None) -> ReferenceModel | None:
    """The student at the start, where a teacher is it or the objective refers to it."""
    return ReferenceModel(config, family, device, learner) if uses_start(config) else None


def _local(config: Config, family: Family, device: torch.device, start: ReferenceModel | None) -> Teacher:
    return (CrossTokenizerTeacher if config.objective.about.other_tokenizer else LocalTeacher)(config, family, device)


def _server(config: Config, family: Family, device: torch.device, start: ReferenceModel | None) -> Teacher:
    return ServerTeacher(config, family, device)


def _self(config: Config, family: Family, device: torch.device, start: ReferenceModel | None) -> Teacher:
    assert start is not None
    return SelfTeacher(config, family, start)


def _routed(config: Config, family: Family, device: torch.device, start: ReferenceModel | None) -> Teacher:
    found = {name: make_teacher(c, family, device, start) for name, c in of_routes(config).items()}
    return RoutedTeacher(config, found)


TEACHERS: dict[str, Make] = {"local": _local, "server": _server, "self": _self, "routed": _routed}
