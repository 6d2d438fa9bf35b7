"""A recipe's servers and one process that asks them: what `opd eval` and `opd benchmark` share. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd.config.load import resolve_model
from opd.config.objective import ObjectiveConfig
from opd.config.placement import Placement, Servers, node_of, placement_of
from opd.config.schema import Config
from opd.processes.cluster import Alone
from opd.processes.commands import Command, servers
from opd.processes.layout import Place, places_of, told
from opd.processes.supervise import conclude, supervise
from opd.processes.worker import worker
from opd.settings import UserError

WHOLE = 0.9  # of a GPU's memory that two servers on it share
STUDENT = 0.6  # of that


def served(config: Config, out: Path, teacher: bool) -> Config:
    """The recipe as its servers alone have it: no learner, models resolved, the teacher on a server or nowhere."""
    values = {
        "run.dir": str(out),
        "objective": ObjectiveConfig(),  # none that reads more of a teacher than a server gives
        "rollout.source": "student",
        "rollout.sleep": False,
        "student.lora": None,
        "student.path": resolve_model(config.student.path, "student.path"),
        "teacher.kind": "server" if teacher else "local",
        "teacher.path": resolve_model(config.teacher.path, "teacher.path") if teacher else config.teacher.path,
    }
    return config.changed(values)


def ask(config: Config, name: str, target: str, given: dict[str, Any], plain: bool, start: bool = True) -> int:
    """Start the servers that have no URL yet, then a worker that is told their URLs, and see both through.

    target: its function (opd.processes.worker); `given`: arguments, `overrides` among them; `start`: False where it
    needs no server. Returns 0, or 128 + number when a signal ended it. Raises UserError and RunFailed.
    """
    folder = Path(config.run.dir)
    (folder / "status.json").unlink(missing_ok=True)

    def parts() -> tuple[list[Command], Command]:
        started = places(config) if start else []
        asking = worker(name, target, folder, given | {"overrides": [*given["overrides"], *told(started)]})
        devices = [d for p in started for d in p.devices]
        shared = len(set(devices)) < len(devices)  # then the places have the word on its memory
        alone = config.changed({"rollout.server.gpu_memory_utilization": None}) if shared else config
        return servers(alone, started), asking

    return conclude(supervise(config, parts, Alone(), plain, []), "; the same command goes on from here")


def places(config: Config) -> list[Place]:
    """Servers of this node for what has no URL: the student's where the placement has them, and the teacher's.

    A placement without teacher servers gives the teacher the learner's devices, and where those are the student's too,
    a share of their memory. Raises UserError when this node has no place for the student.
    """
    placement, node = placement_of(config), node_of(config)
    mine = [g for g in placement.rollout if g.node == node]
    if not mine and not config.rollout.urls:
        name = config.launch.placement
        raise UserError(f"launch.placement {name}: has no rollout server on node {node}; set OPD_NODE")
    students = [] if config.rollout.urls else mine
    teachers: list[Servers] = []
    if config.teacher.about.servers == "all" and not config.teacher.urls:
        teachers = [g for g in placement.teacher if g.node == node] or [_teacher(placement, node, mine)]
    if {d for g in teachers for d in g.devices} & {d for g in students for d in g.devices}:
        whole = config.rollout.server.gpu_memory_utilization or WHOLE
        students = [g.model_copy(update={"memory": whole * STUDENT}) for g in students]
        teachers = [g.model_copy(update={"memory": whole * (1 - STUDENT)}) for g in teachers]
    return places_of("student", students) + places_of("teacher", teachers)


def _teacher(placement: Placement, node: int, rollout: list[Servers]) -> Servers:
    taken = {d for g in rollout for d in g.devices}
    named = [d for g in placement.learner if g.node == node for d in g.devices]
    if not named:
        return Servers(node=node, devices=rollout[0].devices[: rollout[0].tensor_parallel] if rollout else [])
    free = [d for d in named if d not in taken] or named
    size = min(len(free), rollout[0].tensor_parallel if rollout else len(free))
    return Servers(node=node, devices=free[:size], tensor_parallel=size)
