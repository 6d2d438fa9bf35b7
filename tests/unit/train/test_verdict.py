"""Best checkpoint, early stop and warnings from the lines of eval.jsonl, against hand-worked cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
from report_runs import estimate, evaluation, make_run, text, written

from opd.config.load import load_config, resolve_model
from opd.config.schema import BETTER, EvalConfig, Metric, WarnConfig
from opd.report.runs import newest_warnings
from opd.settings import UserError
from opd.storage import run_folder as saved
from opd.storage.metrics import EVAL_METRICS
from opd.train.checkpoint import settle
from opd.train.verdict import Best, measured, verdict, warnings

RECIPE = str(Path(__file__).parents[3] / "recipes/tiny/2_xopd.yaml")
EVERY = ["eval.every=2", "eval.best=accuracy/speech"]


def line(step: int, **values: float | None) -> dict[str, Any]:
    """Keys with __ for /; every number with a standard error of 0.02."""
    return {"step": step} | {k.replace("__", "/"): estimate(v) for k, v in values.items()}


def spoken(*values: float | None, start: int = 10) -> list[dict[str, Any]]:
    return [line(start + 10 * i, accuracy__speech=v) for i, v in enumerate(values)]


def of(best: str, patience: int | None = None) -> EvalConfig:
    return EvalConfig.model_validate({"best": best, "patience": patience})


def test_the_metrics_that_tell_checkpoints_apart() -> None:
    assert set(get_args(Metric)) == set(BETTER) <= set(EVAL_METRICS)
    assert {n for n, sign in BETTER.items() if sign > 0} == {"accuracy/speech", "accuracy/text", "retention"}


def test_the_best_is_the_highest_or_the_lowest_and_the_earlier_of_equals() -> None:
    lines = spoken(0.5, 0.7, 0.7, 0.6)
    assert verdict(lines, of("accuracy/speech")).best == Best(20, "accuracy/speech", 0.7, 0.02)
    lower = [line(s, misalignment=v) for s, v in ((10, 0.5), (20, 0.25), (30, 0.3))]
    assert verdict(lower, of("misalignment")).best == Best(20, "misalignment", 0.25, 0.02)
    assert verdict(lines, EvalConfig()).best is None
    assert verdict([], of("retention", 1)).stop == ""


def test_the_untrained_student_does_not_compete() -> None:
    lines = [line(0, accuracy__speech=0.9), *spoken(0.5, 0.4)]
    found = verdict(lines, of("accuracy/speech", 2))
    assert found.best == Best(10, "accuracy/speech", 0.5, 0.02) and not found.stop
    assert found.named == {"step": 10, "metric": "accuracy/speech", "value": 0.5, "stderr": 0.02}


def test_a_whole_evaluation_competes_with_the_records_of_those_in_training() -> None:
    whole = line(30, accuracy__speech=0.9) | {"first": {"accuracy/speech": estimate(0.6)}}
    assert measured(whole, "accuracy/speech") == estimate(0.6) and measured(whole, "retention") is None
    assert verdict([*spoken(0.5, 0.7), whole], of("accuracy/speech")).best == Best(20, "accuracy/speech", 0.7, 0.02)


def test_patience_counts_evaluations_since_the_best() -> None:
    values = (0.5, 0.7, 0.6, 0.7, 0.65)
    stops = [bool(verdict(spoken(*values[:n]), of("accuracy/speech", 3)).stop) for n in range(1, 6)]
    assert stops == [False, False, False, False, True]
    told = verdict(spoken(*values), of("accuracy/speech", 3)).stop
    told_first = "stopped at step 50: accuracy/speech was not better than 0.7 of step 20 in 3 evaluations"
    assert told == f"{told_first} (eval.patience)"
    # what a resumed run measured again, and the evaluation at the end of a stopped run, are no further evaluations
    again = [*spoken(*values), *spoken(0.65, start=50)]
    assert verdict(again, of("accuracy/speech", 3)).stop == told and not verdict(again, of("accuracy/speech", 4)).stop


def test_numbers_that_are_no_numbers_are_never_best_and_do_not_help_patience() -> None:
    found = verdict(spoken(0.5, None, None), of("accuracy/speech", 2))
    assert found.best is not None and found.best.step == 10 and found.stop
    none = verdict(spoken(None, None), of("accuracy/speech", 2))
    assert none.best is None and "was not measured at all in 2 evaluations" in none.stop


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.patience=3"], "eval.patience needs eval.best"),
        (["eval.best=accuracy/speech"], "eval.best accuracy/speech needs eval.every, found none"),
        ([*EVERY, "eval.test="], "eval.best accuracy/speech needs eval.test, found none"),
        (["eval.every=2", "eval.best=retention", "eval.retention="], "eval.best retention needs eval.retention"),
        (["eval.every=2", "eval.best=accuracy"], "eval.best: "),
        (["eval.warn.length=1"], "eval.warn.length: "),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        load_config(RECIPE, overrides)
    assert message in str(e.value)


def test_margins_may_change_between_a_run_and_its_resumption() -> None:
    from opd.config.load import compared, dump_config

    before, after = (compared(dump_config(load_config(RECIPE, [*EVERY, f"eval.warn.text={t}"]))) for t in (0.1, 0.2))
    assert before == after and before["eval.best"] == "accuracy/speech"


# ---- warnings -------------------------------------------------------------------------------------------------------


def at(step: int, name: str, mean: float, stderr: float | None) -> dict[str, Any]:
    return {"step": step, name: estimate(mean, stderr)}


@pytest.mark.parametrize("name", ["accuracy/text", "retention"])
def test_a_fall_warns_beyond_margin_and_noise(name: str) -> None:
    def warned(now: float, stderr: float | None, **settings: float) -> bool:
        pair = at(0, name, 0.9, stderr), at(10, name, now, stderr)
        return bool(warnings([pair[0]], pair[1], WarnConfig.model_validate(settings)))

    # noise of the difference: 0.01 * sqrt(2); two of it are 0.0283, less than the margin 0.03
    assert warned(0.869, 0.01) and not warned(0.871, 0.01)
    # 0.04 * sqrt(2) * 2 = 0.113
    assert warned(0.786, 0.04) and not warned(0.788, 0.04)
    assert warned(0.788, 0.04, errors=1.0) and not warned(0.869, 0.01, text=0.05, retention=0.05)
    assert not warned(1.0, 0.0) and not warned(0.1, None)  # better; too few records to know the noise
    assert warned(0.86, 0.0)  # all records alike: the margin alone decides


def test_a_warning_names_numbers_steps_and_the_setting() -> None:
    (found,) = warnings([at(0, "accuracy/text", 0.9, 0.01)], at(40, "accuracy/text", 0.8, 0.02), WarnConfig())
    assert math.isclose(math.hypot(0.01, 0.02), 0.022, abs_tol=5e-4)
    told = "step 40: typed accuracy is 0.800, 0.100 ± 0.022 lower than at step 0 (eval.warn.text)"
    assert found == {"name": "accuracy/text", "text": told}


def test_lengths_warn_when_they_are_a_multiple_of_the_first() -> None:
    def warned(now: float, stderr: float) -> list[str]:
        first, then = at(5, "length/speech", 10, stderr), at(9, "length/speech", now, stderr)
        return [w["text"] for w in warnings([first], then, warn)]

    warn = WarnConfig()
    assert not warned(20.0, 0.5) and not warned(1.0, 0.5)
    told = "step 9: answers to spoken questions have 20.5 tokens on average, 10.5 ± 0.7 more than at step 5"
    assert warned(20.5, 0.5) == [f"{told} (eval.warn.length)"]
    assert not warned(30.0, 8.0) and warned(33.0, 8.0)  # 2 * 8 * sqrt(2) = 22.6
    (typed,) = warnings([at(5, "length/text", 9, 0.0)], at(9, "length/text", 40, 0.0), warn)
    assert typed["name"] == "length/text"


def test_the_first_evaluation_is_compared_on_the_same_records() -> None:
    first = at(0, "retention", 0.99, 0.001) | {"first": {"retention": estimate(0.9, 0.001)}}
    assert warnings([first], at(10, "retention", 0.88, 0.001), WarnConfig()) == []
    assert warnings([], at(10, "retention", 0.1, 0.001), WarnConfig()) == []
    later = at(10, "retention", 0.5, 0.001)  # the second one is no yardstick
    assert len(warnings([first, later], at(20, "retention", 0.5, 0.001), WarnConfig())) == 1


def test_warnings_reach_the_report(tmp_path: Path) -> None:
    def warns(*names: str) -> dict[str, Any]:
        return {"warnings": [{"name": n, "text": f"{n} <fell>"} for n in names]}

    lines = [evaluation("base", 0), evaluation("xopd", 1, interim=True, **warns("retention"))]
    lines += [evaluation("xopd", 2, interim=True, **warns("retention", "length/text")), evaluation("xopd", 3)]
    told = {"phase": "finished", "detail": "stopped at step 3: no better", "step": 3, "steps": 9, "error": None}
    run = make_run(tmp_path / "run", lines, status=told)
    (run / "checkpoints/step_2").mkdir(parents=True)
    settle(str(run), 1, {"step": 2, "metric": "retention", "value": 0.5, "stderr": None})
    report, page = written(run, out=tmp_path / "out")
    assert report["runs"][0]["warnings"] == ["retention <fell>; in 2 evaluations", "length/text <fell>"]
    assert report["runs"][0]["best"] == {"step": 2, "metric": "retention", "value": 0.5, "stderr": None}
    assert report["runs"][0]["state"] == "finished, 3 steps of 9: stopped at step 3: no better"
    assert "run: retention <fell>; in 2 evaluations" in text(page)
    assert newest_warnings([]) == []


# ---- which checkpoint -----------------------------------------------------------------------------------------------


def made(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        (tmp_path / f"run/checkpoints/step_{step}/model").mkdir(parents=True)
    return tmp_path / "run"


def test_the_best_is_kept_and_found_by_name(tmp_path: Path) -> None:
    run = made(tmp_path, 10, 20, 30, 40)
    settle(str(run), 2, {"step": 10, "metric": "retention", "value": 0.5, "stderr": None})
    assert [p.name for p in saved.checkpoints(run)] == ["step_10", "step_30", "step_40"]
    for name, step in (("", 40), (":last", 40), (":best", 10), (":30", 30)):
        assert resolve_model(f"{run}{name}", "student.path") == f"{run}/checkpoints/step_{step}/model"
    settle(str(run), 1, {"step": 40, "metric": "retention", "value": 0.75, "stderr": 0.5})
    assert [p.name for p in saved.checkpoints(run)] == ["step_40"]
    assert saved.best_of(run) == {"step": 40, "metric": "retention", "value": 0.75, "stderr": 0.5}
    settle(str(run), 1, {"step": 50, "metric": "retention", "value": 1.0, "stderr": 0.5})  # not saved
    assert (saved.best_of(run) or {})["step"] == 40


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = made(tmp_path, 10, 20)
    with pytest.raises(UserError, match=r"student.path .*run:best: expected checkpoints/best.json, found none"):
        resolve_model(f"{run}:best", "student.path")
    with pytest.raises(UserError, match=r"a step whose checkpoint is kept \(10, 20\), found '30'"):
        resolve_model(f"{run}:30", "student.path")
    (run / "checkpoints/best.json").write_text('{"step": ')
    with pytest.raises(UserError, match="best.json: expected an object with step, metric and value"):
        resolve_model(f"{run}:best", "student.path")
    with pytest.raises(UserError, match="found neither"):
        resolve_model(f"{tmp_path}/nowhere:best", "student.path")
