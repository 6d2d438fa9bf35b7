"""Where the servers of an evaluation run: where a run has them, and on what its learner leaves free. No torch."""

from __future__ import annotations

from opd.config import Config, UserError
from opd.layout import LOOPBACK, Place, free_port
from opd.placement import Placement, Servers, node_of, placement_of
from opd.servers import Command, student_server, teacher_server

WHOLE = 0.9  # of a GPU's memory that two servers on it share
STUDENT = 0.6  # of that


def places(config: Config) -> list[Place]:
    """Servers of this node for what has no URL: the student's where the placement has them, and the teacher's.

    A placement without teacher servers gives the teacher the learner's devices, and where those are the student's too,
    a share of their memory. Raises UserError when this node has no place for the student.
    """
    placement, node = placement_of(config), node_of(config)
    mine = [g for g in placement.rollout if g.node == node]
    if not mine and not config.rollout.urls:
        raise UserError(
            f"launch.placement {config.launch.placement}: has no rollout server on node {node}; set OPD_NODE"
        )
    students = [] if config.rollout.urls else mine
    teachers: list[Servers] = []
    if config.teacher.kind == "server" and not config.teacher.urls:
        teachers = [g for g in placement.teacher if g.node == node] or [_teacher(placement, node, mine)]
    if {d for g in teachers for d in g.devices} & {d for g in students for d in g.devices}:
        whole = config.rollout.server.gpu_memory_utilization or WHOLE
        students = [g.model_copy(update={"memory": whole * STUDENT}) for g in students]
        teachers = [g.model_copy(update={"memory": whole * (1 - STUDENT)}) for g in teachers]
        config.rollout.server.gpu_memory_utilization = None
    return _placed("student", students) + _placed("teacher", teachers)


def _teacher(placement: Placement, node: int, rollout: list[Servers]) -> Servers:
    taken = {d for g in rollout for d in g.devices}
    named = [d for g in placement.learner if g.node == node for d in g.devices]
    if not named:
        return Servers(node=node, devices=rollout[0].devices[: rollout[0].tensor_parallel] if rollout else [])
    free = [d for d in named if d not in taken] or named
    size = min(len(free), rollout[0].tensor_parallel if rollout else len(free))
    return Servers(node=node, devices=free[:size], tensor_parallel=size)


def _placed(kind: str, groups: list[Servers]) -> list[Place]:
    parts = [(g, devices) for g in groups for devices in g.parts()]
    name = kind if len(parts) == 1 else f"{kind}-{{}}"
    return [
        Place(name.format(i), kind, g.node, LOOPBACK, free_port(), devices, g.memory, len(parts))  # type: ignore[arg-type]
        for i, (g, devices) in enumerate(parts)
    ]


def commands(config: Config, found: list[Place]) -> list[Command]:
    """The servers' commands."""
    makers = {"student": student_server, "teacher": teacher_server}
    return [makers[p.kind](config, p) for p in found]
