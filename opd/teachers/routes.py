"""Which teacher a record goes to. Imports no torch."""

from __future__ import annotations

from opd.config.schema import TeacherConfig
from opd.settings import UserError
from opd.types import Prompt


def route_of(teacher: TeacherConfig, prompt: Prompt) -> str:
    """Which of teacher.routes reads a prompt. Raises UserError, naming the record, when none does."""
    value = prompt.group if teacher.field == "group" else prompt.other.get(teacher.field, "")
    found = next((name for name in (value, "*") if name in teacher.routes), None)
    if found is None:
        has = f"{teacher.field} {value!r}" if value else f"no {teacher.field}"
        known = ", ".join(teacher.routes)
        raise UserError(
            f"{prompt.place or prompt.id}: has {has}, which is no route of teacher.routes ({known}); "
            'name it there, or "*" for all others'
        )
    return found
