"""From measured records to tables: metrics, groups, examples, the paired bootstrap, and what may not be compared."""

from __future__ import annotations

import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_runs import EVIL, estimate, evaluation, make_run

from opd.cli import main
from opd.evaluate import page
from opd.evaluate.command import summary
from opd.evaluate.compare import compare, paired
from opd.evaluate.records import read_records, write_records
from opd.evaluate.results import counts, examples, groups, metrics
from opd.settings import UserError
from opd.storage.metrics import EVAL_METRICS


def record(i: int, speech: float | None, text: float | None = True, part: str = "test", **more: Any) -> dict[str, Any]:
    views = {"speech": speech} | ({"text": text, "teacher": True} if part == "test" else {})
    about = {"id": f"q{i}", "part": part, "record": f"r{i}", "question": f"user: {i}", "answer": "a"}
    answers = {v: {"text": f"{v} {i}", "right": r, "tokens": 4 + i % 3, "truncated": False} for v, r in views.items()}
    numbers = {"seconds": float(i)}
    return about | {"fields": {"group": "ab"[i % 2]}, "numbers": numbers, "views": answers} | more


JUDGE = {"model": "m", "prompt": "Is it right? {question} {answer} {response}" + " Say yes or no." * 9, "samples": 1}
SETTINGS = {"student": {"path": "s"}, "max_tokens": 512, "max_audio_seconds": 30.0, "seed": 0, "judge": JUDGE}


def folder(path: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    path.mkdir()
    write_records(path, records)
    (path / "settings.yaml").write_text(yaml.safe_dump({"settings": SETTINGS | {"version": 1} | settings}))
    return path


def test_metrics_by_hand() -> None:
    some = [record(0, True), record(1, False), record(2, False), record(3, True, False)]
    for r, found in zip(some[1:], ({"nats": 3.0, "tokens": 2}, {"nats": 1.0, "tokens": 6}, None), strict=True):
        r["misalignment/sampled"] = found
    some.append(record(4, True, part="retention"))
    found = metrics(some)
    assert found["accuracy/speech"]["mean"] == 0.5 and found["accuracy/speech"]["n"] == 4
    assert found["accuracy/speech"]["stderr"] == pytest.approx(math.sqrt(4 / 3 * 1.0) / 4)
    assert found["accuracy/text"]["mean"] == 0.75 and found["accuracy/teacher"]["mean"] == 1.0
    assert found["drop/speech"]["mean"] == 50.0 and found["drop/text"]["mean"] == 25.0
    assert (
        found["misalignment/sampled"]["mean"] == 0.5 and found["misalignment/sampled"]["n"] == 2
    )  # 4 nats of 8 tokens
    assert found["retention"] == {"mean": 1.0, "stderr": None, "n": 1}
    assert not {"misalignment", "forgetting", "forgetting/sampled"} & found.keys()
    assert counts(some)["left_out"] == {"misalignment/sampled": 1} and counts(some)["records"] == {
        "test": 4,
        "retention": 1,
    }


def test_scores_between_right_and_wrong() -> None:
    heard, typed, teacher = (0.2, 0.6, 1.0, None), (0.8, 0.6, 1.0, True), (1.0, 0.8, 1.0, True)
    some = [record(i, h, t) for i, (h, t) in enumerate(zip(heard, typed, strict=True))]
    for r, own in zip(some, teacher, strict=True):
        r["views"]["teacher"]["right"] = own
    found = metrics([*some, record(9, 0.4, part="retention")])
    assert found["accuracy/speech"]["mean"] == pytest.approx(1.8 / 4) and found["retention"]["mean"] == 0.4
    squares = sum((x - 0.45) ** 2 for x in (0.2, 0.6, 1.0, 0.0))
    assert found["accuracy/speech"]["stderr"] == pytest.approx(math.sqrt(4 / 3 * squares) / 4)
    assert found["drop/speech"]["mean"] == pytest.approx(100 * (1 - 1.8 / 3.8))
    assert found["drop/text"]["mean"] == pytest.approx(100 * (1 - 3.4 / 3.8))
    assert counts(some)["nonsense"] == 1
    assert [e["id"] for e in examples(some)] == ["q0", "q3"]  # worse by a half or more in the speech view
    # further numbers of a rule: ratios of sums, by view
    for r, (met, of) in zip(some, [(1, 2), (3, 3)], strict=False):
        r["views"]["speech"]["parts"] = {"strict, instructions": [met, of]}
    content = summary(some, [], {}) | {"settings": {}}
    assert content["parts"] == {
        "strict, instructions": {"speech": {"mean": 0.8, "stderr": pytest.approx(0.24), "n": 2}}
    }
    told = page.eval_text(content).splitlines()
    assert [t.split() for t in told if "by the rule" in t or "strict" in t] == [
        ["by", "the", "rule", "speech"],
        ["strict,", "instructions", "0.800", "±", "0.240"],
    ]
    assert "<td>0.800 ± 0.240</td>" in page.eval_page(content)


def test_scores_are_compared_in_pairs(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [record(i, (1 + i % 4) / 5) for i in range(40)])
    b = folder(tmp_path / "b", [record(i, (2 + i % 4) / 5) for i in range(40)])
    found = compare([a, b])["differences"]["b"]["accuracy/speech"]
    assert [found[k] for k in ("difference", "low", "high")] == pytest.approx([0.2] * 3)  # each better by one point
    assert found["p"] == pytest.approx(2 / 10_001)


def test_recordings_of_one_question_are_one() -> None:
    some = [record(i, i < 4, question=f"user: {i // 2}") for i in range(8)]
    # four questions, all right or all wrong: the standard error of four values, not of eight
    assert metrics(some)["accuracy/speech"]["stderr"] == pytest.approx(math.sqrt(4 / 3 * 4 * 1.0) / 8)


def test_groups() -> None:
    some = [record(i, i % 2 == 0, **{}) for i in range(8)]
    some[7]["fields"] = {}
    some[0]["numbers"] = {"snr": 5.0}
    found = groups(some, None, {})
    assert list(found) == ["group", "seconds"]
    assert {k: m["accuracy/speech"]["n"] for k, m in found["group"].items()} == {"a": 4, "b": 3, "(none)": 1}
    assert found["group"]["a"]["accuracy/speech"]["mean"] == 1.0
    assert list(found["seconds"]) == ["below 2", "2 to 4", "4 to 6", "6 and more", "(none)"]  # quartiles of 1 to 7
    assert [m["accuracy/text"]["n"] for m in found["seconds"].values()] == [1, 2, 2, 2, 1]
    chosen = groups(some, ["seconds", "snr"], {"seconds": [3.0]})
    assert {k: m["accuracy/text"]["n"] for k, m in chosen["seconds"].items()} == {
        "below 3": 2,
        "3 and more": 5,
        "(none)": 1,
    }
    assert list(chosen["snr"]) == ["all", "(none)"]
    with pytest.raises(UserError, match="no record of eval.test has a field 'accent'; they have group, seco"):
        groups(some, ["accent"], {})


def test_examples_are_worse_by_a_half_or_more() -> None:
    heard = (0.5, 0.51, 0.4, 1.0, None)
    assert [e["id"] for e in examples([record(i, h, 1.0) for i, h in enumerate(heard)])] == ["q0", "q2", "q4"]
    assert examples([record(0, 0.0, 0.4), record(1, 1.0, 0.5)]) == []
    assert [e["id"] for e in examples([record(0, 0.0, 0.5)])] == ["q0"]


def test_examples_take_turns_over_the_groups() -> None:
    some = [record(i, False) for i in (0, 2, 4, 1)] + [record(6, True), record(8, False, False)]
    assert [e["id"] for e in examples(some)] == ["q0", "q1", "q2", "q4"]
    assert examples(some, 1) == [
        {
            "id": "q0",
            "question": "user: 0",
            "answer": "a",
            "speech": "speech 0",
            "text": "text 0",
            "teacher": "teacher 0",
        }
    ]


# ---- bootstrap ------------------------------------------------------------------------------------------------------


def test_bootstrap_of_three_questions_is_near_all_27_draws() -> None:
    first, other = [(0.0, 1.0), (0.0, 1.0), (1.0, 1.0)], [(1.0, 1.0), (1.0, 1.0), (0.0, 1.0)]
    found = paired("accuracy/speech", first, other, ["x", "y", "z"], n=20_000)
    assert found is not None and found["difference"] == pytest.approx(1 / 3)
    every = [np.mean([[1, 1, -1][i] for i in draw]) for draw in product(range(3), repeat=3)]
    share = np.mean([d <= 0 for d in every])  # at least two draws of z: 7 of 27
    assert share == 7 / 27 and found["p"] == pytest.approx(2 * share, abs=0.02)
    assert found["low"] == pytest.approx(-1.0) and found["high"] == pytest.approx(1.0)


def test_bootstrap_agrees_with_the_standard_error_of_clusters() -> None:
    rng = random.Random(0)
    asked = [f"q{i // 3}" for i in range(600)]
    ease = {q: rng.random() for q in asked}
    first = [(float(rng.random() < ease[q]), 1.0) for q in asked]
    other = [(float(rng.random() < min(1.0, ease[q] + 0.1)), 1.0) for q in asked]
    found = paired("accuracy/speech", first, other, asked)
    assert found is not None and (found["records"], found["questions"]) == (600, 200)
    by_question = {q: sum(b[0] - a[0] for a, b, r in zip(first, other, asked, strict=True) if r == q) / 3 for q in ease}
    error = np.std(list(by_question.values()), ddof=1) / math.sqrt(200)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found == paired("accuracy/speech", first, other, asked)  # seeded
    assert found != paired("accuracy/speech", first, other, asked, seed=1)


def test_bootstrap_of_no_difference_and_of_a_clear_one() -> None:
    same = [(1.0, 1.0), (0.0, 1.0)] * 20
    asked = [str(i) for i in range(40)]
    found = paired("retention", same, same, asked)
    assert found is not None and (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)
    clear = paired("retention", [(0.0, 1.0)] * 40, [(1.0, 1.0)] * 40, asked, n=10_000)
    assert clear is not None and clear["low"] == 1.0 and clear["p"] == pytest.approx(2 / 10_001)
    # drop: less is more. 20 of 40 right, then all, of a teacher with all: from 50 % below to none
    drop = paired("drop/speech", same, [(1.0, 1.0)] * 40, asked)
    assert drop is not None and drop["difference"] == -50.0 and drop["high"] < 0
    assert paired("drop/speech", [(0.0, 0.0)] * 2, [(0.0, 0.0)] * 2, ["x", "y"]) is None  # a teacher with none


# ---- the command ----------------------------------------------------------------------------------------------------


def test_compare_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", [record(i, i % 4 == 0) for i in range(40)])
    b = folder(tmp_path / "b", [record(i, i % 4 != 3) for i in reversed(range(40))])  # in any order
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "c")]) == 0
    told = capsys.readouterr().out
    assert "b - a" in told and "+50.0 [+35.0, +65.0], p 0.0002" in told
    content = json.loads((tmp_path / "c" / "compare.json").read_text())
    found = content["differences"]["b"]["accuracy/speech"]
    assert found["difference"] == 0.5 and found["records"] == 40
    html = (tmp_path / "c" / "compare.html").read_text()
    assert "+50.0 [+35.0, +65.0], p 0.0002" in html and "http" not in html.replace("<!doctype html>", "")


def test_other_records_are_refused_or_left_out(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [record(i, True) for i in range(8)])
    other = [record(i, False) for i in range(4, 10)]
    other[0]["record"] = "changed"  # the same id with another clip
    b = folder(tmp_path / "b", other)
    with pytest.raises(UserError, match=r"b: 6 records, 8 in .*a, of which 3 are the same; .*--common"):
        compare([a, b])
    content = compare([a, b], common=True)
    assert [c["metrics"]["accuracy/speech"]["n"] for c in content["columns"]] == [3, 3]
    assert content["differences"]["b"]["accuracy/speech"]["difference"] == -1.0
    assert "Restricted to the 3 records" in content["notes"][0]
    apart = folder(tmp_path / "apart", [record(99, True)])
    with pytest.raises(UserError, match="shares no record"):
        compare([a, apart], common=True)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"max_tokens": 64}, "rollout.max_tokens 512 and 64"),
        ({"max_audio_seconds": 60.0}, "data.max_audio_seconds 30.0 and 60.0"),
        ({"match": "regex"}, "eval.match None and regex"),
        ({"tolerance": 0.5}, "eval.tolerance None and 0.5"),
        ({"version": 2}, "version 1 and 2"),
        ({"judge": None}, "eval.judge m and None"),
        ({"judge": JUDGE | {"model": "n"}}, "eval.judge.model m and n"),
        ({"judge": JUDGE | {"samples": 3, "temperature": 0.5}}, "eval.judge.temperature None and 0.5; eval.judge.samp"),
        (  # what is around the first difference of two long texts
            {"judge": JUDGE | {"prompt": str(JUDGE["prompt"]).replace("yes", "correct", 1)}},
            "eval.judge.prompt …wer} {response} Say yes or no. Say yes",
        ),
    ],
)
def test_other_measurements_are_refused_or_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], told: str
) -> None:
    some = [record(i, i % 2 == 0) for i in range(8)]
    a, b = folder(tmp_path / "a", some), folder(tmp_path / "b", some, **other)
    assert main(["compare", str(a), str(b)]) == 2
    said = capsys.readouterr().err
    assert f"{a} and {b} were measured under other settings: {told}" in said and said.count("\n") == 1
    assert main(["compare", str(a), str(b), "--unlike", "--out", str(tmp_path / "c")]) == 0
    noted = f"a and b were measured under other settings: {told}"
    assert noted in capsys.readouterr().out and noted in (tmp_path / "c" / "compare.html").read_text()


def test_what_is_compared_may_differ(tmp_path: Path) -> None:
    some = [record(i, True) for i in range(4)]
    a = folder(tmp_path / "a", some)
    moved = {"url": "http://127.0.0.1:9/v1", **JUDGE}
    b = folder(tmp_path / "b", some, student={"path": "t"}, teacher={"path": "u"}, seed=7, judge=moved)
    assert not any("measured under" in n for n in compare([a, b])["notes"])
    (b / "settings.yaml").unlink()
    with pytest.raises(UserError, match="b: expected settings.yaml of an evaluation beside records.jsonl, found none"):
        compare([a, b])


def test_runs_are_compared_with_runs_only(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", [record(0, True)], max_tokens=9)
    runs = [make_run(tmp_path / name, [evaluation("x", 3)]) for name in ("r", "s")]
    for run, tokens in zip(runs, (64, 32), strict=True):
        path = run / "config.yaml"
        about = yaml.safe_load(path.read_text())
        about["config"]["rollout"] = {"max_tokens": tokens}
        path.write_text(yaml.safe_dump(about))
    with pytest.raises(UserError, match="r and .*s were measured under other settings: rollout.max_tokens 64 and 32;"):
        compare([a, *runs])
    assert not any("measured under" in n for n in compare([a, runs[0]])["notes"])
    assert sum("r and s were measured under" in n for n in compare([a, *runs], unlike=True)["notes"]) == 1


def test_divergences_are_paired_where_both_have_them(tmp_path: Path) -> None:
    def some(nats: float) -> list[dict[str, Any]]:
        return [record(i, True, **{"misalignment/sampled": {"nats": nats * i, "tokens": 5}}) for i in range(1, 9)]

    a, b = some(1.0), some(2.0)
    b[0]["misalignment/sampled"] = None
    content = compare([folder(tmp_path / "a", a), folder(tmp_path / "b", b)])
    found = content["differences"]["b"]["misalignment/sampled"]
    assert found["records"] == 7 and found["difference"] == pytest.approx(sum(range(2, 9)) / 35)


def test_an_older_evaluation_has_its_divergences_under_a_runs_names(tmp_path: Path) -> None:
    values = {"misalignment": 2.0, "forgetting": 3.0, "reverse_kl/speech": 4.0, "reverse_kl/text": 5.0}

    def some(nats: float, ending: str) -> list[dict[str, Any]]:
        told: Any = {n + ending: {"nats": nats * v, "tokens": 2} for n, v in values.items()}
        return [record(i, True, **told) for i in (1, 2)]

    content = compare([folder(tmp_path / "old", some(1.0, "")), folder(tmp_path / "new", some(2.0, "/sampled"))])
    old, new = (c["metrics"] for c in content["columns"])
    assert [n for n in content["names"] if n.endswith("/sampled")] == [f"{n}/sampled" for n in values]
    for name, value in values.items():
        assert (old[f"{name}/sampled"]["mean"], new[f"{name}/sampled"]["mean"]) == (value / 2, value)
        assert content["differences"]["new"][f"{name}/sampled"]["difference"] == value / 2
        assert name not in old and name not in new and f"{name}/sampled" not in EVAL_METRICS


def test_runs_and_evaluations_side_by_side(tmp_path: Path) -> None:
    a = folder(
        tmp_path / "a", [record(i, True, **{"misalignment/sampled": {"nats": 1.0, "tokens": 2}}) for i in range(4)]
    )
    runs = [make_run(tmp_path / name, [evaluation("x", 3, 0.7, misalignment=estimate(0.75))]) for name in ("r", "s")]
    content = compare([a, *runs])
    shown = page.compare_text(content)
    line = next(x for x in shown.splitlines() if x.startswith("accuracy, spoken"))
    assert "100.0 ± 0.0" in line and line.count("70.0 ± 2.0") == 2
    # a sampled estimate and one of full rows on gold responses never stand in one row
    by_name = {x.split("  ")[0]: x for x in shown.splitlines()}
    assert "0.500" in by_name["misalignment M (sampled)"] and "0.750" not in by_name["misalignment M (sampled)"]
    assert by_name["misalignment M"].count("0.750") == 2
    assert not content["differences"] and "no difference is tested" in shown
    other = make_run(tmp_path / "t", [evaluation("x", 3)], test="other.jsonl")
    assert "measured on other records" in page.compare_text(compare([runs[0], other]))


@pytest.mark.parametrize("kind", ["nothing", "empty", "unmeasured", "broken", "twice"])
def test_folders_that_cannot_be_compared(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", [record(0, True)])
    b = tmp_path / "b"
    if kind == "empty":
        b.mkdir()
    elif kind == "unmeasured":
        make_run(b, [])
    elif kind == "broken":
        b.mkdir()
        (b / "records.jsonl").write_text('{"id": "x"}\n')
    told = {
        "nothing": "b: expected the folder of a run (config.yaml) or a finished evaluation (records.jsonl), found no",
        "empty": "found neither",
        "unmeasured": "b: finished, 3 steps; it has no evaluation to compare",
        "broken": "b/records.jsonl:1: expected a key part, found none",
        "twice": "expected two or more different folders",
    }
    assert main(["compare", str(a), str(a if kind == "twice" else b)]) == 2
    said = capsys.readouterr().err
    assert told[kind] in said and said.count("\n") == 1


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    a, b = (folder(tmp_path / n / "gap", [record(0, True), record(1, False)]) for n in ("x", "y"))
    assert [c["name"] for c in compare([a, b])["columns"]] == ["x/gap", "y/gap"]


def test_pages_escape_what_records_say(tmp_path: Path) -> None:
    some = [record(i, False, question=EVIL, fields={"group": f"{EVIL}{i}"}) for i in range(3)]
    some[0]["views"]["speech"]["text"] = EVIL
    path = folder(tmp_path / "a", some)
    about = {"settings": {"student": {"path": EVIL}}, "versions": {}, "git_commit": "abc"}
    html = page.eval_page(about | summary(read_records(path), None, {}))
    assert "<script>" not in html and html.count("&lt;script&gt;") >= 5
    assert "Wrong in the speech view, right in the text view" in html and "3 of 3" in html
