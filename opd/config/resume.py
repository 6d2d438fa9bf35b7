"""Whether a run folder belongs to a recipe: new, resumed, finished, or taken. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from opd.config.load import compared, dump_config
from opd.config.schema import Config
from opd.settings import UserError
from opd.storage import disk
from opd.storage.run_folder import checkpoints, git_commit, package_versions, status_of

# What a run makes once its config.yaml is there.
MADE = ("metrics.jsonl", "samples.jsonl", "eval.jsonl", "bad_records.jsonl", "launches.jsonl", "checkpoints")


class Taken(UserError):
    """The run folder holds something else: not even a status may be written there."""


def check(config: Config) -> str:
    """What starting this recipe in its run folder would do: "new", "resume" or "finished".

    Raises Taken when the folder holds a run of another configuration, naming the keys that differ, or files that a new
    run would delete though no run wrote them.
    """
    folder = Path(config.run.dir)
    stored = folder / "config.yaml"
    try:
        disk.free(folder, "run.dir")
    except UserError as e:
        raise Taken(str(e)) from e
    if config.run.overwrite:
        return "new"
    if not stored.is_file():
        # a launch that ended before its learner began leaves launches.jsonl
        made = [n for n in MADE if n != "launches.jsonl"]
        foreign = [n for n in made if (folder / n).is_file() or ((folder / n).is_dir() and any((folder / n).iterdir()))]
        if foreign:
            found = f"run.dir {folder}: holds {', '.join(foreign)} but no config.yaml of a run"
            raise Taken(f"{found}; choose another run.dir, or set run.overwrite=true to delete them")
        return "new"
    try:
        before = yaml.safe_load(stored.read_text())["config"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as e:
        raise Taken(f"{stored}: not readable as a run's config; move the folder away") from e
    old, new = compared(before), compared(dump_config(config))
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if differing:
        shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in differing[:6])
        found = f"run.dir {folder}: holds a run of another configuration: {shown}"
        raise Taken(f"{found}; choose another run.dir, or set run.overwrite=true to delete that run")
    if status_of(folder).get("phase") == "finished":
        return "finished"
    return "resume" if checkpoints(folder) else "new"


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
