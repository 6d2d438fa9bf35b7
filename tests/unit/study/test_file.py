"""A study's YAML: the mistakes in it that are named, and its overrides on their way to a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study_runs import KD, XOPD, FakeLauncher, study_file, workplace

from opd.cli import main as opd
from opd.settings import UserError
from opd.study.command import main
from opd.study.grid import Study
from opd.study.spec import as_arguments

ROOT = Path(__file__).parents[3]


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
        ({"selection": {"seeds": [100], "metric": "accuracy"}}, r"selection.metric: expected .*found accuracy"),
        (
            {"selection": {"seeds": [100], "metric": "length/speech"}},
            r"selection.metric: expected a metric that has a better direction \(accuracy/speech, accuracy/text, "
            r"retention, misalignment, forgetting, reverse_kl/speech, reverse_kl/text\), found length/speech",
        ),
        ({"selection": {"seeds": [100], "guard": {"length/text": 1}}}, r"selection.guard: .*found length/text"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=message):
        Study(study_file(tmp_path, **changes))
    assert opd(["study", str(study_file(tmp_path, **changes)), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("spelt", ["./t.jsonl", "x/../t.jsonl", "{here}/t.jsonl", "linked.jsonl", "folder/t.jsonl"])
def test_one_manifest_spelt_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelt: str) -> None:
    workplace(tmp_path, monkeypatch)
    (tmp_path / "linked.jsonl").symlink_to("t.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path)
    selection = {"seeds": [100], "set": {"eval.test": spelt.format(here=tmp_path), "eval.retention": "rv.jsonl"}}
    with pytest.raises(UserError, match=r"selection.set: row well/base .*found .*t?.jsonl, which is the file t.jsonl"):
        Study(study_file(tmp_path, selection=selection))


def test_manifests_on_a_hub_are_told_apart_by_name(tmp_path: Path) -> None:
    def selection(name: str) -> dict[str, Any]:
        return {"seeds": [100], "set": {"eval.test": name, "eval.retention": "rv.jsonl"}}

    report = {"seeds": [0], "set": {"eval.test": "hub:a/b:test"}}
    Study(study_file(tmp_path, selection=selection("hub:a/b:validation"), report=report))
    with pytest.raises(UserError, match=r"an eval.test that is not the reported runs', found hub:a/b:test$"):
        Study(study_file(tmp_path, selection=selection("hub:a/b:test"), report=report))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"report": {"seeds": [0], "set": {"eval.test": "tset.jsonl"}}},
            "row well/base: eval.test tset.jsonl: no such",
        ),
        (
            {"selection": {"seeds": [100], "set": {"eval.test": "v.jsonl", "eval.retention": "vr.jsonl"}}},
            "row well/base: eval.retention vr.jsonl: no such manifest",
        ),
        (
            {"methods": {"a": {"recipe": KD}, "b": {"from": "a", "recipe": XOPD, "set": {"data.train": "tr.jsonl"}}}},
            "row well/b: data.train tr.jsonl: no such manifest",
        ),
        (
            {"worlds": {"well": {"student.path": "runs/none"}}},
            "row well/base: student.path runs/none: expected a check",
        ),
        (
            {"methods": {"kd": {"recipe": KD, "set": {"teacher.path": "./none"}}}, "reference": None},
            "row well/kd: teacher.path ./none: expected a checkpoint folder",
        ),
    ],
)
def test_what_runs_would_miss_is_named_before_the_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    workplace(tmp_path, monkeypatch)
    path, launcher = study_file(tmp_path, **{"reference": None} | changes), FakeLauncher(lambda _: {})
    with pytest.raises(UserError, match=f"^{message}"):
        main(path, [], None, False, False, launcher)
    assert not launcher.names and not (tmp_path / "out").exists()
    assert opd(["study", str(path), "--dry-run"]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out


def test_rows_that_are_not_asked_for_may_miss_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace(tmp_path, monkeypatch)
    own = {"teacher.path": "./none"}
    path = study_file(tmp_path, methods={"kd": {"recipe": KD}, "b": {"recipe": KD, "set": own}})
    assert opd(["study", str(path), "--dry-run", "--only", "well/kd"]) == 0
    assert opd(["study", str(path), "--dry-run"]) == 2


def test_world_and_seed_in_an_override_become_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace(tmp_path, monkeypatch)
    chosen = {"recipe": KD, "set": {"data.train": "{world}/seed_{seed}.jsonl"}}
    path = study_file(tmp_path, methods={"kd": chosen})
    (tmp_path / "well").mkdir()
    for seed in (100, 0):
        (tmp_path / f"well/seed_{seed}.jsonl").touch()
    with pytest.raises(UserError, match=r"row well/kd: data\.train well/seed_1\.jsonl: no such manifest"):
        main(path, [], None, True, False)
    (tmp_path / "well/seed_1.jsonl").touch()
    launcher = FakeLauncher(lambda run: {"accuracy/speech": 0.5, "accuracy/text": 0.9, "retention": 1.0})
    assert main(path, [], None, False, False, launcher) == 0
    trained = [run for run in launcher.started if run.row.name == "kd"]
    assert [run.seed for run in trained] == [0, 1]
    for run in trained:
        assert f"data.train=well/seed_{run.seed}.jsonl" in run.overrides


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
    from opd.config.load import load_config
    from opd.study.spec import read_study, rows

    path = ROOT / "recipes/tiny/figures.yaml"
    found = {r.name: r for r in rows(read_study(path), path)}
    for name in ("warmstart", "then-xopd"):
        row = found[name]
        assert row.rates == (load_config(ROOT / row.recipe).optim.lr,), name
        changed = {k for k in row.overrides if not k.startswith("launch.")}
        assert changed <= {"student.path", "rollout.server.threads", "train.samples_per_step"}, name
