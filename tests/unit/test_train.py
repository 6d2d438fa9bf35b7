"""What a learner process that cannot start leaves in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from opd import run_folder, train
from opd.config import load_config

RECIPE = str(Path(__file__).parents[2] / "recipes/tiny/2_xopd.yaml")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one; exit codes as exceptions."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(train, "_init_distributed", lambda config: None)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(train.os, "_exit", leave)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def start(tmp_path: Path, *overrides: str) -> Any:
    try:
        return train.main([RECIPE, f"run.dir={tmp_path}/run", *overrides])
    except SystemExit as e:
        return e.code


def status(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run/status.json").read_text())


SERVER = 'rollout.urls=["http://127.0.0.1:9"]'


@pytest.mark.parametrize("phase", ["finished", "training"])
def test_a_refused_start_leaves_the_run_that_is_there_alone(
    tmp_path: Path, phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(RECIPE, [f"run.dir={tmp_path}/run"])
    run_folder.prepare(config)
    (tmp_path / "run/checkpoints/step_60").mkdir()
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": phase}))
    assert start(tmp_path, "optim.lr=0.5") == 2
    assert "holds a run of another configuration: optim.lr (0.0002 -> 0.5)" in capsys.readouterr().err
    assert status(tmp_path) == {"phase": phase}


def test_a_run_that_is_finished_stays_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder.prepare(load_config(RECIPE, [f"run.dir={tmp_path}/run"]))
    (tmp_path / "run/checkpoints/step_60").mkdir()
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": "finished"}))
    assert start(tmp_path) == 0
    assert (
        "this run is finished" in capsys.readouterr().out
        and run_folder.check(load_config(RECIPE, [f"run.dir={tmp_path}/run"])) == "finished"
    )


def test_a_run_without_its_servers_claims_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path) == 2
    assert "rollout.urls: rollout.source student needs a server" in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists() and not (tmp_path / "run/checkpoints").exists()


def test_a_mistake_of_the_run_itself_is_in_its_status(tmp_path: Path) -> None:
    assert start(tmp_path, f"student.path={tmp_path}/nowhere", SERVER) == 2
    found = status(tmp_path)
    assert (found["phase"], found["user_error"], found["detail"]) == ("failed", True, "rank 0")
    assert f"{tmp_path}/nowhere" in found["error"]


def test_a_fault_of_ours_is_in_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any, log: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(train, "build", broken)
    assert start(tmp_path, SERVER) == 1
    found = status(tmp_path)
    assert (found["phase"], found["user_error"], found["error"]) == ("failed", False, "RuntimeError: broken")


def rollout(view: str, version: int, truncated: bool) -> Any:
    return SimpleNamespace(
        scored=SimpleNamespace(rollout=SimpleNamespace(view=view, version=version, truncated=truncated))
    )


def test_the_line_of_a_step(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    config = load_config(RECIPE, [f"run.dir={tmp_path}/run", "train.samples_per_step=0", "rollout.max_mismatch=0.5"])
    log = SimpleNamespace(step=written.append, status=lambda *_: None)
    parts: Any = SimpleNamespace(config=config, log=log, seconds=10.0)
    samples = [
        rollout("speech", 4, True),
        rollout("text", 3, False),
        rollout("text", 4, False),
        rollout("text", 4, False),
    ]
    batch: Any = SimpleNamespace(samples=samples, tokens=20, responses=4)
    clock = train.Clock()
    clock.lap("rollout")
    train.report_step(parts, 5, batch, {"mismatch/logprob": 0.4, "loss": 1.5}, clock)
    (line,) = written
    assert line["length/truncated"] == 0.25 and line["length/mean"] == 5.0 and line["version/lag"] == 1
    assert line["loss"] == 1.5 and line["step"] == 5 and line["tokens"] == 20
    assert line["time/step"] == pytest.approx(line["time/rollout"] + line["time/rest"])
    assert line["seconds"] == parts.seconds == pytest.approx(10.0 + line["time/step"])
    with pytest.raises(RuntimeError, match=r"step 6: mean .* is 0.600, more than rollout.max_mismatch=0.5"):
        train.report_step(parts, 6, batch, {"mismatch/logprob": 0.6}, clock)


@pytest.mark.parametrize(
    ("source", "end", "steps"),
    [("student", True, [2, 4]), ("student", False, [2, 4, 6]), ("mix", True, [2, 4]), ("teacher", True, [2, 4])],
)
def test_evaluations_in_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, end: bool, steps: list[int]
) -> None:
    name = {"student": "xopd", "mix": "forward_kl", "teacher": "kd"}[source]
    given = [f"run.dir={tmp_path}/run", f"rollout.source={source}", f"objective.name={name}", "train.steps=6"]
    config = load_config(RECIPE, [*given, "eval.every=2", f"eval.end={str(end).lower()}"])
    pushed: list[int] = []
    slept: list[Any] = []
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(train, "push", lambda parts, version: pushed.append(version))
    monkeypatch.setattr(train, "rest", slept.append)
    log = SimpleNamespace(evaluation=lines.append, status=lambda *_: None)
    learner = SimpleNamespace(engine=SimpleNamespace(zero_optimization_stage=lambda: 3), world_size=1, world=1)
    evaluator = SimpleNamespace(interim=lambda: {"retention": {"mean": 1.0, "stderr": 0.0, "n": 1}})
    parts: Any = SimpleNamespace(config=config, log=log, learner=learner, evaluator=evaluator, seconds=7.0)
    for step in range(1, 7):
        train.look(parts, step)
    assert [line["step"] for line in lines] == steps and all(line["interim"] for line in lines)
    assert lines[0]["stage"] == config.run.stage and lines[0]["train_seconds"] == 7.0
    # off-policy nothing else gives the servers the current weights, and they shall sleep again
    assert pushed == (steps if source == "teacher" else []) and len(slept) == len(pushed)
