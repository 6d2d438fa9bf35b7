"""The table of teacher kinds: what the classes are held to, and that a kind of one's own needs no other place."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_learner import _at_root, config, family

from opd.config.load import placed
from opd.config.needs import asks_teacher_servers, starts_teacher, teacher_servers, uses_start
from opd.config.schema import Config
from opd.config.teacher import TEACHER_KINDS, TeacherConfig, TeacherKind
from opd.evaluate.records import eval_config
from opd.models.base import Family
from opd.plan.learner_memory import frozen
from opd.plan.shapes import student_shape, teacher_shape
from opd.settings import UserError
from opd.teachers.registry import TEACHERS, make_start, make_teacher

__all__ = ["_at_root", "family"]  # fixtures

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
ROUTES = "teacher.routes={a: {kind: self}, b: {path: recipes/tiny/teacher, dtype: float32}}"
RECIPES = {
    "local": ["teacher.kind=local"],
    "server": ["teacher.kind=server"],
    "self": ["teacher.kind=self", "teacher.path="],
    "routed": ["teacher.kind=routed", "teacher.path=", ROUTES],
}


def test_every_kind_has_a_class() -> None:
    assert TEACHERS.keys() == TEACHER_KINDS.keys() == RECIPES.keys()


@pytest.mark.parametrize("kind", RECIPES)
def test_its_class_is_what_its_record_says(family: Family, kind: str) -> None:
    c = config(*RECIPES[kind])
    assert c.teacher.about is TEACHER_KINDS[kind]
    teacher = make_teacher(c, family, CPU, make_start(c, family, CPU, None))
    assert teacher.gives_logits == c.teacher.about.gives_logits
    assert set(c.teacher.each) == ({"a", "b"} if c.teacher.about.routes else {""})


def test_nothing_else_compares_a_kind_with_a_name() -> None:
    names, found = set(TEACHER_KINDS), []
    for path in (ROOT / "opd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                said = {c.value for part in ast.walk(node) if isinstance(c := part, ast.Constant)}
                found += [f"{path}:{node.lineno}"] * bool(names & said)
    assert not found


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A recipe whose teacher is a service somewhere: a record of defaults, and an entry of TEACHERS."""
    monkeypatch.setitem(TEACHER_KINDS, "remote", TeacherKind())
    monkeypatch.setitem(TEACHERS, "remote", lambda config, *_: SimpleNamespace(urls=config.teacher.urls))
    return placed(config().changed({"teacher.kind": "remote", "teacher.urls": ["http://far"]}))


def test_a_remote_service_is_asked_by_its_class_alone(remote: Config, family: Family) -> None:
    made: Any = make_teacher(remote, family, CPU, make_start(remote, family, CPU, None))
    assert made.urls == ["http://far"]
    assert not (asks_teacher_servers(remote) or starts_teacher(remote) or uses_start(remote))
    assert teacher_servers(remote) == []  # its URLs are no vLLM servers
    assert frozen(remote, student_shape(remote), teacher_shape(remote)) == {}
    routed = config(*RECIPES["routed"]).changed({"teacher.routes": {"a": remote.teacher}})
    assert teacher_servers(placed(routed)) == [] and not uses_start(routed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher.path": ""}, "^teacher.path is required: "),
        ({"teacher.shard": True}, "is for a local teacher, found kind remote; "),
        ({"teacher.routes": {"a": TeacherConfig()}}, "expected with teacher.kind routed alone, found kind remote$"),
    ],
)
def test_what_a_remote_service_cannot_be(remote: Config, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        placed(remote.changed(changed))


def test_a_remote_service_gives_no_logits(remote: Config) -> None:
    o = remote.objective.changed({"name": "cord"})
    with pytest.raises(ValueError, match="cord reads full-vocabulary logits: .* must be local or self, found remote$"):
        o.check("student", remote.teacher)
    routed = config(*RECIPES["routed"]).changed({"teacher.routes": {"a": remote.teacher}, "objective": o})
    with pytest.raises(UserError, match="^teacher.routes.a: .* logits, which no remote gives$"):
        placed(routed)


def test_opd_eval_serves_its_teacher(remote: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("opd.evaluate.records.load_config", lambda *_: remote.changed({"eval.test": "t.jsonl"}))
    with pytest.raises(UserError, match=r"found teacher.kind remote; name it by teacher.kind=server teacher.path="):
        eval_config("r.yaml", [], tmp_path, True)
