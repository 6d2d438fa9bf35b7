"""Rules of public benchmarks: words, ratings, rubrics, and what lmms-eval ships; cases worked by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_openai import Call, FakeOpenAI, Reply, serving

from opd.scoring import voicebench as official
from opd.scoring.answers import tokens_match
from opd.scoring.scorer import MET, RATED, Judge, Scorer, ScoringConfig, met_of, rating_of, verdict
from opd.scoring.voicebench import FOUR, UNDECIDED, Grade, grade
from opd.settings import UserError, validated
from opd.types import Prompt


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("A park", True),
        ("in the park, a green one.", True),  # order, other words and punctuation do not matter
        ("A park bench", False),  # "bench" is of another choice only
        ("park", False),  # a word of the answer is missing
        ("A  PARK!", True),
        ("(B) A park", True),
        ("a park, not the road", False),
        ("", False),
        ("...", False),
        ("A park by the sea", True),  # further words are none of a wrong choice
    ],
)
def test_tokens(text: str, right: bool) -> None:
    # words of wrong choices that count against an answer: bench, road; "a" and "park" are the answer's too
    assert tokens_match(text, "A park", ["A park", "a bench", "park road"]) is right


def test_tokens_of_choices_within_one_another() -> None:
    choices = ["two", "two or three", "snake_case", "It's 3.5"]
    assert tokens_match("two", "two", choices) and not tokens_match("two or three", "two", choices)
    assert tokens_match("three or two", "two or three", choices)  # its words are what counts
    assert not tokens_match("snake case", "snake_case", choices) and tokens_match("snake_case", "snake_case", choices)
    assert tokens_match("It is s 3 5 it", "It's 3.5", choices)  # split into it, s, 3, 5


@pytest.mark.parametrize(
    ("text", "found"),
    [("4", 4.0), (" 5.\n", 5.0), ("**3**", 3.0), ("4.5", 4.5), ("Rating: [[2]]", 2.0), ("0", None), ("6", None),
     ("4 points", None), ("", None), ("[[9]]", None)],
)  # fmt: skip
def test_ratings(text: str, found: float | None) -> None:
    assert rating_of(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes.", True),
        ("no", False),
        ('```json\n{\n"explanation": "It does\nnot.",\n"criteria_met": false\n}\n```', False),
        ('{"explanation": "}", "criteria_met": true}', True),
        ('{"criteria_met": "true"}', None),
        ('{"explanation": "cut', None),
        ("It meets it.", None),
    ],
)
def test_criteria(text: str, found: bool | None) -> None:
    assert met_of(text) is found
    assert (verdict("CORRECT"), verdict("incorrect."), verdict("correct, yes")) == (True, False, None)


# ---- judges ---------------------------------------------------------------------------------------------------------


def prompt(match: str, answer: str | None = None) -> Prompt:
    turns = [
        {"role": "user", "content": [{"type": "audio", "path": "a.wav", "transcript": "be brief {please}"}]},
        {"role": "assistant", "content": "sure"},
        {"role": "user", "content": [{"type": "audio", "path": "b.wav", "transcript": "who wrote it"}]},
    ]
    return Prompt("p", tuple(turns), answer=answer, match=match, place="m:1")  # type: ignore[arg-type]


def judged(call: Call) -> Reply:
    """Replies of a judge, in the order of `n`, that stand in brackets in the graded answer."""
    said = call.body["messages"][-1]["content"]
    replies = said.split("<<")[1].split(">>")[0].split("|")
    criterion = "second" in said.split("Criterion")[-1]
    some = [replies[criterion]] if "Criterion" in said else replies[: call.body.get("n", 1)]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": r}, "finish_reason": "stop"}
        for i, r in enumerate(some)
    ]
    return Reply({"choices": choices})


@pytest.fixture
def court() -> Iterator[FakeOpenAI]:
    with serving(FakeOpenAI(judged)) as fake:
        yield fake


def scorer(court: FakeOpenAI, **settings: Any) -> Scorer:
    return Scorer(
        validated(ScoringConfig, {"judge": {"url": court.url, "model": "m", "retries": 1} | settings}, "r.yaml")
    )


def test_a_rating_is_a_fifth_of_its_points(court: FakeOpenAI) -> None:
    rates = scorer(court, rating_prompt="Rate {response} to {question}.")
    answers = [(prompt("rating"), f"<<{said}>>", cut) for said, cut in [("4", False), ("good", False), ("5", True)]]
    assert rates.grade(answers) == [
        Grade(0.8, {RATED: (4.0, 1.0)}),
        Grade(None),  # nonsense
        Grade(False, {RATED: (0.0, 1.0)}),  # it never ended
    ]
    assert [c.body["messages"][0]["content"] for c in court.calls if "4" in str(c.body)] == [
        "Rate <<4>> to who wrote it."
    ]
    three = scorer(court, rating_prompt="{question} {response}", samples=3, temperature=0.5)
    (found,) = three.grade([(prompt("rating"), "<<5|4|none>>", False)])
    assert found == Grade(0.9, {RATED: (4.5, 1.0)})
    assert court.calls[-1].body["n"] == 3 and court.calls[-1].body["temperature"] == 0.5


def test_a_rubric_is_met_as_a_whole(court: FakeOpenAI) -> None:
    checks = scorer(court)
    record = prompt("rubric", json.dumps(["the first", "the second"]))
    replies = ["yes|yes", 'yes|{"criteria_met": false}', "yes|perhaps"]
    grades = checks.grade([*((record, f"<<{r}>>", False) for r in replies), (record, "<<yes|yes>>", True)])
    assert grades == [
        Grade(True, {MET: (1.0, 1.0)}),
        Grade(False, {MET: (0.5, 1.0)}),
        Grade(None, {MET: (0.5, 1.0)}),  # a verdict without sense: not met
        Grade(False, {MET: (0.0, 1.0)}),
    ]
    said = court.calls[0].body["messages"][0]["content"]
    assert "user: be brief {please}\nassistant: sure\nuser: who wrote it\nassistant: <<" in said


def test_most_verdicts_count(court: FakeOpenAI) -> None:
    three = scorer(court, samples=3, prompt="big_bench_audio")
    words = ["correct|incorrect|correct", "no|no|yes", "yes|no|perhaps", "a|b|c"]
    grades = three.grade([(prompt("judge", "Ann"), f"<<{w}>>", False) for w in words])
    assert [g.score for g in grades] == [True, False, False, None]
    asked = court.calls[0].body["messages"][0]["content"]
    assert "The official answer: Ann" in asked and asked.endswith("correct or incorrect.")


@pytest.mark.parametrize(
    ("key", "template", "reason"),
    [
        ("rating_prompt", "{question}", "expected {question} and {response}"),
        ("rubric_prompt", "{criterion} {rubric}", "expected {conversation} and {criterion}"),
        ("prompt", "bba", "expected {question}, {answer} and {response}"),
    ],
)
def test_a_judges_prompts_must_be_whole(key: str, template: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"r.yaml: judge.{key}: {reason}"):
        validated(ScoringConfig, {"judge": {"url": "http://h/v1", "model": "m", key: template}}, "r.yaml")


@pytest.mark.parametrize(
    ("match", "answer", "reason"),
    [
        ("rating", None, "m:1: match rating needs eval.judge with url and model"),
        ("rubric", "say it", "m:1: answer: match rubric needs a JSON list of criteria, found 'say it'"),
        ("rubric", '["a", 3]', "each a string, found"),
        ("ifeval", '[{"id": "a"}]', 'm:1: answer: match ifeval needs a JSON list of {"id", "kwargs"}, found'),
        ("voicebench_mcq", "E", "m:1: answer: match voicebench_mcq needs one of the letters A, B, C, D, found 'E'"),
        ("voicebench_bbh", "yes", "m:1: group: match voicebench_bbh needs one of hyperbaton, navigate,"),
        ("tokens", "x", "m:1: answer: match tokens needs one of the choices, found 'x'"),
        ("judge", None, "m:1: an evaluation needs an `answer`, the record has none"),
    ],
)
def test_records_that_cannot_be_graded(match: str, answer: str | None, reason: str) -> None:
    with pytest.raises(UserError) as e:
        Scorer(ScoringConfig()).check([prompt(match, answer)])
    assert reason in str(e.value)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = "the module lmms_eval is not installed: pip install opd.benchmarks."
    with pytest.raises(UserError, match=f"match voicebench_refusal: {told}"):
        Scorer(ScoringConfig()).check([prompt("voicebench_refusal")])
    with pytest.raises(UserError, match=told):  # VoiceBench's own prompt for ratings
        Scorer(ScoringConfig(judge=Judge(url="http://h/v1", model="m"))).check([prompt("rating")])
    own = Judge(url="http://h/v1", model="m", rating_prompt="{question} {response}")
    Scorer(ScoringConfig(judge=own)).check([prompt("rating")])
    for more in ({"prompt": "voicebench_qa"}, {"system": "voicebench"}):
        with pytest.raises(UserError, match=told):
            Scorer(ScoringConfig(judge=Judge(url="http://h/v1", model="m", **more))).check([prompt("judge", "Ann")])
    Scorer(ScoringConfig(judge=Judge(url="http://h/v1", model="m", system="s"))).check([prompt("judge", "Ann")])


# ---- with lmms-eval -------------------------------------------------------------------------------------------------


def test_voicebench_by_its_own_rules(court: FakeOpenAI) -> None:
    def of(match: str, text: str, answer: str = "", group: str = "") -> Grade:
        return grade(match, text, answer, group, "")

    assert of("voicebench_mcq", "The answer is B.", "B") == Grade(True, {UNDECIDED: (0.0, 1.0)})
    assert of("voicebench_mcq", "c", "B") == Grade(False, {UNDECIDED: (0.0, 1.0)})
    assert of("voicebench_mcq", "no idea", "B") == Grade(0.25, {UNDECIDED: (1.0, 1.0)})  # what its draw is worth
    assert of("voicebench_bbh", "So the answer is yes", "yes", "navigate") == Grade(True, {UNDECIDED: (0.0, 1.0)})
    assert of("voicebench_bbh", "No.", "Yes", "web_of_lies").score is False
    assert of("voicebench_bbh", "hm", "(a)", "hyperbaton") == Grade(0.5, {UNDECIDED: (1.0, 1.0)})
    assert of("voicebench_bbh", "b", "(b)", "hyperbaton").score is False  # its rules take the bare letter b for (a)
    assert of("voicebench_refusal", "I'm sorry, I can't.").score is True
    assert of("voicebench_refusal", "Sure, first you").score is False
    assert of("voicebench_refusal", "  ").score is True  # silence is safe
    assert scorer(court).grade([(prompt("voicebench_refusal"), "", True)]) == [Grade(False)]  # but for what never ends
    (rated,) = scorer(court).grade([(prompt("rating"), "<<3>>", False)])
    assert rated.score == 0.6 and "[Instruction]: who wrote it" in court.calls[-1].body["messages"][0]["content"]


def test_voicebench_judges_as_its_own_code_asks(court: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks.voicebench import utils

    sent: list[Any] = []

    class Server:
        def evaluate(self, request: Any) -> Any:
            sent.append(request.messages)
            return SimpleNamespace(success=True, content="Yes")

    monkeypatch.setattr(utils, "server", Server())
    monkeypatch.setitem(sys.modules, "qa_metrics.pedant", None)  # its classifier would be fetched from the net
    said = "<<Yes.|No|yes>>"
    utils.voicebench_process_results_qa({"prompt": "who wrote it", "reference": "Ann {B}"}, [said])
    authors = {"samples": 3, "temperature": 0.5, "top_p": 0.95, "system": "voicebench"}
    (found,) = scorer(court, prompt="voicebench_qa", **authors).grade([(prompt("judge", "Ann {B}"), said, False)])
    body = court.calls[-1].body
    assert found == Grade(True) and body["messages"] == sent[0] and len(sent) == 1
    assert (body["n"], body["temperature"], body["top_p"]) == (3, 0.5, 0.95)
    scorer(court, system="Be just.").grade([(prompt("judge", "Ann"), said, False)])
    body = court.calls[-1].body
    assert body["messages"][0] == {"role": "system", "content": "Be just."} and "top_p" not in body
    scorer(court).grade([(prompt("judge", "Ann"), said, False)])
    assert [m["role"] for m in court.calls[-1].body["messages"]] == ["user"]


def test_a_library_without_the_prompt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = SimpleNamespace(voicebench_process_results_qa=lambda doc, results: "{prompt} {response}")
    monkeypatch.setattr(official, "_voicebench", lambda: changed)
    official.qa_prompt.cache_clear()
    with pytest.raises(UserError, match="no prompt for sd-qa any more: write eval.judge.prompt yourself"):
        official.qa_prompt()
    with pytest.raises(UserError, match="no system message any more: write eval.judge.system yourself"):
        official.system_message()


def test_ifeval_strict_and_loose() -> None:
    asked = [
        {"id": "punctuation:no_comma", "kwargs": {}},
        {"id": "length_constraints:number_words", "kwargs": {"num_words": 3, "relation": "at least"}},
    ]
    text = "Sure, here it is:\none two three four"  # without its first line it has no comma
    found = grade("ifeval", text, json.dumps(asked), "", "q")
    assert found.parts == dict(zip(FOUR, [(0.0, 1.0), (1.0, 2.0), (1.0, 1.0), (2.0, 2.0)], strict=True))
    assert found.score == (0 + 1 / 2 + 1 + 1) / 4
    assert grade("ifeval", "  ", json.dumps(asked), "", "q").score == 0
    repeat = [{"id": "combination:repeat_prompt", "kwargs": {"prompt_to_repeat": "do it"}}]
    assert grade("ifeval", "do it\nnow", json.dumps(repeat), "", "do it").score == 1
    with pytest.raises(UserError, match="lmms-eval knows no instruction 'x:y'"):
        grade("ifeval", "a", json.dumps([{"id": "x:y", "kwargs": {}}]), "", "q")
    cut = Scorer(ScoringConfig()).grade([(prompt("ifeval", json.dumps(asked)), text, True)])[0]
    assert cut.score == 0 and cut.parts["loose, instructions"] == (0.0, 2.0)
