"""Who answers a prompt, what of the best ids travels to the loss, and which objectives go with which source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import opd.rollout.sampler
import opd.rollout.sources
import opd.teachers.local
import opd.teachers.server
from opd.config.load import load_config
from opd.config.objective import OBJECTIVES
from opd.config.schema import Config
from opd.inference.client import Answer
from opd.models.base import Family, family_of
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import DatasetSource, MixSource, StudentSource, TeacherSource, make_source
from opd.settings import UserError
from opd.teachers.local import LocalTeacher
from opd.teachers.server import ServerTeacher
from opd.types import Prompt, Rollout

STUDENT = "recipes/tiny/student"


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of(STUDENT)


def config(*overrides: str) -> Config:
    return load_config("recipes/tiny/2_xopd.yaml", [f"student.path={STUDENT}", "rollout.n=3", *overrides])


# A mix


class Sampler:
    def sample(self, jobs: list[Any], clips: Any, n: int, temperature: float) -> list[Rollout]:
        return [Rollout(p, v, (300, 2), np.zeros(2, np.float32), 7, False) for p, v, _ in jobs for _ in range(n)]


class Writer:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Any]:
        self.asked.append(len(prompts))
        return [((310, 311, 2), False) for _ in prompts]


PROMPTS = [(i, Prompt(str(i), ({"role": "user", "content": str(i)},))) for i in range(400)]


def mix(share: float, seed: int = 0) -> tuple[MixSource, Writer]:
    c = config("objective.name=jsd", "rollout.source=mix", f"rollout.student_share={share}", f"run.seed={seed}")
    writer, sampler = Writer(), Sampler()
    student = StudentSource(sampler, c, ["speech", "text"])  # type: ignore[arg-type]
    return MixSource(student, TeacherSource(writer, c, ["speech", "text"]), c), writer


def students(source: MixSource, prompts: list[Any], step: int = 3) -> set[str]:
    return {r.prompt.id for r in source.respond(prompts, {}, step) if r.logprobs is not None}


def test_a_prompt_is_answered_by_one_of_both() -> None:
    source, _ = mix(0.3)
    rollouts = source.respond(PROMPTS[:50], {}, 3)
    own = [r for r in rollouts if r.logprobs is not None]
    written = [r for r in rollouts if r.logprobs is None]
    assert {r.prompt.id for r in own}.isdisjoint(r.prompt.id for r in written)
    assert {r.prompt.id for r in rollouts} == {p.id for _, p in PROMPTS[:50]}
    assert {(r.token_ids, r.version, r.stands_for) for r in own} == {((300, 2), 7, 1)}
    assert {(r.token_ids, r.version, r.stands_for) for r in written} == {((310, 311, 2), -1, 3)}
    for found, of_a_prompt in ((own, 2 * 3), (written, 2 * 1)):  # two views; n of the student, one of the teacher
        assert len(found) == of_a_prompt * len({r.prompt.id for r in found})


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_drawn_anew_every_step_and_the_same_again(share: float) -> None:
    source, _ = mix(share)
    drawn = [students(source, PROMPTS, step) for step in range(5)]
    deviation = np.sqrt(share * (1 - share) / 2000)
    assert sum(map(len, drawn)) / 2000 == pytest.approx(share, abs=4 * deviation)
    assert len({frozenset(d) for d in drawn}) == 5
    assert drawn == [students(mix(share)[0], PROMPTS, step) for step in range(5)]
    assert students(mix(share, seed=1)[0], PROMPTS) != drawn[3]


@pytest.mark.parametrize("ranks", [2, 3, 400])
def test_ranks_together_draw_as_one(ranks: int) -> None:
    """And every rank asks the teacher once: a sharded one needs them all."""
    whole = students(mix(0.5)[0], PROMPTS)
    found = set()
    for rank in range(ranks):
        source, writer = mix(0.5)
        found |= students(source, PROMPTS[rank::ranks])
        assert len(writer.asked) == 1
    assert found == whole


# The data set


def test_gold_responses_end_their_turn(family: Family) -> None:
    c = config("objective.name=salad", "rollout.source=dataset", "rollout.max_tokens=4")
    gold = [
        Prompt(str(i), ({"role": "user", "content": "hm"},), r) for i, r in enumerate(["one two", "one two one two"])
    ]
    source = make_source(c, ["speech", "text"], None, None, family)
    assert isinstance(source, DatasetSource)
    found = source.respond(list(enumerate(gold)), {}, 0)
    assert [(r.prompt.id, r.view) for r in found] == [(i, v) for v in ("speech", "text") for i in "01"]
    ids = tuple(family.tokenizer("one two", add_special_tokens=False).input_ids)
    assert len(ids) in (2, 3)
    assert {(r.token_ids, r.truncated) for r in found if r.prompt.id == "0"} == {((*ids, family.turn_end), False)}
    cut = {(len(r.token_ids), r.token_ids[-1] == family.turn_end, r.truncated) for r in found if r.prompt.id == "1"}
    assert cut == {(4, False, True)} and {(r.logprobs, r.version) for r in found} == {(None, -1)}
    with pytest.raises(UserError, match="m.jsonl:7: rollout.source dataset needs a `response`, the record has none"):
        source.respond([(0, Prompt("p", (), place="m.jsonl:7"))], {}, 0)


# The best ids


def test_the_sampler_asks_for_the_best_ids(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    tops = [[300, 305, 306], [301, 307]]  # the server told of fewer

    def answer(urls: list[str], requests: list[Any], *_: Any) -> list[Any]:
        sent.extend(r.body for r in requests)
        content = [
            {
                "token": f"token_id:{t[0]}",
                "logprob": -0.5,
                "top_logprobs": [{"token": f"token_id:{i}", "logprob": -1.0} for i in t],
            }
            for t in tops
        ]
        choice = {"index": 0, "token_ids": [300, 301], "logprobs": {"content": content}}
        ids = family.prompt_ids([{"role": "user", "content": "hello"}], [])
        return [Answer(urls[0], {"prompt_token_ids": ids, "choices": [choice]}) for _ in requests]

    monkeypatch.setattr(opd.rollout.sampler, "post_all", answer)
    job: Any = (Prompt("q", ({"role": "user", "content": "hello"},)), "text", "0/0")
    for more, asked in ((["objective.name=reverse_kl", "objective.top_k=3"], 3), (["objective.name=xopd"], 0)):
        sampler = VllmSampler(config(*more), family, ["http://127.0.0.1:9"])
        (rollout,) = sampler.sample([job], {}, 1, 1.0, check=False)
        assert sent[-1]["top_logprobs"] == asked
        if asked:
            assert rollout.top_ids is not None and rollout.top_ids.tolist() == [[300, 305, 306], [301, 307, -1]]
        else:
            assert rollout.top_ids is None


def rollout(top: Any = None) -> Rollout:
    prompt = Prompt("p", ({"role": "user", "content": "what is one plus two"},))
    return Rollout(prompt, "text", (300, 301, 2), np.zeros(3, np.float32), 0, False, top_ids=top)


@pytest.mark.parametrize("chunk", [1 << 26, 503])
def test_a_local_teacher_knows_every_id(family: Family, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's best at their own log-probs, its own best in order; banned ids without mass."""
    chunks = opd.teachers.local.chunks
    monkeypatch.setattr(opd.teachers.local, "chunks", lambda count, vocab: chunks(count, vocab, chunk))
    asked = np.array([[300, 205, 206], [207, family.banned_ids[0], 208], [2, 209, -1]])
    rollouts = [rollout(asked), rollout(asked[::-1].copy())]
    teacher = LocalTeacher(config("teacher.kind=local"), family, torch.device("cpu"))
    ids = torch.tensor([[*teacher.prompt_ids(rollouts[0].prompt), 300, 301, 2]])
    with torch.no_grad():
        logits = teacher.model(ids).logits[0, -4:-1].float()
    logits[:, family.banned_ids] = -torch.inf
    rows = torch.log_softmax(logits, -1).numpy()
    teacher.config = config("objective.name=reverse_kl", "objective.top_k=3", "teacher.kind=local")
    for scored in teacher.score(rollouts):
        top = scored.rollout.top_ids
        assert scored.top_ids is not None and scored.top_logprobs is not None and top is not None
        assert np.array_equal(scored.top_ids, top)
        for t, k in np.argwhere(top >= 0):
            i = top[t, k]
            want = rows[t, i] if i not in family.banned_ids else pytest.approx(-1e9, rel=1e-3)
            assert scored.top_logprobs[t, k] == pytest.approx(want, abs=1e-4)
    teacher.config = config("objective.name=jsd", "objective.top_k=4", "teacher.kind=local")
    (scored,) = teacher.score([rollout()])
    assert np.array_equal(scored.top_ids, np.argsort(-rows, axis=1)[:, :4])
    assert scored.top_logprobs == pytest.approx(-np.sort(-rows, axis=1)[:, :4], abs=1e-4)
    assert scored.teacher_logprobs == pytest.approx(rows[range(3), [300, 301, 2]], abs=1e-4)


def told(family: Family, monkeypatch: pytest.MonkeyPatch, c: Config, entries: list[Any], r: Rollout) -> Any:
    sent: list[Any] = []

    def answer(urls: list[str], requests: list[Any], *_: Any) -> list[Any]:
        sent.extend(x.body for x in requests)
        before = [None] * (len(sent[-1]["prompt"]) - len(r.token_ids))
        return [Answer(urls[0], {"choices": [{"prompt_logprobs": before + entries}]})]

    monkeypatch.setattr(opd.teachers.server, "post_all", answer)
    (scored,) = ServerTeacher(c, family, torch.device("cpu")).score([r])
    assert sent[0]["prompt_logprobs"] == c.objective.top_k and sent[0]["temperature"] == 1.0
    return scored


def entry(**ranked: float) -> dict[str, Any]:
    """`_id=logprob` in the order of rank; the token itself behind the K best."""
    return {name[1:]: {"logprob": lp, "rank": k} for k, (name, lp) in enumerate(ranked.items(), 1)}


def test_a_server_leaves_ids_that_it_does_not_tell_of_to_the_bucket(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = 'teacher.urls=["http://127.0.0.1:9"]'
    c = config("objective.name=reverse_kl", "objective.top_k=2", "teacher.kind=server", urls)
    entries = [entry(_300=-0.1, _205=-3.0), entry(_206=-0.2, _207=-2.0, _301=-9.0), entry(_2=-0.5, _300=-1.0)]
    asked = np.array([[205, 300], [301, 400], [8, 9]])
    scored = told(family, monkeypatch, c, entries, rollout(asked))
    assert scored.top_ids.tolist() == [[205, 300], [301, -1], [-1, -1]]  # the token itself is always known
    assert scored.top_logprobs == pytest.approx(np.array([[-3.0, -0.1], [-9.0, 0.0], [0.0, 0.0]]))
    assert scored.teacher_logprobs == pytest.approx([-0.1, -9.0, -0.5])


def test_a_servers_own_best_without_what_the_student_may_not_use(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward KL at a banned id would be a billion times its mass; a larger vocabulary's id has no place at all."""
    urls = 'teacher.urls=["http://127.0.0.1:9"]'
    c = config("objective.name=forward_kl", "objective.top_k=2", "teacher.kind=server", urls)
    banned = {f"_{family.audio_id}": -2.0}
    entries = [
        entry(_300=-0.1, _205=-3.0),
        entry(_206=-0.2, **banned, _301=-9.0),
        entry(_99999=-0.5, _300=-1.0, _2=-2.0),
    ]
    scored = told(family, monkeypatch, c, entries, rollout())
    assert scored.top_ids.tolist() == [[300, 205], [206, -1], [300, -1]]  # nor the token itself behind the K best
    assert scored.top_logprobs == pytest.approx(np.array([[-0.1, -3.0], [-0.2, 0.0], [-1.0, 0.0]]))


# What goes with what


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("source", ["student", "teacher", "dataset", "mix"])
def test_objectives_and_their_sources(name: str, source: str) -> None:
    settings = [f"objective.name={name}", f"rollout.source={source}", "teacher.kind=local"]
    if source in OBJECTIVES[name].sources:
        assert config(*settings).objective.name == name
        return
    wanted = " or ".join(OBJECTIVES[name].sources)
    with pytest.raises(UserError, match=f"objective.name {name} needs rollout.source {wanted}, found {source}$"):
        config(*settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["name=reverse_kl"], "logits unless objective.top_k is set: teacher.kind must be local or self, found server"),
        (["name=cord"], "reads full-vocabulary logits: teacher.kind must be local or self, found server"),
        (["name=entropy_aware"], "reads full-vocabulary logits: teacher.kind must be local or self, found server"),
        (["name=uld"], "reads full-vocabulary logits: teacher.kind must be local, found server"),
    ],
)
def test_rows_need_a_local_teacher(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config("teacher.kind=server", *(f"objective.{s}" for s in settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["objective.name=cord", "objective.top_k=4"],
            "objective.top_k is of reverse_kl, forward_kl and jsd, found .*",
        ),
        (["objective.name=jsd", "objective.top_k=4", "objective.beta=1"], "objective.beta 1 with top_k is infinite"),
        (
            ["objective.name=jsd", "rollout.source=teacher", "objective.reference=0.1"],
            "objective.reference is for on-policy responses: rollout.source student, found teacher",
        ),
        (
            ["objective.name=jsd", "rollout.source=mix", "rollout.student_share=1"],
            "rollout.student_share: .* less than 1",
        ),
        (["objective.name=grpo"], "objective.name: .*'sft', 'kd', 'xopd'"),
        (["objective.reference=.inf"], "objective.reference: Input should be a finite number, found Infinity"),
        (["objective.ratio_max=.inf"], "objective.ratio_max: Input should be a finite number, found Infinity"),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config("teacher.kind=local", *settings)
