"""The student at the start as teacher and as reference, and several teachers by route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_learner import (
    ANSWERS,
    CLIPS,
    ONE,
    PROMPTS,
    WHOLE,
    XOPD,
    Reference,
    _at_root,
    _inputs,
    assert_same_gradient,
    config,
    family,
    gradient,
    make_learner,
    perturb,
    reference,
    running,
)
from torch import Tensor, softmax

from opd.config.load import load_config
from opd.config.needs import (
    asks_teacher,
    asks_teacher_servers,
    copies_start,
    route_of,
    starts_teacher,
    teacher_servers,
    uses_start,
)
from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.models.base import Family
from opd.models.lora import adapters
from opd.objectives.losses import EXCLUDED
from opd.objectives.token_loss import Logits
from opd.plan.learner_memory import frozen
from opd.plan.shapes import student_shape, teacher_shape
from opd.prompts.manifest import parse_record
from opd.settings import UserError
from opd.teachers import reference as starting
from opd.teachers.local import LocalTeacher
from opd.teachers.reference import ReferenceModel, SelfTeacher
from opd.teachers.registry import RoutedTeacher, make_start, make_teacher
from opd.train.batch import make_batch, make_samples
from opd.train.learner import Learner
from opd.types import Prompt, Rollout, Sample, ScoredRollout

__all__ = ["_at_root", "family", "reference"]  # fixtures

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SELF = ["teacher.kind=self", "teacher.path="]
LORA = "student.lora={r: 4, alpha: 12}"
COUNT = sum(len(a) for _, _, a in ANSWERS)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy in float64, as the learner of these tests."""
    monkeypatch.setitem(starting.DTYPES, "float32", torch.float64)


def answered(family: Family, views: tuple[str, ...] = ("speech", "text")) -> list[Sample]:
    rollouts = [Rollout(PROMPTS[n], v, a, np.zeros(len(a), np.float32), 0, False) for n, v, a in ANSWERS if v in views]
    return make_samples([ScoredRollout(r, np.zeros(len(r.token_ids), np.float32)) for r in rollouts], CLIPS, family)


def all_of(rows: Logits, parts: tuple[int, ...] = (0, 1, 9, COUNT)) -> Tensor:
    """Logits asked for in uneven chunks."""
    return torch.cat([rows(slice(a, b)) for a, b in zip(parts, parts[1:], strict=False)])


@torch.no_grad()
def read(family: Family) -> list[Tensor]:
    """What transformers computes for every answer behind the text of its prompt."""
    hf: Any = family.load(torch.float64, "sdpa")
    banned = torch.zeros(family.vocab_size, dtype=torch.bool)
    banned[family.banned_ids] = True
    found = []
    for name, _, answer in ANSWERS:
        ids = torch.cat([_inputs(family, PROMPTS[name], "text")["input_ids"], torch.tensor([answer])], 1)
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
        found.append(logits.masked_fill(banned, EXCLUDED).float())
    return found


# ---- the student teaches itself --------------------------------------------------------------------------------------


def test_it_reads_the_text_of_what_was_heard(family: Family, double: None) -> None:
    c = config(*SELF)
    teacher = make_teacher(c, family, CPU, make_start(c, family, CPU, running(make_learner(family, c))))
    want = read(family)
    torch.testing.assert_close(all_of(teacher.logits(answered(family))), torch.cat(want), atol=1e-5, rtol=1e-6)
    scored = teacher.score([s.scored.rollout for s in answered(family)])
    for s, logits, (_, _, answer) in zip(scored, want, ANSWERS, strict=True):
        logp = torch.log_softmax(logits, -1)[range(len(answer)), list(answer)]
        assert np.abs(s.teacher_logprobs - logp.numpy()).max() < 1e-5


@pytest.mark.parametrize("budget", [WHOLE, ONE])
@pytest.mark.parametrize("lora", [False, True])
def test_a_student_that_has_not_moved_learns_nothing_from_itself(
    family: Family, double: None, lora: bool, budget: int
) -> None:
    text = ["objective.name=reverse_kl", "objective.lambda=1.0", f"train.micro_batch_tokens={budget}"]
    c = config(*SELF, *text, *([LORA] if lora else []))
    found = []
    for moved in (False, True):
        learner = make_learner(family, c)
        teacher = make_teacher(c, family, CPU, make_start(c, family, CPU, running(learner)))
        if moved:
            with torch.no_grad():
                for i, p in enumerate(p for p in learner.model.parameters() if p.requires_grad):
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        metrics = learner.step(make_batch(answered(family, ("text",)), CLIPS, c), 0, teacher).metrics
        assert metrics["loss"] == pytest.approx(metrics["reverse_kl/text"], rel=0.5)
        found.append((metrics["loss"], float(max(g.abs().max() for g in gradient(learner).values()))))
    (loss, largest), (moved_loss, moved_largest) = found
    assert abs(loss) < 1e-6 and largest < 1e-6
    assert moved_loss > 1e-3 and moved_largest > 1e-3


def test_with_adapters_it_is_the_learner_without_them(family: Family) -> None:
    """No second copy: whatever the adapters have become, and they are back afterwards."""
    c = config(*SELF, LORA)
    learner = make_learner(family, c)
    teacher = make_teacher(c, family, CPU, make_start(c, family, CPU, running(learner)))
    assert isinstance(teacher, SelfTeacher) and teacher.start.model is learner.model
    prompts = list(PROMPTS.values())
    before, replies = learner.eval_logits(answered(family), CLIPS)[1], teacher.respond(prompts, 12)
    perturb(learner.model)
    after = learner.eval_logits(answered(family), CLIPS)[1]
    rows = all_of(teacher.logits(answered(family)))
    torch.testing.assert_close(rows, torch.cat(read(family)), atol=1e-5, rtol=1e-6)
    assert teacher.respond(prompts, 12) == replies
    assert float((after - before).abs().max()) > 0.1
    assert torch.equal(learner.eval_logits(answered(family), CLIPS)[1], after)
    assert learner.model.training and all(a.weight.requires_grad for a in adapters(learner.model.hf))


def test_with_adapters_it_reads_without_dropout(family: Family) -> None:
    """The learner trains, its module is the teacher: what is dropped in training is not dropped here."""
    c = config(*SELF, LORA)
    learner = make_learner(family, c)
    teacher = make_teacher(c, family, CPU, make_start(c, family, CPU, running(learner)))
    before = all_of(teacher.logits(answered(family)))
    layers = [m for m in learner.model.hf.modules() if hasattr(m, "attention_dropout")]
    for layer in layers:
        layer.attention_dropout = 0.5
    assert layers and learner.model.training
    assert torch.equal(all_of(teacher.logits(answered(family))), before)
    assert learner.model.training  # still


def test_a_greedy_answer_is_not_bent_by_the_checkpoints_own_settings(family: Family) -> None:
    c = config(*SELF)
    start = ReferenceModel(c, family, CPU, None)
    teacher, hf = SelfTeacher(c, family, start), start.model.hf
    (plain,) = teacher.respond([PROMPTS["a"]], 8)
    hf.generation_config.repetition_penalty, hf.generation_config.min_new_tokens = 9.0, 8  # type: ignore[union-attr]
    assert teacher.respond([PROMPTS["a"]], 8) == [plain]
    assert hf.generation_config.repetition_penalty == 9.0  # type: ignore[union-attr]


# ---- the reference ---------------------------------------------------------------------------------------------------


def move(family: Family, monkeypatch: pytest.MonkeyPatch, train: list[str]) -> None:
    """From now on the family loads weights that training of some parts might have led to."""
    load = family.load

    def moved(dtype: torch.dtype, attention: str) -> Any:
        hf = load(dtype, attention)
        with torch.no_grad():
            for i, (name, p) in enumerate(hf.named_parameters()):
                if family.part_of(name) not in train or "embed_positions" in name:
                    continue
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
        return hf

    monkeypatch.setattr(family, "load", moved)


@pytest.mark.parametrize(("train", "budget"), [("llm", ONE), ("llm", WHOLE), ("llm, adapter", 90), ("llm, tower", 90)])
def test_the_penalty_against_autograd(
    family: Family, reference: Reference, monkeypatch: pytest.MonkeyPatch, double: None, train: str, budget: int
) -> None:
    """c KL(student || start), each hearing for itself, beside the objective; transformers one answer at a time."""
    c = config("objective.reference=0.3", f"student.train=[{train}]", f"train.micro_batch_tokens={budget}", *XOPD)
    c = c.changed({"objective.lambda_": 0.25})
    start = make_start(c, family, CPU, None)
    with monkeypatch.context() as patch:
        move(family, patch, list(c.student.train))
        now, learner = Reference(family), make_learner(family, c)
    learner.reference = start
    allowed = [i for i in range(family.vocab_size) if i not in family.banned_ids]
    kls: list[Tensor] = []

    def loss(i: int) -> Tensor:
        p, q = (softmax(x.logits[i][:, allowed], -1) for x in (now, reference))
        kl = (p * (p / q.detach()).log()).sum(-1)
        kls.append(kl.detach())
        return now.xopd(c, i) + 0.3 * kl

    value, want = now.objective(c, loss)
    metrics = learner.step(make_batch(now.samples(family, c), CLIPS, c), 0).metrics
    assert metrics["loss"] == pytest.approx(value, abs=2e-5)
    assert 0.01 < metrics["reference_kl"] == pytest.approx(float(torch.cat(kls).mean()), abs=1e-5)
    assert_same_gradient({n: g for n, g in gradient(learner).items() if n in want}, want, 2e-5)


def test_the_penalty_with_adapters(family: Family) -> None:
    """The reference is the learner without its adapters, in the response's own view."""
    c = config("objective.reference=0.3", LORA)
    learner: Any = make_learner(family, c)
    assert not copies_start(c)
    learner.reference = make_start(c, family, CPU, running(learner))
    base = learner.eval_logits(answered(family), CLIPS)[1].log_softmax(-1)
    batch = make_batch(answered(family), CLIPS, c)
    assert learner.step(batch, 0).metrics["reference_kl"] == pytest.approx(0.0, abs=1e-6)
    perturb(learner.model)
    mb, logits = learner.eval_logits(answered(family), CLIPS)
    now = logits.log_softmax(-1)
    kl = (now.exp() * (now - base)).sum(-1)[mb.mask.bool()]
    assert 0.01 < learner.step(batch, 0).metrics["reference_kl"] == pytest.approx(float(kl.mean()), rel=1e-4)


# ---- routes ----------------------------------------------------------------------------------------------------------

ROUTES = "teacher.routes={sums: {path: recipes/tiny/teacher, dtype: float32}, '*': {kind: self}}"
ROUTED = ["teacher.kind=routed", "teacher.path=", ROUTES]


def routed(family: Family, c: Config) -> tuple[RoutedTeacher, dict[str, Any]]:
    teacher = make_teacher(c, family, CPU, make_start(c, family, CPU, None))
    assert isinstance(teacher, RoutedTeacher) and {n: type(t) for n, t in teacher.teachers.items()} == {
        "sums": LocalTeacher,
        "*": SelfTeacher,
    }
    return teacher, dict(teacher.teachers)


def test_each_record_has_its_teacher(family: Family) -> None:
    c = config(*ROUTED)
    teacher, alone = routed(family, c)
    samples = answered(family)
    routes = ["sums" if i in (0, 3, 4) else "*" for i in range(len(samples))]
    for s, route in zip(samples, routes, strict=True):
        r = s.scored.rollout
        prompt = Prompt(f"{r.prompt.id}-{route}", r.prompt.messages, group="sums" if route == "sums" else "other")
        s.scored = ScoredRollout(Rollout(prompt, r.view, r.token_ids, r.logprobs, 0, False), None)
    rollouts = [s.scored.rollout for s in samples]
    rows = all_of(teacher.logits(samples))
    lengths = [len(s.response_ids) for s in samples]
    for i, (got, route) in enumerate(zip(rows.split(lengths), routes, strict=True)):
        want = {n: t.logits([samples[i]])(slice(0, lengths[i])) for n, t in alone.items()}
        torch.testing.assert_close(got, want[route], atol=1e-4, rtol=1e-5)
        assert float((want["sums"] - want["*"]).abs().max()) > 1  # they differ: no other could pass
    for got, r, route in zip(teacher.score(rollouts), rollouts, routes, strict=True):
        (want_one,) = alone[route].score([r])
        assert got.rollout is r and np.abs(got.teacher_logprobs - want_one.teacher_logprobs).max() < 1e-5
    asked = [r.prompt for r in rollouts]
    want_replies = [alone[route].respond([p], 8)[0] for p, route in zip(asked, routes, strict=True)]
    assert teacher.respond(asked, 8) == want_replies
    only = [s for s, route in zip(samples, routes, strict=True) if route == "sums"]
    n = sum(len(s.response_ids) for s in only)
    assert torch.equal(teacher.logits(only)(slice(0, n)), alone["sums"].logits(only)(slice(0, n)))
    assert teacher.score([]) == [] and teacher.respond([], 8) == []


def test_routes_give_rows_only_if_all_do(family: Family) -> None:
    c = config(*ROUTED)
    teacher, alone = routed(family, c)
    assert teacher.gives_logits
    alone["*"].gives_logits = False  # as of a server
    assert not RoutedTeacher(c, alone).gives_logits


def test_a_field_of_the_record_names_its_route(tmp_path: Path) -> None:
    c = config(*ROUTED, "teacher.field=skill")
    record = {"messages": [{"role": "user", "content": "hm"}], "skill": "sums", "group": "x", "level": 3}
    prompt = parse_record(record, tmp_path, "m.jsonl:7")
    assert prompt.other == {"skill": "sums"} and route_of(c.teacher, prompt) == "sums"
    assert route_of(c.teacher, parse_record(record | {"skill": "maps"}, tmp_path, "m.jsonl:8")) == "*"
    del c.teacher.routes["*"]
    for more, has in (({"skill": "maps"}, "has skill 'maps'"), ({"skill": None}, "has no skill")):
        with pytest.raises(UserError, match=rf"m.jsonl:9: {has}, which is no route of teacher.routes \(sums\)"):
            route_of(c.teacher, parse_record(record | more, tmp_path, "m.jsonl:9"))


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.path="], "teacher.path is required"),
        (["teacher.kind=self"], "kind self is the student itself, found path recipes/tiny/teacher; set teacher.path="),
        ([*SELF, "teacher.urls=[http://a]"], "kind self asks no server of its own"),
        (["teacher.routes={a: {path: b}}"], "expected with teacher.kind routed alone, found kind local"),
        (["teacher.kind=routed", "teacher.path="], "expected teacher.routes, and path, urls and shard in each"),
        (["teacher.kind=routed", ROUTES], "expected teacher.routes, and path, urls and shard in each"),
        ([*ROUTED, "teacher.routes={a: {kind: server, path: b}}"], "teacher.routes.a: a route's servers are running"),
        ([*ROUTED, "teacher.routes={a: {kind: local}}"], "teacher.routes.a.path is required"),
        ([*ROUTED, "teacher.routes={a: {kind: routed}}"], "teacher.routes.a.routes: expected with"),
        (
            [*ROUTED, "teacher.routes={a: {urls: [http://a], path: b}}", "objective.name=reverse_kl"],
            "teacher.routes.a: objective.name reverse_kl reads full-vocabulary logits, which no server gives",
        ),
        ([*SELF, "objective.name=uld"], "uld is for one local teacher, found teacher.kind self"),
        (["teacher.routes={a: {pth: b}}"], "unknown key teacher.routes.a.pth"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        load_config("recipes/tiny/2_xopd.yaml", overrides)
    assert message in str(e.value)


def test_servers_of_routes() -> None:
    one = "teacher.routes={a: {path: b, urls: [http://a, http://b]}, '*': {kind: self}}"
    c = config("teacher.kind=routed", "teacher.path=", one)
    assert {n: r.teacher.kind for n, r in of_routes(c).items()} == {"a": "server", "*": "self"}
    assert teacher_servers(c) == [("teacher.routes.a.urls", u, "b") for u in ("http://a", "http://b")]
    assert asks_teacher(c) and not asks_teacher_servers(c) and not starts_teacher(c)
    four = ["launch.placement=recipes/placements/4gpu_1r_1t_2l.yaml", "objective.name=kd", "rollout.source=teacher"]
    assert starts_teacher(config("teacher.kind=local", *four)) and not starts_teacher(config(*SELF, *four))


@pytest.mark.parametrize(
    ("overrides", "used", "copied"),
    [
        ([], False, False),
        (SELF, True, True),
        ([*SELF, LORA], True, False),
        ([*SELF, LORA, "student.train=[llm, adapter]"], True, False),  # what it reads has not moved
        (["objective.reference=0.1"], True, True),
        (["objective.reference=0.1", LORA], True, False),
        (["objective.reference=0.1", LORA, "student.train=[llm, adapter]"], True, True),
        (["objective.reference=0.1", LORA, "student.train=[llm, adapter]", "objective.lambda=1.0"], True, False),
        (ROUTED, True, True),
        ([*SELF, "objective.name=sft", "rollout.source=dataset", "eval.test=", "eval.retention="], False, False),
    ],
)
def test_when_there_is_a_second_copy(overrides: list[str], used: bool, copied: bool) -> None:
    c = config(*overrides)
    assert (uses_start(c), copies_start(c)) == (used, copied)
    student, teacher = student_shape(c), teacher_shape(c)
    held = {name: size for name, (size, _) in frozen(c, student, teacher).items()}
    assert held.pop("student at the start", 0) == 4 * student.count() * copied
    assert sum(held.values()) == (0 if c.teacher.kind == "self" else 4 * shape_of_the_tiny_teacher())
    for shard in (False, True):
        c = c.changed({"teacher.shard": shard})
        assert all(cut == shard for _, cut in frozen(c, student, teacher).values()) or c.teacher.kind == "routed"


def shape_of_the_tiny_teacher() -> int:
    return teacher_shape(config()).count()


def test_both_share_one_copy(family: Family) -> None:
    c = config(*SELF, "objective.reference=0.1")
    learner: Learner = make_learner(family, c)
    start = make_start(c, family, CPU, running(learner))
    assert start is not None and start.model is not learner.model
    assert not any(p.requires_grad for p in start.model.parameters()) and not start.model.training
    teacher = make_teacher(c, family, CPU, start)
    assert isinstance(teacher, SelfTeacher) and teacher.start is start
