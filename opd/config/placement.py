"""Placements: which devices of which node hold rollout servers, teacher servers and learner ranks. Imports no torch.

A placement is a YAML file (recipes/placements/) that knows nothing of models; a recipe names one as launch.placement.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from opd.config.schema import Config
from opd.settings import Section, UserError, looked, read_yaml, shipped, validated


class Group(Section):
    """Servers or learner ranks of one node."""

    node: NonNegativeInt = 0
    devices: list[NonNegativeInt] = Field([], description="GPUs of that node; none: on the CPU")
    count: PositiveInt = Field(1, le=64, description="on the CPU: servers, or learner ranks")


class Servers(Group):
    """vLLM servers: one for every `tensor_parallel` devices."""

    tensor_parallel: PositiveInt = 1
    memory: float | None = Field(None, gt=0, le=1, description="share of each device, where the recipe names none")

    def parts(self) -> list[tuple[int, ...]]:
        """Devices of each server; () on the CPU."""
        n = self.tensor_parallel
        return [tuple(self.devices[i : i + n]) for i in range(0, len(self.devices), n)] or [()] * self.count


class Placement(Section):
    """Who works where. A device may hold a rollout server and a learner rank: the server then sleeps meanwhile."""

    about: str = ""
    nodes: PositiveInt = 1
    devices_per_node: NonNegativeInt = 0
    rollout: list[Servers] = Field(min_length=1)
    teacher: list[Servers] = Field([], description="none: the teacher is local, in every learner rank")
    learner: list[Group] = Field(min_length=1)
    transport: Literal["file", "nccl", "ipc"] = "file"

    @property
    def ranks(self) -> int:
        """Learner ranks of all nodes."""
        return sum(len(g.devices) or g.count for g in self.learner)

    @property
    def learner_nodes(self) -> list[int]:
        """Nodes with learner ranks; the first holds rank 0."""
        return [g.node for g in self.learner]

    @property
    def shared(self) -> bool:
        """Whether rollout servers sleep while the learner works on their devices."""
        return bool(devices_of(self.rollout) & devices_of(self.learner))

    @model_validator(mode="after")
    def _consistent(self) -> Placement:
        groups: dict[str, list[Any]] = {"rollout": self.rollout, "teacher": self.teacher, "learner": self.learner}
        for name, some in groups.items():
            for g in some:
                if g.node >= self.nodes:
                    raise ValueError(f"{name}: node {g.node} of nodes: {self.nodes}; they count from 0")
                if bad := [d for d in g.devices if d >= self.devices_per_node]:
                    raise ValueError(f"{name}: device {bad[0]} of devices_per_node: {self.devices_per_node}")
                if g.devices and "count" in g.model_fields_set:
                    raise ValueError(f"{name}: count {g.count} beside devices {g.devices}; one of them says how many")
                if self.devices_per_node and not g.devices:
                    raise ValueError(f"{name}: a group of node {g.node} names no devices")
                if len(set(g.devices)) < len(g.devices):
                    raise ValueError(f"{name}: a device twice in {g.devices}")
                if isinstance(g, Servers) and g.devices and len(g.devices) % g.tensor_parallel:
                    parts = f"tensor_parallel {g.tensor_parallel}"
                    raise ValueError(f"{name}: {len(g.devices)} devices do not divide by {parts}")
            if len(devices_of(some)) < sum(len(g.devices) for g in some):
                raise ValueError(f"{name}: a device in two groups")
        if both := devices_of(self.teacher) & (devices_of(self.rollout) | devices_of(self.learner)):
            raise ValueError(f"teacher: node, device {sorted(both)[0]} is taken; a teacher server shares with nobody")
        if len(set(self.learner_nodes)) < len(self.learner):
            raise ValueError("learner: one group a node")
        if len({len(g.devices) or g.count for g in self.learner}) > 1:
            raise ValueError("learner: every node that has ranks must have as many; launchers count on it")
        if self.transport == "nccl" and (self.shared or not self.devices_per_node):
            raise ValueError("transport nccl: rollout servers and learner need devices of their own; take ipc or file")
        if self.transport == "ipc" and (not self.shared or len(devices_of(self.rollout)) > 1 or self.ranks > 1):
            raise ValueError("transport ipc: one rollout server and one rank must share a device; take nccl or file")
        return self


def devices_of(groups: list[Servers] | list[Group]) -> set[tuple[int, int]]:
    """(node, device) of all groups."""
    return {(g.node, d) for g in groups for d in g.devices}


def load_placement(path: str) -> Placement:
    """Read a placement. Raises UserError that names the file and key."""
    kind = f"placement{looked(path, ', or in opd itself')}"
    return validated(Placement, read_yaml(shipped(path), kind), path)


def placement_of(config: Config) -> Placement:
    """The recipe's placement; without one, everything on this machine's CPU."""
    if config.launch.placement:
        return load_placement(config.launch.placement)
    teacher = [Servers()] if config.teacher.about.servers == "all" else []
    return Placement(rollout=[Servers()], teacher=teacher, learner=[Group(count=config.launch.processes or 2)])


def of_routes(config: Config) -> dict[str, Config]:
    """The recipe as each of its teachers has it: itself, unless it routes."""
    return {name: config.changed({"teacher": one}) for name, one in config.teacher.each.items()}


def memory_share(config: Config, group: float | None) -> float:
    """Share of a device that a server takes: the recipe's word, else its group's, else 0.9."""
    return config.rollout.server.gpu_memory_utilization or group or 0.9


def node_of(config: Config) -> int:
    """Which node of the placement this machine is. Raises UserError when it has no such node."""
    found = config.launch.node
    nodes = placement_of(config).nodes
    if found is None:
        word = os.environ.get("OPD_NODE") or os.environ.get("SLURM_NODEID") or ("0" if nodes == 1 else "")
        if not word:
            told = f"{config.launch.placement} has {nodes} nodes, and nothing says which one this is"
            raise UserError(f"launch.node: {told}; set OPD_NODE=0 on the first, and so on")
        if not word.isdigit():
            raise UserError(f"OPD_NODE={word}: expected the number of this node, counting from 0")
        found = int(word)
    if nodes == 1 and config.launch.node is None:
        return 0
    if found >= nodes:
        raise UserError(f"launch.node {found}: {config.launch.placement or 'this recipe'} has {nodes} nodes, from 0")
    return found
