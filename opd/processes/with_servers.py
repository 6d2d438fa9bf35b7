"""A recipe's servers and one process that asks them: what `opd eval` and `opd benchmark` share. Imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from opd.config.load import resolve_model
from opd.config.objective import ObjectiveConfig
from opd.config.placement import Placement, Servers, node_of, placement_of
from opd.config.schema import Config
from opd.inference.ports import LOOPBACK, free_port
from opd.processes.cluster import Alone
from opd.processes.commands import Command, student_server, teacher_server
from opd.processes.layout import Place
from opd.processes.supervise import RunFailed, supervise
from opd.settings import UserError

URLS = {"student": "rollout.urls", "teacher": "teacher.urls"}
QUIET = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def served(config: Config, out: Path, teacher: bool) -> Config:
    """The recipe as its servers alone have it: no learner, models resolved, the teacher on a server or nowhere."""
    config.run.dir = str(out)
    config.objective = ObjectiveConfig()  # none that reads more of a teacher than a server gives
    config.rollout.source, config.rollout.sleep, config.student.lora = "student", False, None
    config.student.path = resolve_model(config.student.path, "student.path")
    config.teacher.kind = "server" if teacher else "local"
    if teacher:
        config.teacher.path = resolve_model(config.teacher.path, "teacher.path")
    return config


def ask(config: Config, name: str, argv: list[str], plain: bool, servers: bool = True) -> int:
    """Start the servers that have no URL yet, then `python -m ARGV... rollout.urls=[...]`, and see both through.

    Returns 0, or 128 + number when a signal ended it. Raises UserError and RunFailed.
    """
    (Path(config.run.dir) / "status.json").unlink(missing_ok=True)

    def parts() -> tuple[list[Command], Command]:
        started = places(config) if servers else []
        urls = {key: [p.url for p in started if p.kind == kind] for kind, key in URLS.items()}
        told = [f"{key}={json.dumps(found)}" for key, found in urls.items() if found]
        return commands(config, started), Command(name, [sys.executable, "-m", *argv, *told], QUIET)

    end = supervise(config, parts, Alone(), plain, [])
    if end.code >= 128:
        print(f"\n{end.message}; the same command goes on from here", flush=True)
        return end.code
    if end.code:
        raise UserError(end.message) if end.user_error else RunFailed(end.message)
    return 0


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
