"""Weights, packing and denominators of a batch; recipes and their mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi

from opd.config import load as hub
from opd.config.deepspeed import deepspeed_settings
from opd.config.load import dump_config, load_config, resolve_model
from opd.config.schema import Config
from opd.settings import UserError
from opd.train.batch import collate, make_batch, split
from opd.train.learner import learning_rate
from opd.types import Prompt, Rollout, Sample, ScoredRollout, View

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "recipes/tiny/2_xopd.yaml")


def sample(view: View, prompt: list[int], response: list[int]) -> Sample:
    scored = ScoredRollout(Rollout(Prompt("p", ()), view, tuple(response), None, 0, False), None)
    return Sample(scored, prompt, ["clip"] if view == "speech" else [])


def config(*overrides: str) -> Config:
    return load_config(RECIPE, overrides)


def test_weights_are_lambda_shares_of_per_response_means() -> None:
    samples = [sample("speech", [1], [5, 6]), sample("speech", [1], [5]), sample("text", [2], [7, 8, 9, 2])]
    batch = make_batch(samples, {}, config("objective.lambda=0.25"))
    assert [s.weight for s in samples] == pytest.approx([0.75 / 2 / 2, 0.75 / 2 / 1, 0.25 / 4])
    assert sum(s.weight * len(s.response_ids) for s in samples) == pytest.approx(1.0)
    assert (batch.tokens, batch.responses) == (7, 3)


def test_weights_per_token() -> None:
    samples = [sample("speech", [1], [5, 6]), sample("speech", [1], [5]), sample("text", [2], [7, 8, 9, 2])]
    make_batch(samples, {}, config("objective.average=token"))
    assert [s.weight for s in samples] == pytest.approx([0.5 / 3, 0.5 / 3, 0.5 / 4])


@pytest.mark.parametrize(("average", "weights"), [("response", [1 / 4 / 2, 3 / 4 / 4]), ("token", [1 / 14, 3 / 14])])
def test_a_response_that_stands_for_three_counts_three_times(average: str, weights: list[float]) -> None:
    samples = [sample("text", [1], [5, 6]), sample("text", [2], [7, 8, 9, 2])]
    samples[1].scored = replace(samples[1].scored, rollout=replace(samples[1].scored.rollout, stands_for=3))
    batch = make_batch(samples, {}, config("objective.lambda=1", f"objective.average={average}"))
    assert [s.weight for s in samples] == pytest.approx(weights)
    assert (batch.tokens, batch.responses) == (6, 2)


def test_records_count_as_often_as_their_weight_says() -> None:
    samples = [sample("speech", [1], [5, 6]), sample("speech", [2], [7]), sample("text", [1], [5, 6])]
    for s, w in zip(samples, (0.9, 0.6, 0.9), strict=True):
        prompt = replace(s.scored.rollout.prompt, numbers={"wer": 1 - w, "weight": w})
        s.scored = replace(s.scored, rollout=replace(s.scored.rollout, prompt=prompt))
    make_batch(samples, {}, config("objective.lambda=0.25", "data.weight=weight"))
    assert [s.weight for s in samples] == pytest.approx([0.75 * 0.9 / 1.5 / 2, 0.75 * 0.6 / 1.5, 0.25 / 2])
    assert sum(s.weight * len(s.response_ids) for s in samples) == pytest.approx(1.0)


@pytest.mark.parametrize(("lam", "view"), [(0.0, "speech"), (1.0, "text")])
def test_one_view_alone_takes_it_all(lam: float, view: View) -> None:
    samples = [sample(view, [1], [5, 6])]
    make_batch(samples, {}, config(f"objective.lambda={lam}"))
    assert samples[0].weight == 0.5


def test_split_keeps_to_the_budget_and_loses_nothing() -> None:
    samples = [sample("text", [1] * (3 + i % 4), [5] * (1 + i % 3)) for i in range(17)]
    micro = split(samples, 24)
    assert sorted(map(id, sum(micro, []))) == sorted(map(id, samples))
    for m in micro:
        mb = collate(m)
        assert mb.ids.numel() <= 24


def test_collate_packs_answers_behind_their_prompt() -> None:
    a, b, c = sample("text", [1, 2, 3], [7, 8]), sample("text", [4], [9]), sample("text", [1, 2, 3], [6])
    mb = collate([a, b, c])
    assert mb.ids.tolist() == [[1, 2, 3, 7, 8, 6], [4, 9, 0, 0, 0, 0]]
    assert mb.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 3]
    assert mb.row.tolist() == [0, 1, 0] and mb.targets.tolist() == [[7, 8], [9, 0], [6, 0]]
    assert mb.positions.tolist() == [[2, 3], [0, 0], [2, 0]] and mb.mask.tolist() == [[1, 1], [1, 0], [1, 0]]
    sees = mb.attends[0, 0].int().tolist()
    assert sees[4] == [1, 1, 1, 1, 1, 0] and sees[5] == [1, 1, 1, 0, 0, 1]


def test_collate_knows_whom_a_student_sampled() -> None:
    own, written = sample("text", [1], [5, 6]), sample("text", [2], [7])
    own.scored = replace(own.scored, rollout=replace(own.scored.rollout, logprobs=np.array([-1.0, -2.0], np.float32)))
    mb = collate([written, own])
    assert mb.sampled.tolist() == [False, True] and mb.sampler_logp.tolist() == [[0, 0], [-1, -2]]


def test_collate_pads_the_best_ids_with_none() -> None:
    few, many = sample("text", [1], [5]), sample("text", [2], [7, 8])
    few.scored = replace(few.scored, top_ids=np.array([[3]]), top_logprobs=np.array([[-0.5]]))
    many.scored = replace(many.scored, top_ids=np.array([[3, 4], [5, -1]]), top_logprobs=-np.ones((2, 2)))
    mb = collate([few, many])
    assert mb.top_ids is not None and mb.top_ids.tolist() == [[[3, -1], [-1, -1]], [[3, 4], [5, -1]]]
    assert mb.top_logp is not None and mb.top_logp.tolist() == [[[-0.5, 0], [0, 0]], [[-1, -1], [-1, -1]]]


def test_micro_batches_do_not_change_the_gradient() -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    samples = [sample("text", [1, 2], [3 + i % 5] * (1 + i % 4)) for i in range(9)]
    make_batch(samples, {}, config("objective.lambda=1"))

    def gradient(micro: list[list[Sample]]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for m in micro:
            mb = collate(m)
            logp = torch.log_softmax(table[mb.ids], -1)[mb.row[:, None], mb.positions]
            total = total - (mb.weights.double() * logp.gather(-1, mb.targets[..., None])[..., 0]).sum()
        return torch.autograd.grad(total, table)[0]

    whole, parts = gradient([samples]), gradient(split(samples, 8))
    assert len(split(samples, 8)) > 3 and torch.allclose(whole, parts, atol=1e-7)


def test_every_shipped_file_parses() -> None:
    recipes = sorted(ROOT.glob("recipes/*/[1-9]_*.yaml"))
    assert len(recipes) >= 12
    for path in recipes:
        loaded = load_config(path)
        assert Config.model_validate(dump_config(loaded)) == loaded
    for path in ROOT.glob("deepspeed_configs/*.json"):
        assert json.loads(path.read_text())["zero_optimization"]["stage"] in (2, 3)
        settings = deepspeed_settings(config(f"train.deepspeed={path}"))
        assert settings["gradient_clipping"] == 1.0 and settings["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr (did you mean lr?)"),
        ("trian.steps=1", "unknown key trian"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=0", "greater than 0"),
        ("objective.lambda=2", "less than or equal to 1"),
        ("objective.name=kd", "needs rollout.source teacher or dataset, found student"),
        ("train.prompts_per_step=1", "at least launch.processes (2)"),
        ("steps", "expected key.path=value"),
        ("run.seed.x=1", "seed is a value, not a section"),
    ],
)
def test_mistakes_in_a_recipe_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        config(override)
    assert message in str(e.value)


def test_a_run_is_named_after_its_objective_unless_the_recipe_names_it(tmp_path: Path) -> None:
    raw = yaml.safe_load(Path("recipes/tiny/2_xopd.yaml").read_text())
    raw["run"]["stage"] = "second"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    assert load_config(tmp_path / "r.yaml", ["objective.name=reverse_kl"]).run.stage == "second"
    assert load_config(tmp_path / "r.yaml", ["objective.name=reverse_kl", "run.stage="]).run.stage == "reverse_kl"
    assert config("objective.name=reverse_kl").run.stage == "reverse_kl"
    assert config("objective.name=xopd").run.stage == "xopd"


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_info(self: HfApi, name: str, timeout: float) -> object:
        asked.append((name, timeout))
        if name == "gpt2":
            return object()
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    hub.refused.cache_clear()
    expected = "student.path nope: expected a checkpoint folder, a run folder or a hub id such as owner/name; "
    for _ in range(2):
        with pytest.raises(UserError, match=f"{expected}there is no such folder, and of the hub: no route$"):
            resolve_model("nope", "student.path")
    assert resolve_model("gpt2", "teacher.path") == "gpt2" and resolve_model("a/b", "teacher.path") == "a/b"
    assert asked == [("nope", 5.0), ("gpt2", 5.0)]  # once each, and no id with an owner
    hub.refused.cache_clear()


def test_numbers_that_yaml_reads_as_text() -> None:
    assert config("optim.lr=1e-4").optim.lr == 1e-4


def test_deepspeed_file_must_leave_the_recipe_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}))
    with pytest.raises(UserError, match=r"sets gradient_clipping to 0.5, the recipe's optim.grad_clip is 1.0"):
        deepspeed_settings(config(f"train.deepspeed={path}"))
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert deepspeed_settings(config())["zero_optimization"]["stage"] == 1


def test_learning_rate_by_hand() -> None:
    c = config("optim.lr=1.0", "optim.warmup_steps=2", "train.steps=5", "optim.final_lr_share=0.2")
    assert [round(learning_rate(c, s), 6) for s in range(5)] == [0.5, 0.8, 0.6, 0.4, 0.2]


def test_light_imports() -> None:
    code = "import sys, opd.cli, opd.config.load; assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_without_a_folder_gets_one_of_its_own_settings() -> None:
    one, again, more = (
        load_config("recipes/tiny/2_xopd.yaml", o) for o in ([], ["launch.processes=1"], ["run.seed=1"])
    )
    assert one.run.dir.startswith("runs/tiny-2_xopd-") and len(one.run.dir) == len("runs/tiny-2_xopd-") + 8
    assert one.run.dir == again.run.dir != more.run.dir
    assert load_config("recipes/tiny/2_xopd.yaml", ["run.dir=runs/x"]).run.dir == "runs/x"


@pytest.mark.parametrize(
    "key", ["data.max_bad_share", "optim.grad_clip", "objective.mu", "rollout.timeout_s", "optim.lr"]
)
@pytest.mark.parametrize("written", ["5e-1", ".5e0", "5.E-1", "0.5", "+5e-1"])
def test_numbers_may_be_written_with_an_exponent(key: str, written: str) -> None:
    config = load_config("recipes/tiny/2_xopd.yaml", [f"{key}={written}"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == 0.5
