"""Learning rates, DeepSpeed settings, optimizer options and sums of the learner."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import opd.train.learner
from opd.config.deepspeed import RECIPE_OWNS, deepspeed_settings
from opd.config.load import load_config
from opd.config.schema import Config
from opd.settings import UserError
from opd.train.learner import Sums, learning_rate

ROOT = Path(__file__).parents[3]
STUDENT = str(ROOT / "recipes/tiny/student")


@pytest.fixture(autouse=True)
def _at_root() -> None:
    os.chdir(ROOT)


def config(*overrides: str) -> Config:
    return load_config("recipes/tiny/2_xopd.yaml", [f"student.path={STUDENT}", "train.prompts_per_step=2", *overrides])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1.0, 5: 1.0, 10: 1.0}),
        ("linear", {0: 1.0, 5: 0.6, 10: 0.2}),
        ("cosine", {0: 1.0, 5: 0.6, 10: 0.2, 2: 0.2 + 0.4 * (1 + np.cos(0.2 * np.pi))}),
    ],
)
def test_learning_rate_at_the_edges(schedule: str, expected: dict[int, float]) -> None:
    c = config("optim.lr=2.0", "optim.warmup_steps=0", "train.steps=11", "optim.final_lr_share=0.2")
    c = c.changed({"optim.schedule": schedule})
    assert {s: learning_rate(c, s) for s in expected} == pytest.approx({s: 2.0 * v for s, v in expected.items()})
    c = c.changed({"train.steps": 1})
    assert learning_rate(c, 0) == 2.0  # a run of one step is at full rate, not at its end
    c = c.changed({"optim.warmup_steps": 4})
    assert learning_rate(c, 0) == 0.5


def test_warm_up_ends_at_the_full_rate() -> None:
    c = config("optim.lr=1.0", "optim.warmup_steps=4", "train.steps=11", "optim.schedule=constant")
    assert [learning_rate(c, s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


OWNED = {
    "train_batch_size": "train.prompts_per_step is 2",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens is 8192",
    "gradient_accumulation_steps": "train.micro_batch_tokens is 8192",
    "gradient_clipping": "optim.grad_clip is 1.0",
    "bf16": "student.dtype is float32",
    "fp16": "student.dtype is float32",
    "amp": "student.dtype is float32",
    "torch_autocast": "student.dtype is float32",
    "data_types": "student.dtype is float32",
    "communication_data_type": "student.dtype is float32",
    "optimizer": "optim.lr is 0.0002",
    "scheduler": "optim.schedule is linear",
}


@pytest.mark.parametrize("key", sorted(OWNED))
def test_what_the_recipe_owns_is_refused_with_both_values(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: 7}))
    with pytest.raises(UserError) as e:
        deepspeed_settings(config(f"train.deepspeed={path}"))
    assert str(e.value) == f"{path}: sets {key} to 7, the recipe's {OWNED[key]}: take it out there"


@pytest.mark.parametrize("key", ["prescale_gradients", "gradient_predivide_factor", "zero_optimisation"])
def test_what_no_file_may_set_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: 7}))
    with pytest.raises(UserError, match=f"sets {key} to 7; expected nothing but zero_optimization, aio"):
        deepspeed_settings(config(f"train.deepspeed={path}"))


def test_auto_values_leave_and_the_recipe_fills_in(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(RECIPE_OWNS, "auto")}))
    settings = deepspeed_settings(config(f"train.deepspeed={path}", "student.dtype=bfloat16", "optim.grad_clip=0.25"))
    assert settings == {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def test_accelerates_file_comes_before_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "from_accelerate.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(UserError, match="from_accelerate.json: no such file"):
        deepspeed_settings(config())
    path.write_text('{"zero_optimization": {"stage": 1}')
    with pytest.raises(UserError, match="from_accelerate.json: not valid JSON"):
        deepspeed_settings(config())
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert deepspeed_settings(config())["zero_optimization"] == {"stage": 1}
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    assert deepspeed_settings(config())["zero_optimization"]["stage"] == 3


def test_the_optimizer_gets_the_recipes_numbers() -> None:
    c = config("optim.lr=0.5", "optim.betas=[0.5, 0.25]", "optim.eps=0.125", "optim.weight_decay=0.0625")
    optimizer = opd.train.learner._optimizer(
        c, [torch.nn.Parameter(torch.zeros(1))], {"zero_optimization": {"stage": 3}}
    )
    found = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (found["lr"], found["betas"], found["eps"], found["weight_decay"]) == (0.5, (0.5, 0.25), 0.125, 0.0625)


def test_sums_meet_over_micro_batches_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Sums(), Sums()]
    ranks[0].add("x", torch.tensor([1.0, 2.0, 4.0, 9.0]), torch.tensor([True, True, True, False]))
    ranks[0].add("x", torch.tensor([5.0]), torch.tensor([True]))
    ranks[1].add("x", torch.tensor([10.0, float(7)]), torch.tensor([True, False]))
    for rank in ranks:
        rank.add("nothing", torch.tensor([3.0]), torch.tensor([False]))
    ranks[0].total("loss", torch.tensor(0.25))
    ranks[0].total("loss", torch.tensor(0.5))
    ranks[1].total("loss", torch.tensor(-1.0))
    sent: list[Tensor] = []
    monkeypatch.setattr(opd.train.learner, "all_reduce", lambda x, op: sent.append(x) or x)
    assert ranks[1].reduce() == {"x": 10.0, "loss": -1.0}
    monkeypatch.setattr(opd.train.learner, "all_reduce", lambda x, op: x + sent[0] if op == "sum" else None)
    assert ranks[0].reduce() == {"x": (1 + 2 + 4 + 5 + 10) / 5, "loss": -0.25}


def test_a_settings_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text("[3]")
    with pytest.raises(UserError, match="zero.json: expected an object, found list"):
        deepspeed_settings(config(f"train.deepspeed={path}"))
    path.write_text('{"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}')
    assert deepspeed_settings(config(f"train.deepspeed={path}"))["bf16"] == {"enabled": False}
