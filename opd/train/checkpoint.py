"""Checkpoints: written aside, then renamed; a reader sees a whole one or none.

    step_N/model/       Hugging Face files: transformers and vLLM load them as they are; adapters are merged in
    step_N/adapter/     with student.lora alone: the adapters, as PEFT's files, for student.path
    step_N/optimizer/   DeepSpeed's shards of optimizer state and trained parameters, one per rank
    best.json           which of them is the best by eval.best
    step_N/state.json   the step and the seconds trained; the data position is a function of the step

The optimizer shards are DeepSpeed's own format, which torch unpickles: load only runs that you trust.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd.models.lora import save_adapter
from opd.settings import UserError
from opd.storage import disk
from opd.storage.json_lines import write_atomic
from opd.storage.run_folder import checkpoints
from opd.train.learner import Learner


def save(
    learner: Learner, run_dir: str, step: int, seconds: float, keep: int, best: dict[str, Any] | None = None
) -> Path:
    """Write `checkpoints/step_N` on all ranks together, then `settle`. Returns its path. UserError for a full disk."""
    folder = Path(run_dir, "checkpoints")
    final, aside = folder / f"step_{step}", folder / f".step_{step}.writing"
    if learner.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    before = sum(p.stat().st_size for old in checkpoints(run_dir)[-1:] for p in old.rglob("*"))
    told = f"{final} cannot be written" + f" (the one before: {disk.gib(before)})" * bool(before)
    with disk.filling(folder, told, aside):
        save_model(learner, aside / "model")
        save_adapters(learner, aside / "adapter")
        learner.engine.save_checkpoint(str(aside), tag="optimizer", save_latest=False, exclude_frozen_parameters=True)
        dist.barrier()
        if learner.rank == 0:
            (aside / "state.json").write_text(json.dumps({"step": step, "seconds": seconds, "world": learner.world}))
            _sync_files(aside)
    if learner.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        settle(run_dir, keep, best)
    dist.barrier()
    return final


def settle(run_dir: str, keep: int, best: dict[str, Any] | None) -> None:
    """Name the best checkpoint in `checkpoints/best.json`, then drop all but that and the newest `keep`.

    `best`: `step` and what else the file shall say; a step whose checkpoint is not there is not named.
    """
    found = checkpoints(run_dir)
    named = f"step_{best['step']}" if best else ""
    if best and named in [p.name for p in found]:
        write_atomic(Path(run_dir, "checkpoints", "best.json"), json.dumps(best) + "\n")
    for old in found[:-keep]:
        if old.name != named:
            shutil.rmtree(old)


def save_model(learner: Learner, folder: Path) -> None:
    """Write the whole student as Hugging Face files: gathered few parameters at a time, held by rank 0.

    The names are those of published checkpoints, which vLLM knows and transformers translates as it loads.
    (`save_pretrained` of some families doubles prefixes, and vLLM then finds nothing.)
    """
    state = {name: value for name, value in learner.gathered(trainable_only=False) if value is not None}
    if learner.rank == 0:
        learner.family.save(learner.model.hf, state, folder)
    dist.barrier()


def save_adapters(learner: Learner, folder: Path) -> None:
    """Write the adapters of student.lora, where they are all that is trained: beside a trained tower they are not
    the student, which then is `model/` alone."""
    if list(learner.config.student.train) != ["llm"] or learner.config.student.lora is None:
        return
    state = {name: value for name, value in learner.gathered_adapters() if value is not None}
    if learner.rank == 0:
        save_adapter(learner.model.hf, state, folder)
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
            with path.open("rb") as f:
                os.fsync(f.fileno())
