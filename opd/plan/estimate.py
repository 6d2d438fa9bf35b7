"""Where things go: whether a recipe's placement fits its GPUs, by formula from configs alone. Imports no torch.

The formulas are in learner_memory.py and server_memory.py, the estimate of time in step_time.py. page.py prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import psutil

from opd.config.deepspeed import deepspeed_settings
from opd.config.load import load_config, resolve_model
from opd.config.needs import asks_teacher, starts_student, starts_teacher
from opd.config.placement import Group, Placement, Servers, placement_of
from opd.config.schema import Config
from opd.plan.learner_memory import Bytes, LearnerMemory, Lengths, Zero, learner_memory
from opd.plan.server_memory import CONTEXT, GIB, SLEEPING, Kinds, ServerMemory, server_memory
from opd.plan.shapes import ModelShape, student_shape, teacher_shape
from opd.plan.step_time import Speeds, decode_seconds, learner_flops, push_bytes, push_seconds, scoring_seconds
from opd.settings import UserError, read_yaml
from opd.storage.disk import gib

FRAGMENTS = 0.05  # of a learner's peak, lost between the allocator's blocks: assumed
PROCESS = GIB  # a Python process with torch, on the host: assumed
TEXT_TOKENS = 64  # of a prompt, beside its audio: assumed
CLIP_SECONDS = 10.0  # of a usual clip: assumed


@dataclass(frozen=True)
class Machine:
    """What there is to place on. None: as many GPUs and nodes as the placement names."""

    gpus: int | None = None  # of a node
    nodes: int | None = None
    memory: float = 80.0  # GiB of a GPU
    host: float | None = None  # GiB of a node's own memory; None: not judged, but on a CPU this machine's
    speeds: Speeds = field(default_factory=Speeds)
    text_tokens: int = TEXT_TOKENS
    clip_seconds: float = CLIP_SECONDS
    response_tokens: int | None = None  # None: half of rollout.max_tokens


@dataclass
class Use:
    """What is on one device (or, with device None, in a node's own memory), at each moment that is judged."""

    node: int
    device: int | None
    capacity: int | None  # bytes; None: not judged
    moments: dict[str, Bytes] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def needs(self) -> int:
        """Bytes in the worst moment."""
        return sum(self.moments[self.worst].values()) if self.moments else 0

    @property
    def short(self) -> int:
        """Bytes too many; 0 where it fits."""
        return 0 if self.capacity is None else max(0, self.needs - self.capacity)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by phase: an estimate."""

    rollout: float
    teacher: float
    learner: float
    sync: float
    at_once: int  # sequences that a rollout server decodes at a time

    @property
    def step(self) -> float:
        """Seconds, all phases one after another."""
        return self.rollout + self.teacher + self.learner + self.sync


@dataclass
class Plan:
    """A recipe on a placement: bytes by role, what does not fit, bytes of a push, seconds of a step."""

    config: Config
    placement: Placement
    machine: Machine
    student: ModelShape
    teacher: ModelShape | None  # None: nothing in the run asks one
    longest: Lengths
    typical: Lengths
    zero: Zero
    learner: LearnerMemory
    servers: dict[ServerMemory, list[Servers]] = field(init=False)  # alike groups share one figure; empty on a CPU
    uses: list[Use] = field(init=False)  # of the GPUs that hold something
    hosts: list[Use] = field(init=False)
    push: int = field(init=False)  # bytes; 0 where nothing is pushed
    time: StepTime | None = field(init=False)  # None on a CPU
    shortfalls: list[str] = field(init=False)  # one line for each thing that does not fit

    def __post_init__(self) -> None:
        """What follows from the parts."""
        kinds: Kinds = {"student": (self.student, self.placement.rollout)} if starts_student(self.config) else {}
        if self.teacher and starts_teacher(self.config):
            kinds["teacher"] = self.teacher, self.placement.teacher
        on_gpus = self.placement.devices_per_node > 0
        self.servers = {}
        for kind, (shape, groups) in kinds.items() if on_gpus else ():
            for g in groups:
                size = g.tensor_parallel, round(self.machine.memory * GIB), g.memory
                self.servers.setdefault(server_memory(self.config, shape, kind, *size), []).append(g)
        self.push = push_bytes(self.config, self.student) if "student" in kinds else 0
        self.uses, self.hosts = self._devices() if on_gpus else [], self._hosts(kinds)
        self.time = self._time() if on_gpus else None
        self.shortfalls = shortfalls(self)

    @property
    def push_s(self) -> float:
        """Seconds of a push."""
        transport = self.config.rollout.transport or "file"
        return push_seconds(self.push, transport, self.machine.speeds.links[transport])

    @property
    def fits(self) -> bool:
        """Whether everything has its place."""
        return not self.shortfalls

    def _devices(self) -> list[Use]:
        """Every GPU that holds something. A server takes all its share; a shared one sleeps while the learner works."""
        uses: dict[tuple[int, int], Use] = {}

        def of(groups: Iterable[Group]) -> Iterator[Use]:
            places = [(g.node, device) for g in groups for device in g.devices]
            return (uses.setdefault(place, Use(*place, round(self.machine.memory * GIB))) for place in places)

        for server, groups in self.servers.items():
            holds = {f"{server.kind} server's share": server.share}
            if server.beyond:
                holds["log-probs of prompts"] = server.beyond
            for use in of(groups):
                use.moments[f"{server.kind} server"] = dict(holds)
        learner = self.learner
        working = {"states": learner.resident, **learner.phases[learner.worst]}
        working["CUDA context, fragments"] = CONTEXT + round(FRAGMENTS * learner.peak)
        for use in of(self.placement.learner):
            sleeping = {}
            for holds in use.moments.values():
                holds["learner, at rest"] = learner.resident + CONTEXT
                sleeping = {"sleeping server": SLEEPING if self.config.rollout.sleep else sum(holds.values())}
            use.moments[f"learner, {learner.worst}"] = working | sleeping
        return list(uses.values())

    def _hosts(self, kinds: Kinds) -> list[Use]:
        """A node's own memory: what is offloaded, sleeping weights, pushed files; on a CPU everything."""
        rollout, learner, on_cpu = self.config.rollout, self.learner, not self.placement.devices_per_node
        given = round(self.machine.host * GIB) if self.machine.host else None
        capacity = given or (psutil.virtual_memory().total if on_cpu else None)
        found = []
        for node in range(self.placement.nodes):
            holds: Bytes = {}
            ranks = sum(len(g.devices) or g.count for g in self.placement.learner if g.node == node)
            if ranks:
                on_device = learner.peak if on_cpu else 0
                holds["learner ranks"] = ranks * (sum(learner.host.values()) + on_device + PROCESS)
            for kind, (shape, groups) in kinds.items():
                count = sum(len(g.parts()) for g in groups if g.node == node)
                weights = server_memory(self.config, shape, kind, 1, GIB, None).weights
                if on_cpu and count:
                    holds[f"{kind} servers"] = count * (weights + PROCESS + rollout.server.kv_cache_gib * GIB)
                elif count and kind == "student" and rollout.sleep:
                    holds["weights of sleeping servers"] = count * weights
            if ranks and rollout.transport == "file" and self.push:
                holds["weights on their way"] = self.push
            if holds:
                found.append(Use(node, None, capacity, {"all together": holds}))
        return found

    def _time(self) -> StepTime:
        c, speeds, ranks = self.config, self.machine.speeds, self.placement.ranks
        rollout, at_once = 0.0, 0
        if c.rollout.student_writes:  # as if all servers were alike, and the slowest of them
            students = {s: groups for s, groups in self.servers.items() if s.kind == "student"}
            count = sum(len(g.parts()) for groups in students.values() for g in groups)
            figures = [decode_seconds(c, self.student, s, count, ranks, self.typical, speeds) for s in students]
            rollout, at_once = max(figures, default=(0.0, 0))
        serves = any(server.kind == "teacher" for server in self.servers)
        devices = sum(len(g.devices) for g in self.placement.teacher) if serves else ranks
        teacher = scoring_seconds(c, self.teacher, max(1, devices), self.typical, speeds) if self.teacher else 0.0
        work = learner_flops(c, self.student, self.typical) / (ranks * speeds.flops(self.student))
        return StepTime(rollout, teacher, work, self.push_s if c.rollout.student_writes else 0.0, at_once)


def load(recipe: str, overrides: list[str]) -> Config:
    """A recipe as `load_config` reads it; a student that an earlier run is still to make has the shape of that run's.

    The earlier run is of a recipe in the same folder, whose run.dir is this one's student.path.
    """
    config = load_config(recipe, overrides)
    path = config.student.path
    for other in sorted(Path(recipe).parent.glob("*.yaml")):
        with suppress(UserError):
            resolve_model(path, "student.path")
            break
        raw = read_yaml(other)
        if (raw.get("run") or {}).get("dir") == path:
            path = (raw.get("student") or {}).get("path") or path
    return config if path == config.student.path else load_config(recipe, [*overrides, f"student.path={path}"])


def estimate(config: Config, machine: Machine | None = None) -> Plan:
    """The plan of a recipe, from config.json files and its settings alone; no weights are read.

    Raises UserError when a model's config cannot be read, the DeepSpeed settings are at fault, or
    machine.response_tokens is above rollout.max_tokens.
    """
    machine, placement = machine or Machine(), placement_of(config)
    student, teacher = student_shape(config), teacher_shape(config) if asks_teacher(config) else None
    longest = _lengths(config, machine, student, config.data.max_audio_seconds, config.rollout.max_tokens)
    response = machine.response_tokens or max(1, config.rollout.max_tokens // 2)
    if response > config.rollout.max_tokens:
        most = f"rollout.max_tokens, which is {config.rollout.max_tokens}"
        raise UserError(f"--response-tokens {response}: expected at most {most}; no response is longer")
    seconds = min(machine.clip_seconds, config.data.max_audio_seconds)
    typical = _lengths(config, machine, student, seconds, response)
    zero = Zero.of(deepspeed_settings(config))
    learner = learner_memory(config, zero, student, teacher, longest, placement.ranks)
    return Plan(config, placement, machine, student, teacher, longest, typical, zero=zero, learner=learner)


def alternatives(recipe: str, overrides: list[str], machine: Machine, folder: Path) -> dict[str, Plan | str]:
    """Every placement of a folder with the same recipe: its plan, or why it cannot be planned."""
    found: dict[str, Plan | str] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            found[str(path)] = estimate(load(recipe, [*overrides, f"launch.placement={path}"]), machine)
        except UserError as e:
            found[str(path)] = str(e)
    return found


def recommended(plans: dict[str, Plan | str]) -> str | None:
    """The placement that fits with the shortest estimated step, of equals the one with fewest GPUs."""
    fitting = [
        (p.time.step, len(p.uses), path) for path, p in plans.items() if isinstance(p, Plan) and p.fits and p.time
    ]
    return min(fitting)[-1] if fitting else None


def _lengths(config: Config, machine: Machine, student: ModelShape, seconds: float, response: int) -> Lengths:
    """Tokens of prompts; a server's max_model_len leaves longer records out (opd/prompts/clips.py, ContextLimit)."""
    text, speech = machine.text_tokens, machine.text_tokens + student.audio_tokens(seconds)
    if starts_student(config):
        room = max(1, config.rollout.server.max_model_len - config.rollout.max_tokens)
        text, speech = min(text, room), min(speech, room)
    return Lengths(speech, text, response, seconds)


def shortfalls(plan: Plan, node: int | None = None) -> list[str]:
    """One line for each thing that does not fit: on one node, or (None) anywhere."""
    found, machine, nodes = [], plan.machine, plan.placement.nodes
    if machine.nodes is not None and nodes > machine.nodes:
        found.append(f"needs {nodes} nodes, given {machine.nodes}")
    used = max((u.device + 1 for u in plan.uses if u.device is not None), default=0)
    if machine.gpus is not None and used > machine.gpus:
        found.append(f"needs {used} GPUs on a node, given {machine.gpus}")
    for s, groups in plan.servers.items():
        if s.missing and (node is None or node in [g.node for g in groups]):
            left = f"share {gib(s.share)} less weights {gib(s.weights)} and a forward pass {gib(s.forward_pass)}"
            short = f"{gib(s.missing)} short of one sequence of {s.max_model_len} tokens"
            found.append(f"{s.kind} server on {at(groups)}: its {left} is {short}")
    alike: dict[str, list[Use]] = {}
    for use in [*plan.uses, *plan.hosts]:
        if use.short and use.capacity is not None and node in (None, use.node):
            said = f"{use.worst} needs {gib(use.needs)} of {gib(use.capacity)}, {gib(use.short)} short"
            alike.setdefault(said, []).append(use)
    return found + [f"{where(uses)}: {said}" for said, uses in alike.items()]


def at(groups: list[Servers]) -> str:
    """Devices of groups of servers in words."""
    return where([Use(g.node, device, None) for g in groups for device in g.devices])


def where(uses: list[Use]) -> str:
    """Devices in words: `node 0 GPU 2-3`."""
    words = []
    for node in sorted({u.node for u in uses}):
        devices = sorted(u.device for u in uses if u.node == node and u.device is not None)
        words.append(f"node {node} GPU {_ranges(devices)}" if devices else f"node {node} host")
    return "; ".join(words)


def _ranges(numbers: list[int]) -> str:
    """Of ascending numbers: those that follow one another differ from their place by the same."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
