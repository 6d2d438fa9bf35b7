"""Paths of a recipe that is used from another folder: from there, beside the recipe, in the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from opd.config.deepspeed import deepspeed_settings
from opd.config.load import load_config, resolve_model
from opd.config.placement import placement_of
from opd.config.schema import Config
from opd.settings import UserError

ROOT = Path(__file__).parents[3]
RECIPE = """
student: {path: student}
teacher: {kind: routed, routes: {a: {path: teacher}, "*": {path: Qwen/Qwen2-7B-Instruct}}}
data: {train: train.jsonl, augment: {noise: {share: 0.5, range: [5.0, 9.0], files: noises}}}
eval: {test: data/test.jsonl, retention: hub:owner/name}
rollout: {transfer_dir: student}
train: {steps: 3, prompts_per_step: 4, deepspeed: mine.json}
"""


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder; beside it one with a recipe and what it names."""
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home / "data", home / "noises", away):
        folder.mkdir(parents=True)
    for name in ("student", "teacher"):
        shutil.copytree(ROOT / "recipes/tiny/teacher", home / name)
    for name in ("train.jsonl", "data/test.jsonl"):
        (home / name).write_text("{}\n")
    (home / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    (home / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(away)
    return away


def config(away: Path, *overrides: str) -> Config:
    return load_config(away.parent / "home/recipe.yaml", overrides)


def test_what_is_not_here_is_beside_the_recipe(away: Path) -> None:
    c, home = config(away), away.parent / "home"
    assert (c.student.path, c.data.train) == (f"{home}/student", f"{home}/train.jsonl")
    assert {k: t.path for k, t in c.teacher.routes.items()} == {"a": f"{home}/teacher", "*": "Qwen/Qwen2-7B-Instruct"}
    assert (c.eval.test, c.eval.retention) == (f"{home}/data/test.jsonl", "hub:owner/name")
    assert (c.data.augment.noise.files, c.rollout.transfer_dir) == (f"{home}/noises", "student")
    assert deepspeed_settings(c)["zero_optimization"] == {"stage": 1}
    assert c.run.dir.startswith("runs/home-recipe-")  # what a run makes is made here


def test_what_is_here_comes_first(away: Path) -> None:
    (away / "train.jsonl").write_text("{}\n")
    shutil.copytree(ROOT / "recipes/tiny/teacher", away / "student")
    assert (config(away).data.train, config(away).student.path) == ("train.jsonl", "student")


def test_a_run_beside_the_recipe_keeps_its_step(away: Path) -> None:
    (away.parent / "home/run").mkdir()
    assert config(away, "student.path=run:40").student.path == f"{away.parent}/home/run:40"


def test_what_opd_carries_comes_last(away: Path) -> None:
    placement = "launch.placement=recipes/placements/1gpu_shared.yaml"
    c = config(away, "train.deepspeed=deepspeed_configs/zero3_offload.json", placement)
    assert deepspeed_settings(c)["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert placement_of(c).shared and c.train.deepspeed == "deepspeed_configs/zero3_offload.json"
    own = away.parent / "home/deepspeed_configs"
    own.mkdir()
    (own / "zero3_offload.json").write_text('{"zero_optimization": {"stage": 2}}')
    c = config(away, "train.deepspeed=deepspeed_configs/zero3_offload.json")
    assert deepspeed_settings(c)["zero_optimization"] == {"stage": 2}


def test_what_is_nowhere_says_where_it_was_looked_for(away: Path) -> None:
    here = f"in {away} or beside the recipe"
    with pytest.raises(UserError, match=f"^train.deepspeed: no.json: no such file {here}, or in opd itself$"):
        deepspeed_settings(config(away, "train.deepspeed=no.json"))
    with pytest.raises(UserError, match=f"^no.yaml: no such placement {here}, or in opd itself$"):
        config(away, "launch.placement=no.yaml")
    with pytest.raises(UserError, match=f"^student.path ./no: expected .*, found neither {here}$"):
        resolve_model(config(away, "student.path=./no").student.path, "student.path")
    with pytest.raises(UserError, match="^/no.yaml: no such placement$"):
        config(away, "launch.placement=/no.yaml")
