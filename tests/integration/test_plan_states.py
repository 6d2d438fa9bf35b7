"""The model states of `opd plan` against what real ZeRO engines of two ranks hold on the tiny pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.config.deepspeed import deepspeed_settings
from opd.config.load import load_config
from opd.plan import shapes
from opd.plan.learner_memory import SIZES, Zero, states, trained

ROOT = Path(__file__).parents[2]
BUCKET = {"reduce_bucket_size": 50000, "stage3_param_persistence_threshold": 10000}
RUNS: list[tuple[dict[str, Any], list[str]]] = [
    ({"stage": 3}, ["student.dtype=bfloat16"]),
    ({"stage": 3}, ["student.dtype=float32", "student.train=[llm, adapter]"]),
    ({"stage": 2}, ["student.dtype=bfloat16"]),
]


def test_an_engine_holds_what_the_plan_says(tmp_path: Path) -> None:
    runs = []
    for i, (zero, overrides) in enumerate(RUNS):
        file = tmp_path / f"{i}.json"
        file.write_text(json.dumps({"zero_optimization": {**zero, **BUCKET}}))
        runs.append([f"train.deepspeed={file}", *overrides])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", str(Path(__file__).parent / "plan_worker.py"), str(tmp_path), *map(json.dumps, runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for rank in range(2):
        for found, overrides in zip(json.loads((tmp_path / f"rank{rank}.json").read_text()), runs, strict=True):
            config = load_config("recipes/tiny/2_xopd.yaml", ["student.path=recipes/tiny/student", *overrides])
            shape = shapes.student_shape(config)
            zero = Zero.of(deepspeed_settings(config))
            weights = [w.numel for w in shape.weights]
            planned = states(zero, weights, trained(config, shape), SIZES[config.student.dtype], 2).device
            for name, size in found.items():
                if name == "gradients" and zero.stage == 2:
                    assert size == 0  # between two steps
                else:
                    assert size == pytest.approx(planned.get(name, 0), rel=0, abs=64), (overrides, name)
