"""What starting a recipe in a run folder does: new, resume, finished, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from opd import run_folder
from opd.config import Config, UserError, checkpoints, load_config, resolve_model

RECIPE = str(Path(__file__).parents[2] / "recipes/tiny/2_xopd.yaml")


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(RECIPE, [f"run.dir={tmp_path}/run", *overrides])


def finish(tmp_path: Path, *steps: int) -> None:
    for step in steps:
        (tmp_path / f"run/checkpoints/step_{step}/model").mkdir(parents=True)


def test_new_then_resume_then_finished(tmp_path: Path) -> None:
    c = config(tmp_path)
    assert run_folder.check(c) == "new"
    run_folder.prepare(c)
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert stored["config"]["optim"]["lr"] == c.optim.lr and stored["versions"]["torch"] and stored["git_commit"]
    assert run_folder.check(c) == "new"  # nothing is saved yet
    finish(tmp_path, 10)
    assert run_folder.check(c) == "resume"
    (tmp_path / "run/metrics.jsonl").write_text("kept\n")
    run_folder.prepare(c)
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept\n"
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": "finished"}))
    assert run_folder.check(c) == "finished"


def test_another_configuration_is_refused_by_name_and_overwrite_starts_anew(tmp_path: Path) -> None:
    run_folder.prepare(config(tmp_path))
    finish(tmp_path, 10)
    with pytest.raises(UserError, match=r"another configuration: optim.lr \(0.0002 -> 0.5\).*run.overwrite=true"):
        run_folder.check(config(tmp_path, "optim.lr=0.5"))
    (tmp_path / "run/metrics.jsonl").write_text("old\n")
    run_folder.prepare(config(tmp_path, "optim.lr=0.5", "run.overwrite=true"))
    assert checkpoints(tmp_path / "run") == [] and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("override", ['rollout.urls=["http://127.0.0.1:1"]', "launch.processes=4", "metrics.sinks=[]"])
def test_where_a_run_runs_may_change(tmp_path: Path, override: str) -> None:
    run_folder.prepare(config(tmp_path))
    finish(tmp_path, 10)
    assert run_folder.check(config(tmp_path, override)) == "resume"


@pytest.mark.parametrize("text", ["[1, 2", "- 1", "other: 1"])
def test_a_broken_config_is_no_stack_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml: not readable as a run's config"):
        run_folder.check(config(tmp_path))


def test_checkpoints_are_whole_and_in_order(tmp_path: Path) -> None:
    finish(tmp_path, 9, 100, 20)
    for name in (".step_200.writing", "step_x", "step_"):
        (tmp_path / f"run/checkpoints/{name}").mkdir()
    (tmp_path / "run/checkpoints/step_300").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_9", "step_20", "step_100"]
    assert resolve_model(str(tmp_path / "run")) == str(tmp_path / "run/checkpoints/step_100/model")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="a run folder without a finished checkpoint"):
        resolve_model(str(tmp_path / "empty"))
