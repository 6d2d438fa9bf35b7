"""Addresses: on which host, port and devices every server and learner rank of a run is. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Literal, Self

from opd.config.needs import starts_student, starts_teacher
from opd.config.placement import Placement, Servers, placement_of
from opd.config.schema import Config
from opd.inference.host import LOOPBACK, free_port
from opd.settings import UserError

FIRST_PORT = 8100  # where the recipe names none and several nodes must agree
SERVERS_FROM = 10  # ports from the first to those of the servers
URLS = {"student": "rollout.urls", "teacher": "teacher.urls"}

Kind = Literal["student", "teacher"]


@dataclass(frozen=True)
class Place:
    """Where one vLLM server runs."""

    name: str  # of the process and its log
    kind: Kind
    node: int
    host: str
    port: int
    devices: tuple[int, ...] = ()  # none: CPU
    memory: float | None = None  # share of each device, where the recipe names none
    neighbours: int = 1  # servers of its kind on its node

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.host}:{self.port}"

    @classmethod
    def here(cls, kind: Kind, port: int | None = None) -> Self:
        """A lone server on this machine's CPU, at a free port."""
        return cls(kind, kind, 0, LOOPBACK, port or free_port())


@dataclass(frozen=True)
class Layout:
    """Where everything that a run starts has its place, on all nodes."""

    placement: Placement
    hosts: list[str]  # address of each node
    servers: list[Place]
    hub_port: int  # of node 0: its launcher hears the others there
    rendezvous_port: int  # of the first learner node: the ranks meet there

    def on(self, node: int) -> list[Place]:
        """Servers of a node."""
        return [p for p in self.servers if p.node == node]

    @property
    def head(self) -> int:
        """The node of learner rank 0, which keeps the run folder."""
        return self.placement.learner_nodes[0]


def told(servers: list[Place]) -> list[str]:
    """Overrides that tell a learner, or whoever else asks these servers, their URLs."""
    urls = {key: [p.url for p in servers if p.kind == kind] for kind, key in URLS.items()}
    return [f"{key}={json.dumps(found)}" for key, found in urls.items() if found]


def layout(config: Config) -> Layout:
    """Give every server and the learner an address.

    Raises UserError when launch.hosts does not name an address for each of several nodes.
    """
    placement = placement_of(config)
    hosts = config.launch.hosts or [LOOPBACK]
    if len(hosts) != placement.nodes:
        found = f"{placement.nodes} nodes, found {len(config.launch.hosts)} addresses"
        remedy = "name each node's, such as launch.hosts=[10.0.0.1,10.0.0.2]"
        raise UserError(f"launch.hosts: {config.launch.placement} has {found}; {remedy}")
    if len(set(hosts)) < len(hosts):
        twice = max(hosts, key=hosts.count)
        raise UserError(f"launch.hosts: {twice} twice; expected an address of its own for each node")
    fixed = config.launch.port or (FIRST_PORT if placement.nodes > 1 else None)
    offsets = count(SERVERS_FROM)

    def port(offset: int) -> int:
        return fixed + offset if fixed else free_port()

    def address(node: int) -> tuple[str, int]:
        return hosts[node], port(next(offsets))

    places = places_of("student", placement.rollout if starts_student(config) else [], address)
    places += places_of("teacher", placement.teacher if starts_teacher(config) else [], address)
    return Layout(placement, hosts, places, port(0), port(1))


Address = Callable[[int], tuple[str, int]]


def places_of(
    kind: Kind, groups: list[Servers], address: Address = lambda node: (LOOPBACK, free_port())
) -> list[Place]:
    """Where the servers of a kind run; `address`: host and port for one more on a node, by default of this machine."""
    parts = [(g, devices) for g in groups for devices in g.parts()]
    nodes = [g.node for g, _ in parts]
    name = kind if len(parts) == 1 else f"{kind}-{{}}"
    return [
        Place(name.format(i), kind, g.node, *address(g.node), devices, g.memory, nodes.count(g.node))
        for i, (g, devices) in enumerate(parts)
    ]
