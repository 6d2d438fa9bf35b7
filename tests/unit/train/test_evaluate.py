"""What counts as right, the drop below the teacher, and how ranks share the records."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import opd.train.evaluator
from opd.config.load import load_config
from opd.config.schema import Config
from opd.models.base import family_of
from opd.models.speech_lm import SpeechLM, at_responses
from opd.objectives.losses import EXCLUDED
from opd.rollout.sources import decode
from opd.scoring.scorer import Scorer, ScoringConfig
from opd.scoring.statistics import drop
from opd.settings import UserError
from opd.teachers.local import LocalTeacher
from opd.train.batch import collate
from opd.train.evaluator import PAIRS, Evaluator
from opd.types import VIEWS, Prompt, Rollout, Sample, View

ROOT = Path(__file__).parents[3]
STUDENT = str(ROOT / "recipes/tiny/student")


@pytest.mark.parametrize(
    ("match", "answer", "text", "truncated", "right"),
    [
        ("exact", "one two.", " one two. \n", False, True),
        ("exact", "one two.", "one two", False, False),
        ("exact", "one two.", "one two.", True, False),
        ("regex", r".*\beleven\.", "four times two is eight. three plus eight is eleven.", False, True),
        ("regex", r"\beleven\.", "is eleven.", False, False),  # all of the response must match
        ("regex", "a|b", "b", False, True),
        ("exact", None, "", False, False),
    ],
)
def test_correct(match, answer, text: str, truncated: bool, right: bool) -> None:
    (grade,) = Scorer(ScoringConfig()).grade([(Prompt("p", (), answer=answer, match=match), text, truncated)])
    assert grade.score == right


def test_drop_by_hand() -> None:
    # student 1 of 4, teacher 2 of 4: half of the teacher's. m = 1/2; residuals 1 - 1/2, 0 - 1/2, 0, 0;
    # sqrt(4/3 * 1/2) / 2
    found = drop([1, 0, 0, 0], [1, 1, 0, 0])
    assert found["mean"] == 50.0 and found["stderr"] == pytest.approx(100 * math.sqrt(2 / 3) / 2)
    assert drop([1, 1], [1, 1]) == {"mean": 0.0, "stderr": 0.0}
    assert drop([1, 0], [0, 0]) == {"mean": None, "stderr": None}
    assert drop([1, 1, 1], [1, 1, 0])["mean"] == pytest.approx(-50.0)  # better than the teacher


@pytest.mark.parametrize(("records", "world"), [(1, 2), (7, 2), (33, 2), (64, 3)])
def test_ranks_share_the_records_in_step(records: int, world: int) -> None:
    prompts = [Prompt(str(i), ()) for i in range(records)]
    chunks = []
    for rank in range(world):
        evaluator = SimpleNamespace(learner=SimpleNamespace(rank=rank, world=world))
        evaluator._mine = lambda p, size, e=evaluator: Evaluator._mine(e, p, size)
        mine = Evaluator._in_step(evaluator, prompts)
        assert all(0 < len(c) <= PAIRS for c in mine)
        chunks.append(mine)
    assert len({len(mine) for mine in chunks}) == 1  # a rank with fewer calls would leave the others waiting
    seen = [i for mine in chunks for chunk in mine for i, _ in chunk if i >= 0]
    assert sorted(seen) == list(range(records))


def test_decode_leaves_special_tokens_out() -> None:
    family = family_of(STUDENT)
    ids = family.tokenizer("one two.", add_special_tokens=False).input_ids
    assert decode(family, (*ids, family.eos_ids[0])) == "one two."
    marks = family.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|endoftext|>"])
    assert decode(family, (marks[0], ids[0], marks[1], marks[2], *ids[1:], marks[3])) == "one two."
    assert decode(family, (family.eos_ids[0],)) == decode(family, ()) == ""


# ---- a whole evaluation over two ranks, one after another -----------------------------------------------------------

CLIPS = {f"{i}": np.random.default_rng(i).standard_normal(5000 + 777 * i).astype(np.float32) / 10 for i in range(11)}
WORDS = ["one two.", "two.", "one two five nine."]


def prompts() -> list[Prompt]:
    found = []
    for i, key in enumerate(CLIPS):
        part = {"type": "audio", "path": key, "transcript": f"what is {['one', 'two', 'three'][i % 3]} plus two"}
        message = {"role": "user", "content": [part]}
        word = WORDS[i % len(WORDS)]
        found.append(Prompt(key, (message,), response=word, answer=word, group="even" if i % 2 == 0 else "odd"))
    return found


class Student:
    """The learner's part in an evaluation: the shipped student, forward only."""

    def __init__(self, family: Any, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.model = SpeechLM(family.load(torch.float32, "sdpa").eval(), family, ["llm"])

    @torch.no_grad()
    def eval_states(self, samples: list[Sample], clips: dict[str, np.ndarray]) -> Any:
        mb = collate(samples)
        audio = [self.model.encode(self.model.family.features([clips[k]]))[0] for k in mb.clips]
        return mb, self.model.states(**at_responses(mb.inputs, mb.mask), audio=audio or None)

    @torch.no_grad()
    def at_output_layer(self, run: Any) -> torch.Tensor:
        return self.model.at_output_layer(run)


class Sampler:
    """Answers right when hearing an even record or reading any; one answer is cut off."""

    def sample(self, jobs: list[Any], clips: dict[str, np.ndarray], n: int, temperature: float) -> list[Rollout]:
        out = []
        for prompt, view, _ in jobs:
            assert n == 1 and (view == "text" or prompt.id in clips)
            word = prompt.answer if view == "text" or prompt.group == "even" else "ten."
            ids = (*self.family.tokenizer(word, add_special_tokens=False).input_ids, self.family.eos_ids[0])
            out.append(Rollout(prompt, view, ids, None, 0, truncated=prompt.id == "4"))
        return out


@pytest.fixture
def config() -> Config:
    os.chdir(ROOT)
    return load_config("recipes/tiny/2_xopd.yaml", [f"student.path={STUDENT}", "eval.kl_limit=9"])


def evaluate(config: Config, teacher: Any, world: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Results of all ranks. They run one after another: first to collect their sums, then again with everyone's."""
    family = family_of(STUDENT)
    sent: list[list[torch.Tensor]] = []
    for rank in range(world):
        mine: list[torch.Tensor] = []
        monkeypatch.setattr(opd.train.evaluator, "all_reduce", lambda x, op, mine=mine: mine.append(x.clone()) or x)
        _evaluator(config, teacher, family, rank, world).run()
        sent.append(mine)
    results = []
    for rank in range(world):
        calls = [sum(parts) for parts in zip(*sent, strict=True)]  # as many collectives on every rank
        monkeypatch.setattr(opd.train.evaluator, "all_reduce", lambda x, op, calls=calls: calls.pop(0))
        results.append(_evaluator(config, teacher, family, rank, world).run())
    return results


def _evaluator(config: Config, teacher: Any, family: Any, rank: int, world: int) -> Evaluator:
    learner, sampler = Student(family, rank, world), Sampler()
    sampler.family = family
    clips = SimpleNamespace(load=lambda p: {p.id: CLIPS[p.id]})
    return Evaluator(
        config=config,
        family=family,
        learner=learner,
        teacher=teacher,
        sampler=sampler,
        clips=clips,
        test=prompts(),
        retention=prompts()[:4],
    )


class ByHand:
    """Log-probabilities [T, V] of a text, by plain forward passes."""

    def __init__(self, family: Any) -> None:
        self.family, self.hf = family, family.load(torch.float32, "sdpa").eval()
        self.banned = torch.zeros(family.vocab_size, dtype=torch.bool)
        self.banned[family.banned_ids] = True

    @torch.no_grad()
    def student(self, prompt: Prompt, view: View, answer: list[int]) -> torch.Tensor:
        spoken = {"audio": [CLIPS[prompt.id]], "sampling_rate": 16000} if view == "speech" else {}
        audio = "<|audio_bos|><|AUDIO|><|audio_eos|>"
        text = audio if spoken else prompt.messages[0]["content"][0]["transcript"]
        inputs = dict(self.family.processor(text=self.chat(text), return_tensors="pt", **spoken))
        return self.logp(self.hf, inputs, answer)

    @torch.no_grad()
    def teacher(self, model: Any, prompt: Prompt, answer: list[int]) -> torch.Tensor:
        text = self.chat(prompt.messages[0]["content"][0]["transcript"])
        return self.logp(model, dict(self.family.tokenizer(text, return_tensors="pt")), answer)

    @staticmethod
    def chat(text: str) -> str:
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def logp(self, model: Any, inputs: dict[str, torch.Tensor], answer: list[int]) -> torch.Tensor:
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer])], 1)
        logits = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        return torch.log_softmax(logits[0, -len(answer) - 1 : -1].masked_fill(self.banned, EXCLUDED), -1)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def test_an_evaluation_by_hand_whatever_the_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(STUDENT)
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    said = {p.id: "ten." if p.id == "1" else p.answer for p in prompts()}

    def respond(asked: list[Prompt], limit: int) -> list[tuple[tuple[int, ...], bool]]:
        ids = [family.tokenizer(said[p.id], add_special_tokens=False).input_ids for p in asked]
        return [((*i, family.eos_ids[0]), False) for i in ids]

    monkeypatch.setattr(teacher, "respond", respond)
    monkeypatch.setattr(opd.train.evaluator, "PAIRS", 4)  # rank 0 of 2 then has a chunk of one more than rank 1
    (alone,) = evaluate(config, teacher, 1, monkeypatch)
    monkeypatch.setattr("opd.config.needs.ELEMENTS", 3 * family.vocab_size)
    made: list[int] = []
    project = SpeechLM.project
    monkeypatch.setattr(SpeechLM, "project", lambda self, states: made.append(len(states)) or project(self, states))
    for shared in evaluate(config, teacher, 2, monkeypatch):
        assert shared.keys() == alone.keys()
        for name in set(alone) - {"groups"}:
            assert shared[name] == pytest.approx(alone[name], abs=1e-6), name
        by_group = shared["groups"].pop("misalignment")
        assert shared["groups"] == {v: alone["groups"][v] for v in VIEWS}
        assert by_group == {g: pytest.approx(e, abs=1e-6) for g, e in alone["groups"]["misalignment"].items()}
    assert max(made) == 3  # logits are made in chunks here too

    # 11 records, 6 of them even; record 4 is cut off, the teacher misses record 1
    assert alone["accuracy/speech"]["mean"] == pytest.approx(5 / 11) and alone["accuracy/speech"]["n"] == 11
    assert alone["accuracy/text"]["mean"] == pytest.approx(10 / 11)
    assert alone["accuracy/teacher"]["mean"] == pytest.approx(10 / 11)
    assert alone["drop/speech"]["mean"] == pytest.approx(50.0) and alone["drop/text"]["mean"] == pytest.approx(0.0)
    assert alone["groups"]["speech"]["even"]["mean"] == pytest.approx(5 / 6)
    assert alone["groups"]["speech"]["odd"] == {"mean": 0.0, "stderr": 0.0, "n": 5}
    assert alone["retention"]["mean"] == 0.5 and alone["retention"]["n"] == 4

    sums = dict.fromkeys(("misalignment", "forgetting", "reverse_kl/speech", "reverse_kl/text"), 0.0)
    tokens = dict.fromkeys(sums, 0)
    of_even = [0.0, 0]
    by_hand = ByHand(family)
    for p in prompts()[:9]:
        gold = [*family.tokenizer(p.response, add_special_tokens=False).input_ids, family.eos_ids[0]]
        speech, text = (by_hand.student(p, v, gold) for v in VIEWS)
        sums["misalignment"] += kl(text, speech)
        if p.group == "even":
            of_even = [of_even[0] + kl(text, speech), of_even[1] + len(gold)]
        sums["forgetting"] += kl(by_hand.teacher(teacher.model, p, gold), text)
        tokens["misalignment"] += len(gold)
        tokens["forgetting"] += len(gold)
        for view in VIEWS:
            word = p.answer if view == "text" or p.group == "even" else "ten."
            own = [*family.tokenizer(word, add_special_tokens=False).input_ids, family.eos_ids[0]]
            sums[f"reverse_kl/{view}"] += kl(by_hand.student(p, view, own), by_hand.teacher(teacher.model, p, own))
            tokens[f"reverse_kl/{view}"] += len(own)
    for name, total in sums.items():
        assert alone[name]["mean"] == pytest.approx(total / tokens[name], rel=1e-4), name
        assert alone[name]["n"] == 9 and alone[name]["mean"] > 0.01, name
    even = alone["groups"]["misalignment"]["even"]
    assert even["mean"] == pytest.approx(of_even[0] / of_even[1], rel=1e-4) and even["n"] == 5
    assert even["mean"] != pytest.approx(alone["misalignment"]["mean"], rel=1e-2)


def test_a_teacher_equal_to_the_students_text_side_finds_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    family = family_of(STUDENT)
    hf: Any = family.load(torch.float32, "sdpa")
    text_side = Qwen2ForCausalLM(hf.config.text_config)
    text_side.model.load_state_dict(hf.model.language_model.state_dict())
    text_side.lm_head.load_state_dict(hf.lm_head.state_dict())
    text_side.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(config.teacher.path).save_pretrained(tmp_path)
    config = config.changed({"teacher.path": str(tmp_path)})
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    monkeypatch.setattr(teacher, "respond", lambda asked, limit: [((family.eos_ids[0],), False)] * len(asked))
    (found,) = evaluate(config, teacher, 1, monkeypatch)
    for name in ("forgetting", "reverse_kl/text"):
        assert found[name]["mean"] == pytest.approx(0.0, abs=1e-6), name
    assert found["misalignment"]["mean"] > 0.01 and found["reverse_kl/speech"]["mean"] > 0.01


def test_an_interim_evaluation_asks_no_teacher_and_few_records(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config.changed({"eval.every": 5, "eval.every_limit": 3})
    monkeypatch.setattr(opd.train.evaluator, "all_reduce", lambda x, op: x)
    found = _evaluator(config, None, family_of(STUDENT), 0, 1).interim()
    assert set(found) == {*(f"{n}/{v}" for n in ("accuracy", "length") for v in VIEWS), "retention"}
    # records 0, 1, 2: every other one is right in the speech view, all in the text view; answers of 3, 2 and 6 tokens
    assert found["accuracy/speech"]["mean"] == pytest.approx(2 / 3) and found["accuracy/text"]["mean"] == 1.0
    assert found["retention"]["mean"] == pytest.approx(2 / 3) and found["retention"]["n"] == 3
    ids = [len(family_of(STUDENT).tokenizer(w, add_special_tokens=False).input_ids) + 1 for w in WORDS]
    assert found["length/text"]["mean"] == pytest.approx(sum(ids) / 3)


@pytest.mark.parametrize("best", ["misalignment", "reverse_kl/speech"])
def test_an_interim_evaluation_measures_what_checkpoints_are_chosen_by(
    config: Config, monkeypatch: pytest.MonkeyPatch, best: str
) -> None:
    config = config.changed({"eval.every": 5, "eval.every_limit": 3})
    monkeypatch.setattr(opd.train.evaluator, "all_reduce", lambda x, op: x)
    teacher = LocalTeacher(config, family_of(STUDENT), torch.device("cpu"))
    plain = _evaluator(config, teacher, family_of(STUDENT), 0, 1)
    whole, without = plain.run(), plain.interim()
    config = config.changed({"eval.best": best})
    found = _evaluator(config, teacher, family_of(STUDENT), 0, 1).interim()
    assert best not in without and found[best] == whole[best] and found[best]["n"] == 9  # eval.kl_limit, as there


def test_records_without_a_response_have_no_share_in_divergences_along_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd.train.evaluator, "all_reduce", lambda x, op: x)
    teacher = LocalTeacher(config, family_of(STUDENT), torch.device("cpu"))
    evaluator = _evaluator(config, teacher, family_of(STUDENT), 0, 1)
    bare = [replace(p, response=None) for p in evaluator.test]
    evaluator.test = evaluator.test[2:4]
    two = evaluator._divergences()
    evaluator.test = [*bare[:2], *evaluator.test, *bare[4:]]
    assert evaluator._divergences() == two and two["misalignment"]["n"] == two["forgetting"]["n"] == 2
    evaluator.test = bare
    assert evaluator._divergences() == {} and set(evaluator._reverse_kl()) == {"reverse_kl/speech", "reverse_kl/text"}
    follows = config.changed({"eval.best": "misalignment"})
    with pytest.raises(UserError, match="eval.best misalignment: follows gold responses: expected a `response`"):
        replace(evaluator, config=follows, test=bare)


@pytest.mark.parametrize(
    ("best", "logits", "scores", "message"),
    [
        ("forgetting", False, True, "eval.best forgetting: needs the teacher's full-vocabulary logits"),
        ("reverse_kl/text", True, False, "eval.best reverse_kl/text: a teacher with another tokenizer"),
    ],
)
def test_what_the_teacher_cannot_measure_is_refused(
    config: Config, best: str, logits: bool, scores: bool, message: str
) -> None:
    config = config.changed({"eval.best": best})
    with pytest.raises(UserError, match=message):
        _evaluator(config, SimpleNamespace(gives_logits=logits, gives_scores=scores), family_of(STUDENT), 0, 1)
    _evaluator(config, SimpleNamespace(gives_logits=True, gives_scores=True), family_of(STUDENT), 0, 1)


def test_a_whole_evaluation_notes_the_records_of_an_interim_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.changed({"eval.every": 5, "eval.every_limit": 3})
    monkeypatch.setattr(opd.train.evaluator, "all_reduce", lambda x, op: x)
    monkeypatch.setattr(Evaluator, "_divergences", lambda self, *_: {})
    monkeypatch.setattr(Evaluator, "_reverse_kl", lambda self: {})
    monkeypatch.setattr(Evaluator, "_teacher", lambda self: [1.0] * len(self.test))
    evaluator = _evaluator(config, None, family_of(STUDENT), 0, 1)
    whole, interim = evaluator.run(), evaluator.interim()
    assert whole["first"] == interim and whole["accuracy/text"]["n"] == len(CLIPS)
    assert "first" not in replace(evaluator, config=config.changed({"eval.every": None})).run()
