"""A study's YAML: the mistakes in it that are named, and its overrides on their way to a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_runs import KD, XOPD, study_file

from opd.cli import main as opd
from opd.config import UserError
from opd.study.grid import Study
from opd.study.spec import as_arguments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, r"study.yaml: unknown key sed"),
        ({"methods": {"kd": {"recipe": KD, "rate": [1e-4]}}}, r"unknown key methods.kd.rate"),
        ({"methods": {"kd": {"recipe": KD, "set": {"optim.lr": 1.0}}}}, r"methods.kd.set: optim.lr is the study's own"),
        ({"common": {"eval.patience": 2}}, r"common: eval.patience is the study's own"),
        ({"methods": {"kd": {"recipe": KD, "set": {"steps": 1}}}}, r"expected dotted keys of a recipe.*found steps"),
        ({"methods": {"kd": {"recipe": KD, "set": {"train.step": 1}}}}, r"row well/kd: .*unknown key train.step"),
        ({"methods": {"kd": {"recipe": "none.yaml"}}}, r"row well/kd: none.yaml: no such recipe file"),
        ({"methods": {"x": {"recipe": KD, "from": "kd"}}}, r"methods.x.from: expected one of the rows base.*found kd"),
        ({"methods": {"base": {"recipe": KD}}}, r"methods.base: that name is the untrained student's"),
        ({"methods": {"a b": {"recipe": KD}}}, r"methods.a b"),
        ({"methods": {"x": {"recipe": XOPD, "lambda": [2.0]}}}, r"methods.x.lambda: expected values from 0 to 1"),
        (
            {"methods": {"x-lambda-0": {"recipe": XOPD}, "x": {"recipe": XOPD, "lambda": [0]}}},
            r"methods.x: .*x-lambda-0 twice",
        ),
        ({"methods": {"x": {"recipe": XOPD, "lambda": [0, 0.0]}}}, r"methods.x.lambda: expected each value once"),
        ({"methods": {"x": {"recipe": XOPD, "lambda": [[0]]}}}, r"methods.x.lambda: .*dictionary"),
        ({"methods": {"x": {"recipe": XOPD, "lambda": []}}}, r"methods.x.lambda: .*at least 1"),
        (
            {"methods": {"x": {"recipe": XOPD, "lambda": {0.5: {"objective.lambda": 0.3}}}}},
            r"methods.x: objective.lambda is what its lambda sets",
        ),
        (
            {"methods": {"x": {"recipe": XOPD, "lambda": [0.5], "set": {"objective.lambda": 0.3}}}},
            r"methods.x: objective.lambda is what its lambda sets",
        ),
        (
            {"methods": {"a": {"recipe": KD}, "b": {"recipe": KD, "from": "a", "set": {"student.path": "x"}}}},
            r"methods.b.set: student.path is that of a's runs",
        ),
        ({"rates": [1e-4, 1.0000001e-4]}, r"rates: expected each value once, in six digits"),
        ({"report": {"seeds": [0, 1000]}}, r"report.seeds.1: Input should be less than 1000"),
        ({"worlds": {"well": {}}}, r"worlds.well: expected a student.path for all rows, found runs/.* in that of kd"),
        (
            {"selection": {"seeds": [100], "set": {"eval.retention": "rv.jsonl"}}},
            r"selection.set: .*expected an eval.test that is not the reported runs', found t.jsonl",
        ),
        (
            {"selection": {"seeds": [100], "set": {"eval.test": "v.jsonl", "eval.retention": None}}},
            r"expected an eval.retention that is not the reported runs', found None",
        ),
        ({"reference": "both"}, r"reference: expected one of the rows .*both-lambda-0, .*found both"),
        ({"report": {"seeds": [0, 100]}}, r"selection.seeds: seed 100 is also one of report.seeds"),
        ({"report": {"seeds": [0, 0]}}, r"report.seeds: expected each value once"),
        ({"selection": {"seeds": [100], "metric": "accuracy"}}, r"expected a metric of an evaluation .*found accuracy"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        Study(study_file(tmp_path, **changes))
    assert opd(["study", str(study_file(tmp_path, **changes)), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    path.write_text(path.read_text() + "  kd: {recipe: other.yaml}\n")  # after the last method
    with pytest.raises(UserError, match=r"study.yaml: not valid YAML: the key kd twice in .* line \d+"):
        Study(path)
    path.write_text("out: &a {x.y: 1}\nrates: {<<: *a, x.y: 2}\n")  # what is merged in may be overridden
    with pytest.raises(UserError, match="report is required"):
        Study(path)


@pytest.mark.parametrize("value", [1e-4, True, None, "a/b.jsonl", "1e3", "true", "x: y", "", [1, 2], 0.5, 3])
def test_overrides_arrive_as_they_were(tmp_path: Path, value: Any) -> None:
    (argument,) = as_arguments({"a.b": value})
    from opd.settings import override

    raw: dict[str, Any] = {}
    override(raw, argument)
    assert raw == {"a": {"b": value}}


def test_the_tiny_study_is_sound() -> None:
    from opd.study.spec import read_study

    spec = read_study(ROOT / "recipes/tiny/study.yaml")
    assert len(spec.report.seeds) >= 5 and set(spec.worlds) == {"hears_well", "hears_badly"}


def test_the_figures_of_the_readme_are_those_of_the_recipes_as_they_are() -> None:
    from opd.config import load_config
    from opd.study.spec import read_study, rows

    path = ROOT / "recipes/tiny/figures.yaml"
    found = {r.name: r for r in rows(read_study(path), path)}
    for name in ("warmstart", "then-xopd"):
        row = found[name]
        assert row.rates == (load_config(ROOT / row.recipe).optim.lr,), name
        changed = {k for k in row.overrides if not k.startswith("launch.")}
        assert changed <= {"student.path", "rollout.server.threads", "train.samples_per_step"}, name
