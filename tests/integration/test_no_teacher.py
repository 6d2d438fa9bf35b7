"""A whole run that asks no teacher, and therefore names none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from live import STUDENT, opd, recipe


def test_a_run_that_asks_no_teacher_has_none(data: Path, tmp_path: Path) -> None:
    own = ["objective.name=sft", "rollout.source=dataset", "teacher.path=", "run.stage=", "train.steps=2"]
    run = tmp_path / "run"
    path, overrides = recipe("2_xopd", data, run, f"student.path={STUDENT}", "objective.average=token", *own)
    done = opd("launch", path, *overrides, "--plain")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "checked: teacher: none" in done.stdout
    assert "checked: settings: objective.advantage_clip is not read by sft" in done.stdout
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in steps] == [1, 2] and all(m["loss"] > 0 for m in steps)
    assert [m["loss"] for m in steps] == pytest.approx([m["sft/ce"] for m in steps], rel=1e-4)
    config = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert (config["teacher"]["path"], config["run"]["stage"]) == ("", "sft")
