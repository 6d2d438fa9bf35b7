"""Checkpoints: written aside, then renamed; a reader sees a whole one or none.

    step_N/model/       Hugging Face files: transformers and vLLM load them as they are
    step_N/optimizer/   DeepSpeed's shards of optimizer state and trained parameters, one per rank
    step_N/state.json   the step and the seconds trained; the data position is a function of the step

The optimizer shards are DeepSpeed's own format, which torch unpickles: load only runs that you trust.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd.config import UserError, checkpoints
from opd.learner import Learner


def save(learner: Learner, run_dir: str, step: int, seconds: float, keep: int) -> Path:
    """Write `checkpoints/step_N` on all ranks together and drop all but the newest `keep`. Returns its path."""
    folder = Path(run_dir, "checkpoints")
    final, aside = folder / f"step_{step}", folder / f".step_{step}.writing"
    if learner.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    save_model(learner, aside / "model")
    learner.engine.save_checkpoint(str(aside), tag="optimizer", save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()
    if learner.rank == 0:
        (aside / "state.json").write_text(json.dumps({"step": step, "seconds": seconds, "world": learner.world}))
        _sync_files(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def save_model(learner: Learner, folder: Path) -> None:
    """Write the whole student as Hugging Face files: gathered one parameter at a time, held by rank 0.

    The names are those of published checkpoints, which vLLM knows and transformers translates as it loads.
    (`save_pretrained` of some families doubles prefixes, and vLLM then finds nothing.)
    """
    from huggingface_hub import save_torch_state_dict

    state: dict[str, torch.Tensor] = {}
    for name, value in learner.gathered(trainable_only=False):
        if value is not None:
            state[learner.family.to_vllm(name)] = value
    if learner.rank == 0:
        hf: Any = learner.model.hf
        hf.config.save_pretrained(folder)
        hf.generation_config.save_pretrained(folder)
        learner.family.processor.save_pretrained(folder)
        save_torch_state_dict(state, folder)
    dist.barrier()


def load_newest(learner: Learner, run_dir: str) -> tuple[int, float]:
    """Put the learner where the newest checkpoint left it: (finished steps, seconds trained), (0, 0) without one."""
    found = checkpoints(run_dir)
    if not found:
        return 0, 0.0
    state: dict[str, Any] = json.loads((found[-1] / "state.json").read_text())
    if state["world"] != learner.world:
        raise UserError(
            f"{found[-1]}: written by {state['world']} learner processes, {learner.world} now: "
            f"set launch.processes={state['world']}, or start a new run with student.path={found[-1] / 'model'}"
        )
    path, _ = learner.engine.load_checkpoint(str(found[-1]), tag="optimizer", load_module_strict=False)
    if path is None:
        raise UserError(f"{found[-1]}/optimizer: incomplete; delete that checkpoint to resume from the one before")
    return state["step"], state["seconds"]


def _sync_files(folder: Path) -> None:
    """The rename must not reach the disk before the contents do."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
