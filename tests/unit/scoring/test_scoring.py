"""What counts as right: choices, numbers, judges and their nonsense; manifests that cannot be scored."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd.endpoint import Unavailable
from opd.prompts.manifest import parse_record
from opd.scoring.answers import check_answer, choice_of, correct, number_of
from opd.scoring.scorer import Judge, Scorer, ScoringConfig, verdict
from opd.settings import UserError, validated
from opd.types import Prompt

CITIES = ("Paris", "London", "New York", "York")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b). ", "B"),
        ("**B**", "B"),
        ("E", None),  # there are four
        ("The answer is B", "B"),
        ("answer: **c**", "C"),
        ("I choose A because it is large", "A"),
        ("the answer is a.", "A"),
        ("the answer is a city", None),
        ("The answer is I think London", "B"),
        ("It is not A. The answer is B.", "B"),
        ("Option a is wrong, option b is right", "B"),  # the last that is named
        ("B. Paris", "B"),  # what is labelled goes before what is said
        ("b) Paris", "B"),
        ("It is London, I think.", "B"),
        ("it is LONDON", "B"),
        ("I love New York!", "C"),  # not York
        ("New York, or York", None),
        ("York.", "D"),
        ("Paris or London", None),
        ("Parisian food", None),  # whole words only
        ("Surely D here", "D"),
        ("Either B or D", None),
        ("A dog barks", None),
        ("My choice is not a good one", None),
        ("", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert choice_of(text, CITIES) == letter


def test_choices_of_signs_and_of_scripts_without_spaces() -> None:
    for options, said in {
        ("+", "-", "*"): {"+": "A", "It is -": None, "B": "B", "the sign *": "C"},
        ("C", "C++", "C#"): {"C++": "B", "C#.": "C", "C": "A", "I would learn C++ first": "B", "the answer is C#": "C"},
        ("Java", "C++", "Rust"): {"C++": "B", "The answer is C++": "B", "C": "C"},
        ("5", "-5"): {"-5": "B", "it is \u22125.": "B", "it is 5": "A"},
        ("-5", "7"): {"it is 5": None, "it is -5": "A"},
        ("दिन", "दान"): {"यह दान है": "B", "दिन": "A", "यह दन है": None},
        ("北京", "上海"): {"答案是上海。": "B", "选择B。": "B", "上": None},
        ("H2O", "H₂O"): {"it is H₂O.": "B", "H2O.": "A", "h2o": None},
        ("10^2", "10²"): {"10².": "B", "= 10^2": "A"},
        ("A", "a"): {"a": "B", "a.": "B", "it is A": "A"},
        ("X!", "x"): {"X!": "A", "x": "B"},
        ("caf\u00e9", "cafe"): {"a cafe\u0301": "A", "a cafe": "B"},
    }.items():
        check_answer(options[1], "choice", options)
        assert {text: choice_of(text, options) for text in said} == said


def test_the_same_letters_in_one_and_in_two_characters_are_exact() -> None:
    assert correct(Prompt("p", (), answer="caf\u00e9"), " cafe\u0301\n")


def test_choice_without_options_reads_letters_only() -> None:
    assert choice_of("The answer is E.") == "E" and choice_of("Paris") is None and choice_of("") is None


@pytest.mark.parametrize(("answer", "right"), [("B", True), ("(b)", True), ("london", True), ("Paris", False)])
def test_gold_choices(answer: str, right: bool) -> None:
    prompt = Prompt("p", (), answer=answer, match="choice", choices=CITIES)
    assert correct(prompt, "I would say London.") is right
    assert correct(prompt, "none of them") is False


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the total is 1,234.5", 1234.5),
        ("it is -3.", -3.0),
        ("it is \u22124", -4.0),
        ("-$5", -5.0),
        ("$ 7", 7.0),
        ("2e-5", 2e-5),
        ("3/4", 0.75),
        ("8/0", None),
        ("2 or 8/0", 2.0),
        ("\u0661\u066c\u0660\u0660\u0660", 1000.0),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", 1234.5),
        ("１，５", 1.5),
        ("１，０００", 1000.0),
        ("－５．５", -5.5),
        ("5²", 5.0),
        ("it is –5", -5.0),
        ("10–12", 12.0),
        ("it is −\u00a05", -5.0),
        ("−\u00a0,5", -0.5),
        ("12 −\u00a07", 7.0),
        ("yes - 5", 5.0),
        ("is ,5", 0.5),
        ("yes,5 and 3 ,5", 5.0),
        ("1_000", 1000.0),
        ("1.00.000", 100000.0),
        ("9007199254740993", 9007199254740993),
        ("12%", 12.0),
        ("10-12", 12.0),
        ("x = .5", 0.5),
        ("5 plus 7 is 12.", 12.0),
        ("1,2,3", 3.0),
        ("1.2.3", 3.0),
        ("12.05.2024", 2024.0),
        ("1,5", 1.5),
        ("1 000", 1000.0),
        ("12\u202f345\u00a0678,25", 12345678.25),
        ("1'234.5", 1234.5),
        ("1.000,5", 1000.5),
        ("1.234.567", 1234567.0),
        ("12,34,567.5", 1234567.5),
        ("1,500", 1500.0),
        ("0,500", 0.5),
        ("1.500", 1.5),
        ("1234,567", 1234.567),
        ("in 2020 100 people", 100.0),
        ("2,5 100", 100.0),
        ("1 1/2", 1.5),
        ("-1\u00bd", -1.5),
        ("\u2212\u00be", -0.75),
        ("5 10/2", 5.0),
        ("\u20ac-1.000,50", -1000.5),
        ("\u0967\u0968", 12.0),  # Devanagari
        ("\u0661\u0662\u066b\u0665", 12.5),  # Arabic
        ("1" + "0" * 400 + " and 7e999", None),  # not finite
        ("five", None),
        ("", None),
    ],
)
def test_number(text: str, number: float | None) -> None:
    assert number_of(text) == number


def test_numbers_within_a_tolerance() -> None:
    prompt = Prompt("p", (), answer="0.3", match="number")
    assert correct(prompt, "0.1 + 0.2 = 0.30000000000000004") and not correct(prompt, "0.31")
    assert correct(prompt, "0.31", tolerance=0.01) and not correct(prompt, "0.32", tolerance=0.01)
    own = Prompt("p", (), answer="100", match="number", tolerance=0.0)
    assert not correct(own, "101", tolerance=5.0)  # the record's own goes first
    assert not correct(prompt, "none")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("5551234567", "5,551,234,567.0", "5551234568"),
        ("9007199254740993", "9007199254740993", "9007199254740992"),
        ("1e-10", "0.0000000001", "2e-10"),
        ("1/3", "2/6", "0.3333"),
        ("123456789012.34", "123,456,789,012.34", "123456789012.35"),
        ("0", "-0.0", "1e-12"),
    ],
)
def test_numbers_without_a_tolerance(answer: str, right: str, wrong: str) -> None:
    prompt = Prompt("p", (), answer=answer, match="number")
    assert correct(prompt, right) and not correct(prompt, wrong)
    assert correct(Prompt("p", (), answer="5551234567", match="number", tolerance=1), "5551234568")
    assert not correct(Prompt("p", (), answer="5551234567", match="number", tolerance=1), "5551234569")


def test_match_of_all_stands_in_for_the_records() -> None:
    prompt = Prompt("p", (), answer="7")
    assert not correct(prompt, "it is 7.0") and correct(prompt, "it is 7.0", "number")
    scorer = Scorer(ScoringConfig(match="number"))
    assert [g.score for g in scorer.grade([(prompt, "it is 7.0", False), (prompt, "7", True)])] == [True, False]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"match": "choice", "answer": "E", "choices": ["x", "y"]},
            "answer: match choice needs one of 'x', 'y', or its",
        ),
        ({"match": "choice", "answer": "yes"}, "answer: match choice needs a letter, found 'yes'"),
        ({"match": "choice", "answer": "A", "choices": ["x"]}, "choices: expected 2 to 26 options, found 1"),
        (
            {"match": "choice", "answer": "A", "choices": ["x ", "x"]},
            "choices: expected options that differ",
        ),
        ({"answer": "A", "choices": "xy"}, "choices: expected a list of strings, found 'xy'"),
        ({"match": "number", "answer": "five"}, "answer: match number needs one with a number in digits, found 'five'"),
        ({"match": "regex", "answer": "("}, "answer: expected a regular expression, found '('"),
        ({"match": "number", "answer": "5", "tolerance": -1}, "tolerance: expected a number of 0 or more, found -1"),
        (
            {"match": "number", "answer": "5", "tolerance": True},
            "tolerance: expected a number of 0 or more",
        ),
        (
            {"match": "fuzzy"},
            "match: expected exact, regex, choice, number, tokens, judge, rating, rubric, voicebench_mcq, ",
        ),
    ],
)
def test_records_that_cannot_be_scored(tmp_path: Path, more: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError) as e:
        parse_record({"audio": "a.wav", "transcript": "t", **more}, tmp_path, "m:1")
    assert reason in str(e.value)


def test_fields_of_a_record(tmp_path: Path) -> None:
    more = {"match": "choice", "answer": "b", "choices": ["x", "y"], "voice": "ann", "snr": 5, "ok": True}
    found = parse_record({"audio": "a.wav", "transcript": "t", "tolerance": 0.5, **more}, tmp_path, "m:1")
    assert (found.choices, found.tolerance, found.other, found.numbers) == (
        ("x", "y"), 0.5, {"voice": "ann"}, {"snr": 5.0},
    )  # fmt: skip


def test_answers_are_checked_by_the_match_that_counts() -> None:
    prompt = Prompt("p", (), answer="five", place="m:3")
    with pytest.raises(UserError, match="eval.test: m:3: answer: match number"):
        Scorer(ScoringConfig(match="number")).check([prompt], "eval.test")
    with pytest.raises(UserError, match="eval.test: m:3: match judge needs eval.judge"):
        Scorer(ScoringConfig(match="judge")).check([prompt], "eval.test")
    with pytest.raises(UserError, match="m:4: an evaluation needs an `answer`"):
        Scorer(ScoringConfig()).check([Prompt("q", (), place="m:4")])
    check_answer("anything", "judge", ())


# ---- judge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [("Yes", True), (" no.\n", False), ("**No**", False), ("Yes, it is", None), ("", None), ("not", None)],
)
def test_verdict(text: str, found: bool | None) -> None:
    assert verdict(text) is found


class Court(http.server.BaseHTTPRequestHandler):
    """Judges by what the graded answer says."""

    asked: list[dict] = []

    def do_POST(self) -> None:  # noqa: N802 - the library's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        said = body["messages"][0]["content"]
        status = 400 if "refuse" in said else 503 if "down" in said else 200
        word = "yes" if "good" in said else "perhaps" if "odd" in said else "no"
        content = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"}]
        }
        if "empty" in said:
            content = {"choices": []}
        data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", **content}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def court() -> Iterator[str]:
    Court.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Court)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def prompt(match: str = "judge") -> Prompt:
    part = {"type": "audio", "path": "a.wav", "transcript": "who {wrote} it"}
    return Prompt("p", ({"role": "user", "content": [part]},), answer="x", match=match)  # type: ignore[arg-type]


def test_a_judge_grades_only_what_asks_for_it(court: str) -> None:
    scorer = Scorer(ScoringConfig(judge=Judge(url=court, model="m", retries=1)))
    words = ["good", "bad", "odd", "empty", "refuse"]
    answers = [*((prompt(), w, False) for w in words), (prompt(), "good", True), (prompt("exact"), "x", False)]
    # nonsense: neither yes nor no, no choice at all, a refused request; a cut-off answer is wrong without asking
    assert [g.score for g in scorer.grade(answers)] == [True, False, None, None, None, False, True]
    assert len(Court.asked) == 5 and all(b["temperature"] == 0 and b["model"] == "m" for b in Court.asked)
    said = next(b["messages"][0]["content"] for b in Court.asked if "good" in b["messages"][0]["content"])
    assert "who {wrote} it" in said and "Reference answer: x" in said


def test_a_judge_that_is_down_ends_it(court: str) -> None:
    with pytest.raises(Unavailable, match="HTTP 503"):
        Scorer(ScoringConfig(judge=Judge(url=court, model="m", retries=1))).grade([(prompt(), "down", False)])


@pytest.mark.parametrize("template", ["{question} {answer}", "{question} {answer} {response} {more}", "{question"])
def test_a_judges_prompt_must_be_whole(template: str) -> None:
    raw = {"judge": {"url": "http://h/v1", "model": "m", "prompt": template}}
    with pytest.raises(UserError, match="r.yaml: judge.prompt: "):
        validated(ScoringConfig, raw, "r.yaml")
