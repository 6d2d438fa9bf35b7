"""Addresses: on which host, port and devices every server and learner rank of a run is. Imports no torch."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass
from typing import Literal

from opd.config import Config, UserError
from opd.placement import Placement, Servers, placement_of

LOOPBACK = "127.0.0.1"
FIRST_PORT = 8100  # where the recipe names none and several nodes must agree
SERVERS_FROM = 10  # ports from the first to those of the servers


# Below the range from which Linux takes the ports of outgoing connections: a server binds its port seconds after it
# was chosen, and none of those may have it by then.
PORTS = range(20000, 32768)
_held: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody listens on and that no other `opd` process of this machine has been given.

    It is this process's until it ends: an abstract Unix socket of that name says so to the others.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0opd-port-{port}")
            with socket.socket() as s:
                s.bind((LOOPBACK, port))
        except OSError:
            claim.close()
            continue
        _held.append(claim)
        return port
    raise UserError(f"no free port on {LOOPBACK} from {PORTS.start} to {PORTS.stop - 1}")


@dataclass(frozen=True)
class Place:
    """Where one vLLM server runs."""

    name: str  # of the process and its log
    kind: Literal["student", "teacher"]
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
    def here(cls, kind: Literal["student", "teacher"], port: int | None = None) -> Place:
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

    def urls(self, kind: str) -> list[str]:
        """Base URLs of the servers of a kind, on all nodes."""
        return [p.url for p in self.servers if p.kind == kind]

    @property
    def head(self) -> int:
        """The node of learner rank 0, which keeps the run folder."""
        return self.placement.learner_nodes[0]


def evaluates(config: Config) -> bool:
    """Whether the run evaluates at its start, in training or at its end."""
    e = config.eval
    return bool((e.test or e.retention) and (e.start or e.every or e.end))


def starts_student(config: Config) -> bool:
    """Whether the launcher starts the student's servers: they are needed, and the recipe names no running ones."""
    return not config.rollout.urls and (config.rollout.student_writes or evaluates(config))


def asks_teacher(config: Config) -> str:
    """What in the run reads the teacher or has it write, in words; empty: nothing does."""
    if config.objective.asks_teacher:
        return f"objective.name {config.objective.name} reads it"
    if config.rollout.teacher_writes:
        return f"with rollout.source {config.rollout.source} it writes responses"
    return "evaluations ask it; without any (eval.test= eval.retention=) it need not be there" * evaluates(config)


def needs_teacher(config: Config) -> bool:
    """Whether anything in the run reads or writes with the teacher: else it need not be there."""
    return bool(asks_teacher(config))


def asks_teacher_servers(config: Config) -> bool:
    """Whether teacher servers work in this run: they grade, or they write a warm start's responses."""
    if config.teacher.kind == "server":
        return needs_teacher(config)
    if config.teacher.kind != "local" or config.objective.name == "uld":  # another tokenizer's ids would be no answer
        return False
    return config.rollout.teacher_writes and bool(config.teacher.urls or placement_of(config).teacher)


def teacher_servers(config: Config) -> list[tuple[str, str, str]]:
    """Teacher servers that the recipe names and the run asks: setting, URL, and the model that they hold."""
    if config.teacher.kind == "routed":
        named = [(f"teacher.routes.{k}.urls", t) for k, t in config.teacher.routes.items()] * needs_teacher(config)
    else:
        named = [("teacher.urls", config.teacher)] * asks_teacher_servers(config)
    return [(key, url, t.path) for key, t in named for url in t.urls]


def uses_start(config: Config) -> bool:
    """Whether the student as it was at the start is asked: as a teacher, or as the reference."""
    teaches = any(t.kind == "self" for t in config.teacher.each.values())
    return config.objective.reference > 0 or (teaches and needs_teacher(config))


def copies_start(config: Config) -> bool:
    """Whether that takes a second copy of the student.

    With student.lora the learner's own weights without adapters are the start, unless the reference hears and
    something of the audio path is trained in full.
    """
    if not uses_start(config) or config.student.lora is None:
        return uses_start(config)
    moved = list(config.student.train) != ["llm"]
    return config.objective.reference > 0 and config.objective.lambda_ < 1 and moved


def shards_start(config: Config) -> bool:
    """Whether the ranks share that copy."""
    return config.teacher.shard or any(t.shard and t.kind == "self" for t in config.teacher.each.values())


def starts_teacher(config: Config) -> bool:
    """Whether the launcher starts teacher servers: they are asked, and the recipe names no running ones."""
    return not config.teacher.urls and asks_teacher_servers(config)


def layout(config: Config) -> Layout:
    """Give every server and the learner an address.

    Raises UserError when launch.hosts does not name an address for each of several nodes.
    """
    placement = placement_of(config)
    hosts = config.launch.hosts or [LOOPBACK]
    if len(hosts) != placement.nodes:
        raise UserError(
            f"launch.hosts: {config.launch.placement} has {placement.nodes} nodes, found {len(config.launch.hosts)} "
            "addresses; name each node's, such as launch.hosts=[10.0.0.1,10.0.0.2]"
        )
    if len(set(hosts)) < len(hosts):
        raise UserError(
            f"launch.hosts: {max(hosts, key=hosts.count)} twice; expected an address of its own for each node"
        )
    fixed = config.launch.port or (FIRST_PORT if placement.nodes > 1 else None)

    def port(offset: int) -> int:
        return fixed + offset if fixed else free_port()

    groups = {"student": placement.rollout if starts_student(config) else []}
    groups["teacher"] = placement.teacher if starts_teacher(config) else []
    found: list[Place] = []
    for kind, some in groups.items():
        parts = [(g, devices) for g in some for devices in g.parts()]
        for i, (g, devices) in enumerate(parts):
            name = kind if len(parts) == 1 else f"{kind}-{i}"
            beside = sum(other.node == g.node for other, _ in parts)
            at = port(SERVERS_FROM + len(found))
            found.append(_place(name, kind, g, hosts[g.node], at, devices, beside))
    return Layout(placement, hosts, found, port(0), port(1))


def _place(name: str, kind: str, g: Servers, host: str, port: int, devices: tuple[int, ...], beside: int) -> Place:
    assert kind in ("student", "teacher")
    return Place(name, kind, g.node, host, port, devices, g.memory, beside)  # type: ignore[arg-type]
