"""What each kind of teacher is: one record of each, from which all else is read. Imports no torch.

A new kind is a record here, a class in opd/teachers/, its line in `TEACHERS` (opd/teachers/registry.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveInt

from opd.settings import Section


@dataclass(frozen=True)
class TeacherKind:
    """What is known of a kind without its class. All defaults: a service somewhere that scores and responds."""

    gives_logits: bool = False  # of the full vocabulary; of several: where each of them does
    weights: Literal["own", "student", ""] = ""  # that learner ranks hold and may shard: of its path, of the student
    servers: Literal["all", "responses", ""] = ""  # what vLLM servers do for it: all, or write a warm start's responses
    routes: bool = False  # it is several, by teacher.routes

    @property
    def has_path(self) -> bool:
        """Whether teacher.path names its checkpoint, or at least its tokenizer, and teacher.urls whom it asks."""
        return not self.routes and self.weights != "student"


TEACHER_KINDS: dict[str, TeacherKind] = {
    "local": TeacherKind(gives_logits=True, weights="own", servers="responses"),
    "server": TeacherKind(servers="all"),
    "self": TeacherKind(gives_logits=True, weights="student"),
    "routed": TeacherKind(gives_logits=True, routes=True),
}
WITH_LOGITS = " or ".join(name for name, kind in TEACHER_KINDS.items() if kind.gives_logits and not kind.routes)


class TeacherConfig(Section):
    """The text LLM that scores responses, and where it runs."""

    kind: Literal[tuple(TEACHER_KINDS)] | None = Field(  # type: ignore[valid-type]
        None, description="none: server where the placement has teacher servers and the objective can use them"
    )
    path: str = Field("", description="checkpoint folder or hub id of the text LLM; none: self, routed, or not asked")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    urls: list[str] = Field(
        [], description="servers that score, or write a warm start's responses; empty: `opd launch` starts them"
    )
    shard: bool = Field(False, description="local, self: ZeRO-3 over the learner's ranks instead of a copy on each")
    batch_tokens: PositiveInt = Field(16384, description="local, self: padded tokens in one forward pass")
    field: str = Field("group", description="routed: of a record, names its route")
    routes: dict[str, TeacherConfig] = Field({}, description='routed: value of the field -> teacher; "*": any other')

    @property
    def about(self) -> TeacherKind:
        """The kind's record."""
        return TEACHER_KINDS[self.kind or "local"]

    @property
    def each(self) -> dict[str, TeacherConfig]:
        """The teachers that it stands for, by route: itself, unless it is routed."""
        return self.routes if self.about.routes else {"": self}
