"""The numbers of study.json and study.md, worked by hand."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from report_runs import Page
from study_runs import KD, XOPD, FakeLauncher, leave, study_file, workplace

from opd.report.blocks import Paragraph, Table, markdown
from opd.study.command import main
from opd.study.grid import Study
from opd.study.results import interval, paired, summarise
from opd.study.runs import Run
from opd.study.tables import blocks, charts

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_those_of_the_tables(df: int, quantile: float) -> None:
    values = Series(range(df + 1))
    assert interval(values)["half"] / values.sem() == pytest.approx(quantile, abs=5e-5)


def test_interval_by_hand() -> None:
    # mean 3, s² = (4 + 1 + 0 + 1 + 4) / 4 = 2.5
    assert interval(Series([1, 2, 3, 4, 5])) == {
        "mean": 3,
        "half": pytest.approx(2.7764 * math.sqrt(2.5 / 5), abs=1e-4),
        "n": 5,
    }
    assert interval(Series([2.0])) == {"mean": 2.0, "half": None, "n": 1}


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = DataFrame({"M": {0: 0.5, 1: 0.7, 2: 0.9}}), DataFrame({"M": {1: 0.6, 0: 0.4, 3: 9.0}})
    assert paired(ours, theirs) == {"M": {"mean": pytest.approx(0.1), "half": pytest.approx(0, abs=1e-12), "n": 2}}
    assert paired(DataFrame({"M": {0: 1.0}}), DataFrame({"M": {1: 1.0}})) == {}


def numbers(run: Run) -> dict[str, float]:
    speech = {"base": 0.40, "kd": 0.50, "both": 0.70}[run.row.name]
    slope = {"base": 0.0, "kd": 0.02, "both": 0.04}[run.row.name]
    return {"accuracy/speech": speech + slope * (run.seed % 100), "accuracy/text": 0.9, "retention": 1.0}


@pytest.fixture(autouse=True)
def _at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace(tmp_path, monkeypatch)
    monkeypatch.setattr("opd.study.command.POLL_S", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    methods = {"kd": {"recipe": KD}, "both": {"from": "kd", "recipe": XOPD, "set": {"train.steps": 2}}}
    common = {"train.steps": 4, "eval.every": 2, "eval.test": "t.jsonl", "eval.retention": "r.jsonl"}
    return study_file(tmp_path, methods=methods, common=common, report={"seeds": [0, 1, 2]})


def test_the_table_by_hand(path: Path) -> None:
    assert main(path, [], None, False, False, FakeLauncher(numbers)) == 0
    content = json.loads((path.parent / "out/study.json").read_text())
    (world,) = content["worlds"]
    base, kd, both = world["rows"]
    # seeds 0, 1, 2: 0.50, 0.52, 0.54: s = 0.02
    speech = kd["metrics"]["accuracy/speech"]
    assert speech["mean"] == pytest.approx(0.52) and speech["n"] == 3
    assert speech["half"] == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert speech["stderr_records"] == 0.01
    # 0.2, 0.22, 0.24
    against = both["differences"]["kd"]["accuracy/speech"]
    assert against["mean"] == pytest.approx(0.22)
    assert against["half"] == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert kd["differences"]["base"]["accuracy/speech"]["mean"] == pytest.approx(0.12) and not base["differences"]
    # 4 steps of 128 responses and 2 s; then 2 more
    assert (kd["samples"], kd["seconds"]["mean"]) == (512, 8.0)
    assert (both["samples"], both["seconds"]["mean"], base["samples"]) == (768, 12.0, 0)
    table = (path.parent / "out/study.md").read_text().splitlines()
    (line,) = [x for x in table if x.startswith("| kd | 0.0001 ")]
    assert line.startswith("| kd | 0.0001 | 52.0 ± 5.0 | 90.0 ± 0.0 | 40.0 ± 0.0 |") and line.endswith(
        "| 512 | 8 ± 0 |"
    )
    assert any(x.startswith("| both | +22.0 ± 5.0 | +0.0 ± 0.0 |") for x in table)
    assert any("3 seeds are few" in x for x in table)
    (page,) = [(path.parent / "out/study.html").read_text()]
    for other in ("base", "kd"):
        assert f"Differences to {other}, paired by seed" in page
    for label in ("accuracy, speech", "accuracy, text", "step", "seconds of training", "forgetting F, nats per token"):
        assert f">{label}</text>" in page
    assert "+22.0 ±\u00a05.0" in page and "http" not in page and "<script" not in page
    for words in ("0.4 at step 0, 0.35 at step 6.", "0.4 at second 0, 0.35 at second 12."):  # from base's
        assert f"accuracy, speech of both: {words}" in page
    assert page.count("<svg") == 3 and "both" in " ".join(Page(page).text)


def test_the_plot_of_costs_by_hand(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(path, [], None, False, False, FakeLauncher(lambda r: numbers(r) | {"forgetting": 0.1}))
    drawn: list[Any] = []
    monkeypatch.setattr("opd.study.tables.figure", lambda caption, draw, *_: drawn.append(draw) or "")
    charts(summarise(Study(path))["worlds"][0])
    figure = Figure()
    drawn[-1](figure)
    labels = [(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes]
    forgetting = "forgetting F, nats per token"
    speech, text = "accuracy, speech", "accuracy, text"
    assert labels == [(forgetting, speech), (forgetting, text), ("retention", speech)]
    found = [[c[0].get_xydata().tolist() for c in ax.containers] for ax in figure.axes]
    cost = pytest.approx(0.1)
    assert found[0] == [[[cost, pytest.approx(y)]] for y in (0.4, 0.52, 0.74)]
    assert found[1] == [[[cost, pytest.approx(0.9)]]] * 3 and found[2][0] == [[1.0, pytest.approx(0.4)]]


def test_samples_that_differ_from_most_are_marked(path: Path) -> None:
    main(path, [], None, False, False, FakeLauncher(numbers))
    methods = {n: {"recipe": KD, "set": {"train.steps": s}} for n, s in (("kd", 4), ("same", 4), ("more", 5))}
    common = {"train.steps": 4, "eval.every": 2, "eval.test": "t.jsonl", "eval.retention": "r.jsonl"}
    shutil.rmtree(path.parent / "out")
    study_file(path.parent, methods=methods, common=common, report={"seeds": [0, 1, 2]})
    launcher = FakeLauncher(lambda r: {"accuracy/speech": 0.5, "accuracy/text": 0.9, "retention": 1.0})
    main(path, [], None, False, False, launcher)
    table = (path.parent / "out/study.md").read_text()
    assert "| more † |" in table and "| same |" in table
    assert "† not matched: most rows learn from 512 samples" in table


def test_the_curve_of_a_pipeline_goes_on_where_the_last_stage_ended(path: Path) -> None:
    main(path, [], None, False, False, FakeLauncher(numbers))
    rows = summarise(Study(path))["worlds"][0]["rows"]
    points = [(p["step"], p["seconds"], round(p["accuracy/speech"], 9)) for p in rows[2]["curve"]]
    # kd's own two, then those of the second stage; at their ends on the records of those between
    assert points == [(2, 4.0, 0.3), (4, 8.0, 0.35), (5, 10.0, 0.3), (6, 12.0, 0.35)]


def test_a_row_with_another_teacher_is_held_against_the_teacher_of_the_others(tmp_path: Path) -> None:
    own = {"teacher.kind": "self", "teacher.path": None}
    path = study_file(tmp_path, methods={"kd": {"recipe": KD}, "own": {"recipe": XOPD, "set": own}})

    def measure(run: Run) -> dict[str, float]:
        teacher = 0.9 if run.row.name == "own" else 0.95
        found = {"accuracy/speech": 0.6 + 0.1 * (run.seed % 100), "accuracy/text": 0.9, "retention": 1.0}
        return found | {"accuracy/teacher": teacher, "drop/speech": 12.0, "drop/text": 0.0, "forgetting": 0.01}

    main(path, [], None, False, False, FakeLauncher(measure))
    content = summarise(Study(path))
    _, kd, row = content["worlds"][0]["rows"]
    # 100 * (1 - 0.6 / 0.95) and 100 * (1 - 0.7 / 0.95), not the 12 of its own evaluation
    assert row["metrics"]["drop/speech"]["mean"] == pytest.approx((36.842105 + 26.315789) / 2, abs=1e-6)
    assert row["metrics"]["drop/text"]["mean"] == pytest.approx(5.263158, abs=1e-6)
    assert not {"forgetting", "reverse_kl/speech"} & (row["metrics"].keys() | row["differences"]["kd"].keys())
    assert kd["metrics"]["drop/speech"]["mean"] == 12.0 and kd["metrics"]["forgetting"]["mean"] == 0.01
    assert not kd["notes"] and "its teacher is not base's" in row["notes"][-1]
    (line,) = [x for x in markdown(blocks(content)).splitlines() if x.startswith("| own | 0.0001 | 65.0")]
    assert line.split(" | ")[4:8] == ["31.6 ± 66.9", "5.3 ± 0.0", "0.75 ± 0.00", "–"]


def test_a_row_with_another_teacher_may_have_nothing_yet(tmp_path: Path) -> None:
    own = {"teacher.kind": "self", "teacher.path": None}
    path = study_file(tmp_path, methods={"kd": {"recipe": KD}, "own": {"recipe": XOPD, "set": own}})
    main(path, ["well/kd"], None, False, False, FakeLauncher(lambda _: SAME))
    row = summarise(Study(path))["worlds"][0]["rows"][2]
    assert (row["state"], row["by_seed"]) == ("0 of 2 seeds finished", {}) and "its teacher is not" in row["notes"][0]


def test_a_row_waits_for_the_one_it_starts_from(tmp_path: Path) -> None:
    rows = summarise(Study(study_file(tmp_path)))["worlds"][0]["rows"]
    assert rows[1]["state"] == "learning rate not chosen: 0 of 2 runs of its selection finished"
    assert rows[2]["state"] == "waits for the learning rate of kd, which it starts from"


def test_what_is_not_there_has_no_number(path: Path) -> None:
    study = Study(path)
    for seed in (0, 1, 2):
        run = study.run_at_choice(study.rows["well/kd"], "report", seed)
        assert run is not None
        if seed < 2:
            leave(run, numbers(run))
    content = summarise(Study(path))
    base, kd, _ = content["worlds"][0]["rows"]
    assert kd["state"] == "2 of 3 seeds finished" and not kd["metrics"] and kd["samples"] is None
    assert base["state"] == "0 of 3 seeds finished"
    assert set(kd["by_seed"]) == {0, 1}
    text = markdown(blocks(content))
    assert "| kd (incomplete) | 0.0001 | – | – |" in text and "0.5" not in text.split("##", 1)[1].replace("0.0001", "")
    assert {r["state"] for r in content["runs"]} == {"finished", "missing"}


def test_both_pages_say_the_same(path: Path) -> None:
    rows = {"kd": {"recipe": KD, "rates": [1e-4, 2e-4]}, "more": {"recipe": KD, "set": {"train.steps": 6}}}
    common = {"train.steps": 4, "eval.test": "t.jsonl", "eval.retention": "r.jsonl"}
    study_file(path.parent, methods=rows, common=common, report={"seeds": [0, 1]})
    launcher = FakeLauncher(lambda r: None if r.name == "well/more/report/lr_0.0001/seed_1" else SAME)
    assert main(path, [], None, False, False, launcher) == 1
    text, page = ((path.parent / f"out/study.{kind}").read_text() for kind in ("md", "html"))
    shown = html.unescape(re.sub("<[^>]*>", "", page)).replace("\u00a0", " ")
    found = list(blocks(json.loads((path.parent / "out/study.json").read_text())))
    tables = [b for b in found if isinstance(b, Table)]
    assert [t.heads[0] for t in tables] == ["row", "row - base", "row", "row"]
    for table in tables:
        assert table.about in text and table.about in shown
        for line in [table.heads, *table.rows]:
            assert f"| {' | '.join(line)} |" in text and "".join(line) in shown
    # whose absence from one of the two this test is for
    assert tables[-1].heads[:2] == ["row", "rate"] and [x[:2] for x in tables[-1].rows] == [
        ["kd", "0.0001"],
        ["kd", "0.0002"],
    ]
    assert "| kd | 0.0001 | 0.500 | 0.900 | 1.000 | yes | chosen |" in text
    few = "2 seeds are few: the intervals are wide, and rely on a normal distribution."
    assert f"**{few}**" in text and f'<p class="warn">{few}</p>' in page
    (about,) = [b.text for b in found if isinstance(b, Paragraph) and b.text.startswith("Test split, seeds 0, 1: ")]
    assert "drop S and T are percent below" in about and about in text and about in shown
    assert "**more is incomplete**: 1 of 2" in text and "<strong>more is incomplete</strong>: 1 of 2" in page
    # all columns can be seen: cells wrap, and what is still too wide scrolls
    assert page.count("<table") == page.count('<div class="scroll"><table') == len(tables)
    assert ".numbers td { white-space: normal; }" in page


SAME = {"accuracy/speech": 0.5, "accuracy/text": 0.9, "retention": 1.0}


def test_accuracy_by_group_by_hand(path: Path) -> None:
    def measure(run: Run) -> dict[str, Any]:
        days, sums = 0.2 + 0.1 * run.seed, None if (run.row.name, run.seed) == ("kd", 1) else 0.75
        speech = {"days | weeks": {"mean": days, "stderr": 0.02}, "sums": {"mean": sums, "stderr": None}}
        return numbers(run) | {"groups": {"speech": speech, "text": {"sums": {"mean": 1.0, "stderr": 0.0}}}}

    main(path, [], None, False, False, FakeLauncher(measure))
    content = json.loads((path.parent / "out/study.json").read_text())
    base, kd, _ = content["worlds"][0]["rows"]
    # 0.2, 0.3, 0.4: s = 0.1
    days = base["groups"]["speech"]["days | weeks"]
    assert days["mean"] == pytest.approx(0.3) and days["n"] == 3 and days["stderr_records"] == pytest.approx(0.02)
    assert days["half"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert base["groups"]["text"] == {"sums": {"mean": 1.0, "half": 0.0, "n": 3, "stderr_records": 0.0}}
    assert set(kd["groups"]["speech"]) == {"days | weeks"}  # a seed lacks the other
    lines = (path.parent / "out/study.md").read_text().splitlines()
    at = lines.index("Spoken accuracy by group, %, ± half of its 95 % confidence interval.")
    assert lines[at + 2 : at + 6] == [
        "| row | days \\| weeks | sums |",
        "|---|---|---|",
        "| base | 30.0 ± 24.8 | 75.0 ± 0.0 |",
        "| kd | 30.0 ± 24.8 | – |",
    ]
    assert '<th scope="col">days | weeks</th>' in (path.parent / "out/study.html").read_text()


def test_misalignment_by_group_and_its_differences_by_hand(path: Path) -> None:
    def measure(run: Run) -> dict[str, Any]:
        days = {"base": 1.0, "kd": 0.5, "both": 0.2}[run.row.name] + 0.1 * run.seed * (run.row.name != "both")
        return numbers(run) | {"groups": {"misalignment": {"days": {"mean": days, "stderr": 0.02}}}}

    main(path, [], None, False, False, FakeLauncher(measure))
    both = json.loads((path.parent / "out/study.json").read_text())["worlds"][0]["rows"][2]
    # both - kd: -0.3, -0.4, -0.5: s = 0.1
    against = both["differences"]["kd"]["groups"]["misalignment"]["days"]
    assert against["mean"] == pytest.approx(-0.4)
    assert against["half"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert both["groups_by_seed"]["2"] == {"speech": {}, "text": {}, "misalignment": {"days": 0.2}}
    lines = (path.parent / "out/study.md").read_text().splitlines()
    at = lines.index("M by group, nats per token, ± half of its 95 % confidence interval.")
    assert lines[at + 2] == "| row | days |" and "| kd | 0.600 ± 0.248 |" in lines[at:]
    at = next(i for i, x in enumerate(lines) if x.startswith("M by group, nats per token, differences to kd"))
    assert lines[at + 2] == "| row - kd | days |" and lines[at + 4] == "| both | -0.400 ± 0.248 |"


def test_records_without_groups_have_no_table_of_them(path: Path) -> None:
    everything = {"groups": {"speech": {"all": {"mean": 0.5, "stderr": 0.1}}}}
    main(path, [], None, False, False, FakeLauncher(lambda r: numbers(r) | everything))
    assert "by group" not in (path.parent / "out/study.md").read_text()


def test_tables_that_would_lose_a_row_are_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = path.parent / "out"
    main(path, [], None, False, False, FakeLauncher(numbers))
    earlier = {kind: (out / f"study.{kind}").read_text() for kind in ("json", "md", "html")}
    capsys.readouterr()
    whole = path.read_text()
    path.write_text(whole.replace("train.steps: 4", "train.steps: 5"))
    for _ in range(2):  # what is kept is not lost the next time, nor kept twice
        assert main(path, [], None, False, False, FakeLauncher(numbers)) == 1
    told = capsys.readouterr().out
    rows = "well/kd, well/both"  # base takes one step, whatever train.steps says
    kept = f"kept the earlier tables as {out}/study.before.1.*: complete there, not any more: {rows}\n"
    assert told.count("kept the earlier tables") == 1 and kept in told
    assert {kind: (out / f"study.before.1.{kind}").read_text() for kind in earlier} == earlier
    assert "(incomplete)" in (out / "study.md").read_text() and not list(out.glob("study.before.2.*"))
    path.write_text(whole)  # the first one again: nothing is lost, nothing moved
    assert main(path, [], None, False, False, FakeLauncher(numbers)) == 0
    assert (out / "study.md").read_text() == earlier["md"] and not list(out.glob("study.before.2.*"))
    path.write_text(whole.replace("train.steps: 4", "train.steps: 6"))
    assert main(path, [], None, False, False, FakeLauncher(numbers)) == 1
    assert (out / "study.before.2.md").read_text() == (out / "study.before.1.md").read_text() == earlier["md"]
