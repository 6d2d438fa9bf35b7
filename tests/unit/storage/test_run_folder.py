"""What starting a recipe in a run folder does: new, resume, finished, refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from opd.config.load import load_config, prepare_run, resolve_model, state_of_run
from opd.config.schema import Config
from opd.report.runs import read_run, wall
from opd.settings import UserError
from opd.storage import run_folder
from opd.storage.run_folder import checkpoints

RECIPE = str(Path(__file__).parents[3] / "recipes/tiny/2_xopd.yaml")


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(RECIPE, [f"run.dir={tmp_path}/run", *overrides])


def finish(tmp_path: Path, *steps: int) -> None:
    for step in steps:
        (tmp_path / f"run/checkpoints/step_{step}/model").mkdir(parents=True)


def test_new_then_resume_then_finished(tmp_path: Path) -> None:
    c = config(tmp_path)
    assert state_of_run(c) == "new"
    prepare_run(c)
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert stored["config"]["optim"]["lr"] == c.optim.lr and stored["versions"]["torch"] and stored["git_commit"]
    assert state_of_run(c) == "new"  # nothing is saved yet
    finish(tmp_path, 10)
    assert state_of_run(c) == "resume"
    (tmp_path / "run/metrics.jsonl").write_text("kept\n")
    prepare_run(c)
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept\n"
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": "finished"}))
    assert state_of_run(c) == "finished"


def test_another_configuration_is_refused_by_name_and_overwrite_starts_anew(tmp_path: Path) -> None:
    prepare_run(config(tmp_path))
    finish(tmp_path, 10)
    with pytest.raises(UserError, match=r"another configuration: optim.lr \(0.0002 -> 0.5\).*run.overwrite=true"):
        state_of_run(config(tmp_path, "optim.lr=0.5"))
    (tmp_path / "run/metrics.jsonl").write_text("old\n")
    prepare_run(config(tmp_path, "optim.lr=0.5", "run.overwrite=true"))
    assert checkpoints(tmp_path / "run") == [] and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_launch_that_ended_before_its_learner_began_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run_folder.add_launch(tmp_path / "run", time.time())
    assert state_of_run(config(tmp_path)) == "new"


@pytest.mark.parametrize("override", ['rollout.urls=["http://127.0.0.1:1"]', "launch.processes=4", "metrics.sinks=[]"])
def test_where_a_run_runs_may_change(tmp_path: Path, override: str) -> None:
    prepare_run(config(tmp_path))
    finish(tmp_path, 10)
    assert state_of_run(config(tmp_path, override)) == "resume"


@pytest.mark.parametrize("text", [b"[1, 2", b"- 1", b"other: 1", b"", b"\xff\xfe\x00"])
def test_a_broken_config_is_no_stack_trace(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_bytes(text)
    with pytest.raises(UserError, match="config.yaml: not readable as a run's config"):
        state_of_run(config(tmp_path))


def test_checkpoints_are_whole_and_in_order(tmp_path: Path) -> None:
    finish(tmp_path, 9, 100, 20)
    for name in (".step_200.writing", "step_x", "step_"):
        (tmp_path / f"run/checkpoints/{name}").mkdir()
    (tmp_path / "run/checkpoints/step_300").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_9", "step_20", "step_100"]
    assert resolve_model(str(tmp_path / "run"), "student.path") == str(tmp_path / "run/checkpoints/step_100/model")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="a run folder without a finished checkpoint"):
        resolve_model(str(tmp_path / "empty"), "student.path")


def test_every_differing_key_is_named_up_to_six(tmp_path: Path) -> None:
    prepare_run(config(tmp_path))
    finish(tmp_path, 10)
    changed = [
        "optim.lr=0.5",
        "train.steps=61",
        "run.seed=3",
        'student.train=["adapter"]',
        "eval.test=",
        "eval.end=false",
    ]
    with pytest.raises(UserError) as e:
        state_of_run(config(tmp_path, *changed, "rollout.n=5"))
    found = str(e.value)
    for text in (
        "eval.end (True -> False)",
        "eval.test (data/tiny/test.jsonl -> None)",
        "optim.lr (0.0002 -> 0.5)",
        "rollout.n (4 -> 5)",
        "run.seed (0 -> 3)",
        "student.train (['llm'] -> ['adapter'])",
    ):
        assert text in found
    assert "train.steps" not in found  # the seventh
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_10"]


def test_a_finished_run_of_another_configuration_is_refused_too(tmp_path: Path) -> None:
    prepare_run(config(tmp_path))
    finish(tmp_path, 10)
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": "finished"}))
    with pytest.raises(UserError, match="train.steps"):
        state_of_run(config(tmp_path, "train.steps=61"))
    assert state_of_run(config(tmp_path, "run.overwrite=true")) == "new"  # asked for: once more from the start


def test_a_run_that_failed_or_left_a_torn_status_is_resumed(tmp_path: Path) -> None:
    prepare_run(config(tmp_path))
    finish(tmp_path, 10)
    for text in ('{"phase": "failed"}', '{"phase": "fini', ""):
        (tmp_path / "run/status.json").write_text(text)
        assert state_of_run(config(tmp_path)) == "resume"


def test_a_new_run_sweeps_its_own_files_and_no_others(tmp_path: Path) -> None:
    prepare_run(config(tmp_path))
    run = tmp_path / "run"
    swept = ["metrics.jsonl", "samples.jsonl", "eval.jsonl", "bad_records.jsonl", "status.json"]
    for name in (*swept, "notes.txt"):
        (run / name).write_text("old")
    (run / "logs").mkdir()
    (run / "checkpoints/.step_10.writing").mkdir()  # cut off before the first checkpoint was whole
    assert state_of_run(config(tmp_path)) == "new"
    prepare_run(config(tmp_path))
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "logs", "notes.txt"]
    assert not list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["checkpoints/mine/model.bin", "metrics.jsonl", "eval.jsonl"])
def test_a_folder_that_is_no_run_keeps_its_files(tmp_path: Path, name: str) -> None:
    """Without a run's config.yaml nobody asked to delete what happens to have our names."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for attempt in (state_of_run, prepare_run):
        with pytest.raises(UserError, match=rf"run: holds {name.split('/')[0]} but no config.yaml of a run"):
            attempt(config(tmp_path))
    assert path.read_text() == "precious"
    prepare_run(config(tmp_path, "run.overwrite=true"))
    assert not path.exists()


def test_what_a_start_leaves_before_its_config_is_no_hindrance(tmp_path: Path) -> None:
    """Logs, a lock, the status of a learner that failed early, an empty checkpoints folder."""
    run = tmp_path / "run"
    for name in ("logs", "checkpoints"):
        (run / name).mkdir(parents=True)
    (run / ".lock").write_text("")
    (run / "status.json").write_text(json.dumps({"phase": "failed"}))
    assert state_of_run(config(tmp_path)) == "new"
    prepare_run(config(tmp_path))
    assert not (run / "status.json").exists() and (run / "config.yaml").is_file()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = pytest.raises(UserError, match="run.dir .*file/run: expected a folder that can be written")
    with wanted, run_folder.lock(tmp_path / "file/run"):
        raise AssertionError("held")


def test_wall_time_is_of_all_launches(tmp_path: Path) -> None:
    prepare_run(config(tmp_path))
    folder = tmp_path / "run"
    assert wall(read_run(folder)) == 0.0
    for ago in (20, 10):
        run_folder.add_launch(folder, time.time() - ago)
    assert wall(read_run(folder)) == pytest.approx(30, abs=2)
