"""What two real ZeRO ranks hold and compute, against whole models and the plan: all in one start of two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_plan
from live import ROOT, STUDENT

from opd.config.deepspeed import deepspeed_settings
from opd.config.load import load_config
from opd.plan import shapes
from opd.plan.learner_memory import SIZES, Zero, states, trained

PARTS = ("rank_student", "rank_teacher", "rank_gradient", "rank_plan")
Found = dict[str, list[Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each of the two ranks found, by part; and the folder."""
    out = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", str(Path(__file__).parent / "ranks.py"), STUDENT, str(out), *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return {p: [json.loads((out / f"{p}.{rank}.json").read_text()) for rank in range(2)] for p in PARTS} | {
        "out": [out]
    }


def test_parameters_are_sharded(found: Found) -> None:
    for r in found["rank_student"]:
        assert r["sharded"] == r["parameters"] > 0 and r["elements"] < 0.51 * r["all_elements"] + 1000
        assert r["loss"] == pytest.approx(r["reference_loss"], abs=1e-5)
        assert r["mixed_loss"] == r["mixed_loss"]  # a rank of text only beside one with speech came through
        assert r["tower_calls"] == 1  # four answers to one clip


def test_the_gradient_that_zero_3_steps_with(found: Found) -> None:
    """Two ranks, several micro-batches and chunks, gradient checkpointing; output layer apart and tied."""
    for r in found["rank_gradient"]:
        assert (r["apart"].pop("tied"), r["tied"].pop("tied")) == (False, True)
        for case, (loss, expected, error, name, of_head, largest) in {**r["apart"], **r["tied"]}.items():
            assert loss == pytest.approx(expected, rel=1e-5) and largest > 1e-3, case
            assert error < 1e-4 and of_head < 5e-5, (case, name)


def test_a_sharded_teacher_is_the_whole_one(found: Found) -> None:
    for r in found["rank_teacher"]:
        assert r["sharded"] == r["parameters"] > 0 and r["elements"] < 0.51 * r["all_elements"] + 1000
        assert r["student_sharded"] and not r["state_left"]
        assert r["same_buffers"] == r["student_buffers"] > 0  # in bfloat16 too, what is computed keeps its precision
        for name in ("uneven", "none on 1", "none on 0", "zero3_offload", "zero2", "bfloat16"):
            scores, rows, other_responses = r[name]
            assert scores <= 1e-5 and rows <= 1e-4 and other_responses == 0, name
        for name in ("adapters off", "copy"):
            start = r[name]
            assert start["sharded"] and start["shares"] == (name == "adapters off")
            scores, rows, other_responses = start["differences"]
            assert scores <= 1e-5 and rows <= 1e-4 and other_responses == 0, name
            assert start["found"][0] == pytest.approx(0.0, abs=1e-6) and start["found"][2] > 1e-3
            assert start["text_loss"][0] == pytest.approx(0.0, abs=1e-6) and start["text_loss"][2] > 1e-3
            if start["expected"][0] is not None:  # rank 0
                assert start["found"] == pytest.approx(start["expected"], rel=1e-3, abs=1e-6)


def test_an_engine_holds_what_the_plan_says(found: Found) -> None:
    for of_rank in found["rank_plan"]:
        for i, (held, (_, overrides)) in enumerate(zip(of_rank, rank_plan.RUNS, strict=True)):
            given = [f"student.path={STUDENT}", f"train.deepspeed={found['out'][0]}/plan{i}.json", *overrides]
            config = load_config("recipes/tiny/2_xopd.yaml", given)
            shape = shapes.student_shape(config)
            zero = Zero.of(deepspeed_settings(config))
            weights = [w.numel for w in shape.weights]
            planned = states(zero, weights, trained(config, shape), SIZES[config.student.dtype], 2).device
            for name, size in held.items():
                if name == "gradients" and zero.stage == 2:
                    assert size == 0  # between two steps
                else:
                    assert size == pytest.approx(planned.get(name, 0), rel=0, abs=64), (overrides, name)
