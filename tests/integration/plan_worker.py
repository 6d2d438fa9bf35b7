"""One rank of two: the bytes that DeepSpeed's engine really holds, kind by kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from opd.config.load import load_config
from opd.models.base import family_of
from opd.train import extensions
from opd.train.batch import make_batch, make_samples
from opd.train.learner import Learner
from opd.types import Prompt, Rollout, ScoredRollout

STUDENT = "recipes/tiny/student"


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


def main(out: str, *runs: str) -> None:
    extensions.build()
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    family = family_of(STUDENT)
    rng = np.random.default_rng(0)
    found = []
    for run in runs:
        overrides = ["train.prompts_per_step=2", f"student.path={STUDENT}", *json.loads(run)]
        config = load_config("recipes/tiny/2_xopd.yaml", overrides)
        learner = Learner(config, family, STUDENT)
        clip = {"a": rng.normal(0, 0.1, 30000).astype(np.float32)}
        part = {"type": "audio", "path": "a", "transcript": "what is one plus two"}
        prompt = Prompt("a", ({"role": "user", "content": [part]},))
        logp = np.full(3, -1.0, np.float32)
        scored = [ScoredRollout(Rollout(prompt, "speech", (300 + rank, 301, 2), logp, 0, False), logp - 0.5)]
        learner.step(make_batch(make_samples(scored, clip, family), clip, config), 0)
        found.append(states(learner))
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
