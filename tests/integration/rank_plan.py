"""One rank of two: the bytes that DeepSpeed's engine really holds, kind by kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opd.config.load import load_config
from opd.models.base import family_of
from opd.train.batch import make_batch, make_samples
from opd.train.learner import Learner
from opd.types import Prompt, Rollout, ScoredRollout

BUCKET = {"reduce_bucket_size": 50000, "stage3_param_persistence_threshold": 10000}
RUNS: list[tuple[dict[str, Any], list[str]]] = [
    ({"stage": 3}, ["student.dtype=bfloat16"]),
    ({"stage": 3}, ["student.dtype=float32", "student.train=[llm, adapter]"]),
    ({"stage": 2}, ["student.dtype=bfloat16"]),
]


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def states(learner: Learner) -> dict[str, int]:
    """Bytes by kind, between two steps."""
    optimizer: Any = learner.optimizer
    parameters = list(learner.model.parameters())
    if learner.engine.zero_optimization_stage() == 3:
        masters, gradients = optimizer.fp32_partitioned_groups_flat, [optimizer.grad_partitions_flat_buffer]
        sharded = held(p.ds_tensor for p in parameters)
        live = held(p.data for p in parameters if p.ds_persist)
    else:  # gradients live from the backward pass to the optimizer's step
        masters, gradients = optimizer.single_partition_of_fp32_groups, []
        sharded, live = held(p.data for p in parameters), 0
    moments = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    buckets = [b.buffer for b in optimizer.ipg_buckets.values() if torch.is_tensor(b.buffer)]
    return {
        "parameters": sharded,
        "small parameters, whole": live,
        "gradients": held(gradients),
        "float32 copy": held(masters),
        "AdamW's moments": held(moments),
        "gradient bucket": held(buckets),
    }


def main(student: str, rank: int, out: Path) -> list[dict[str, int]]:
    family = family_of(student)
    rng = np.random.default_rng(0)
    found = []
    for i, (zero, more) in enumerate(RUNS):
        file = out / f"plan{i}.json"
        if rank == 0:
            file.write_text(json.dumps({"zero_optimization": {**zero, **BUCKET}}))
        dist.barrier()
        overrides = ["train.prompts_per_step=2", f"student.path={student}", f"train.deepspeed={file}", *more]
        config = load_config("recipes/tiny/2_xopd.yaml", overrides)
        learner = Learner(config, family, student)
        clip = {"a": rng.normal(0, 0.1, 30000).astype(np.float32)}
        part = {"type": "audio", "path": "a", "transcript": "what is one plus two"}
        prompt = Prompt("a", ({"role": "user", "content": [part]},))
        logp = np.full(3, -1.0, np.float32)
        scored = [ScoredRollout(Rollout(prompt, "speech", (300 + rank, 301, 2), logp, 0, False), logp - 0.5)]
        learner.step(make_batch(make_samples(scored, clip, family), clip, config), 0)
        found.append(states(learner))
    return found
