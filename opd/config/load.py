"""From a YAML file and overrides to a checked recipe, and back; whether a run folder belongs to it. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from opd.config.needs import asks_teacher
from opd.config.placement import Placement, devices_of, placement_of
from opd.config.schema import Config
from opd.settings import Section, UserError, first_line, looked, override, read_yaml, validated
from opd.storage import disk
from opd.storage import run_folder as saved
from opd.storage.json_lines import write_atomic

# What names files and folders that are there before a run.
PATHS = re.compile(
    r"student\.path|teacher\.(routes\..+\.)?path|data\.train|data\.augment\.noise\.files|"
    r"eval\.(test|retention)|train\.deepspeed|launch\.placement"
)


def load_config(recipe: str | Path, overrides: list[str] | tuple[str, ...] = (), teacher: bool = True) -> Config:
    """Read a YAML recipe and apply dotted overrides such as `optim.lr=1e-4`.

    What the recipe leaves open is filled in; paths that lead nowhere from here are looked for beside it. `teacher`:
    False where nothing asks it. Raises UserError that names the file and key, what was expected and what was found.
    """
    path, raw = Path(recipe), read_yaml(recipe, "recipe file")
    for item in overrides:
        override(raw, item)
    config = placed(validated(Config, _beside(path.parent, raw), recipe), teacher)
    config = config.changed({"run.stage": config.run.stage or config.objective.name})
    return config.changed({"run.dir": config.run.dir or _run_dir(path, config)})


def _beside(folder: Path, node: Any, key: str = "") -> Any:
    """What a YAML file held, with paths that lead nowhere from here but somewhere from that folder led there."""
    if isinstance(node, dict):
        return {name: _beside(folder, child, f"{key}.{name}".lstrip(".")) for name, child in node.items()}
    if not isinstance(node, str) or not PATHS.fullmatch(key):
        return node
    run, _ = saved.split(node)
    return node if os.path.exists(run) or not os.path.exists(folder / run) else str(folder / node)


def dump_config(config: Config) -> dict[str, Any]:
    """Plain dict of a config, in the spelling of a recipe."""
    return config.model_dump(by_alias=True)


# What may differ between a run and its resumption.
NOT_COMPARED = re.compile(
    r"run\.(dir|overwrite)|rollout\.(urls|transport|sleep)|teacher\.(routes\..*\.)?(urls|shard)|"
    r"(launch|metrics|eval\.warn)(\..+)?|train\.keep_checkpoints",
    re.DOTALL,
)


def compared(dumped: dict[str, Any]) -> dict[str, Any]:
    """What makes a run the run that it is: a dumped config as {dotted key: value}, without NOT_COMPARED."""
    return {k: v for k, v in _flat(dumped).items() if not NOT_COMPARED.fullmatch(k)}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def _run_dir(recipe: Path, config: Config) -> str:
    """A folder for this recipe under these settings: the same command finds it again, another one does not."""
    content = json.dumps(compared(dump_config(config)), sort_keys=True).encode()
    return f"runs/{recipe.resolve().parent.name}-{recipe.stem}-{hashlib.sha256(content).hexdigest()[:8]}"


def resolve_model(path: str, key: str) -> str:
    """A checkpoint folder as it is; RUN, RUN:best or RUN:40 become `model/` of that checkpoint; else a hub id.

    Raises UserError, naming the setting `key`, when a run folder holds no such checkpoint, a local-looking path does
    not exist, or the hub has no model of a name without owner.
    """
    run, which = saved.split(path)
    if (run / "checkpoints").is_dir():
        return str(saved.find(run, which, f"{key} {path}") / "model")
    p = Path(path)
    if (p / "config.json").is_file():
        return path
    if p.exists() or path.startswith((".", "/", "~", "runs/", "recipes/")) or path.count("/") > 1:
        expected = "expected a checkpoint folder with config.json or a run folder"
        raise UserError(f"{key} {path}: {expected}, found neither{looked(path)}")
    if "/" not in path and (why := refused(path)):
        expected = "a checkpoint folder, a run folder or a hub id such as owner/name"
        raise UserError(f"{key} {path}: expected {expected}; there is no such folder, and of the hub: {why}")
    return path


SECONDS = 5.0  # for an answer


@cache
def refused(name: str) -> str:
    """Why the hub has no model of this name for us, asked once and without retries; empty: it has, or its cache here.

    A model's id is owner/name; a few old ones, such as gpt2, have no owner, and a mistyped folder looks like them.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=SECONDS)
    except Exception as e:  # no such model, no such name, no network: it cannot be loaded in any case
        return first_line(e)
    return ""


def placed(config: Config, teacher: bool = True) -> Config:
    """The recipe with what it leaves to its placement: teacher.kind, rollout.transport and .sleep, launch.processes.

    teacher: False where nothing asks the recipe's teacher, which then needs no path.

    Raises UserError where the two contradict each other.
    """
    placement, t, r, processes = placement_of(config), config.teacher, config.rollout, config.launch.processes
    serves = bool(placement.teacher or t.urls) and config.objective.reads != "logits"
    routes = {k: one.changed({"kind": one.kind or ("server" if one.urls else "local")}) for k, one in t.routes.items()}
    config = config.changed({"teacher.kind": t.kind or ("server" if serves else "local"), "teacher.routes": routes})
    _check_teachers(config, asks_teacher(config) if teacher else "")
    sleep = placement.shared if r.sleep is None else r.sleep
    config = config.changed({"rollout.transport": r.transport or placement.transport, "rollout.sleep": sleep})
    _check_devices(config, placement)
    if processes not in (None, placement.ranks):
        raise UserError(f"launch.processes {processes}: {config.launch.placement} has {placement.ranks} learner ranks")
    if config.train.prompts_per_step < placement.ranks:
        least = f"at least launch.processes ({placement.ranks}): every learner process needs a prompt"
        raise UserError(f"train.prompts_per_step ({config.train.prompts_per_step}) must be {least}")
    return config.changed({"launch.processes": placement.ranks})


def _check_teachers(config: Config, asked: str) -> None:
    """Refuse teachers that cannot be what their kind says. `asked`: what asks them, in words; empty: nothing."""
    t, o, name = config.teacher, config.objective, config.launch.placement
    for key, one in t.each.items():
        where = f"teacher.routes.{key}" if key else "teacher"
        kind, about = one.kind, one.about
        if key and about.servers == "all" and not one.urls:
            raise UserError(f"{where}: a route's servers are running ones: expected urls, found none")
        if key and o.reads == "logits" and not about.gives_logits:
            raise UserError(f"{where}: objective.name {o.name} reads full-vocabulary logits, which no {kind} gives")
        if about.has_path and not one.path and asked:
            raise UserError(f"{where}.path is required: the checkpoint folder or hub id of the text LLM; {asked}")
        if about.weights == "student" and one.path not in ("", config.student.path):
            raise UserError(f"{where}: kind {kind} is the student itself, found path {one.path}; set {where}.path=")
        if one.urls and not about.has_path:
            raise UserError(f"{where}: kind {kind} asks no server of its own, found urls; set {where}.urls=[]")
        if one.routes and not about.routes or about.routes and key:
            raise UserError(f"{where}.routes: expected with teacher.kind routed alone, found kind {kind}")
        if one.shard and not about.weights and o.reference == 0:
            raise UserError(f"{where}.shard: true is for a local teacher, found kind {kind}; set teacher.kind=local")
    if t.about.routes and (not t.routes or t.path or t.urls or (t.shard and o.reference == 0)):
        raise UserError(f"teacher.kind {t.kind}: expected teacher.routes, and path, urls and shard in each of them")
    if o.about.other_tokenizer and t.about.weights != "own":
        raise UserError(f"objective.name {o.name} is for one local teacher, found teacher.kind {t.kind}")
    if t.about.servers == "all" and asked and not t.urls and not placement_of(config).teacher:
        raise UserError(f"teacher.kind {t.kind}: {name} has no teacher servers; set teacher.kind=local or teacher.urls")


def _check_devices(config: Config, placement: Placement) -> None:
    """Refuse what the servers' or learner's devices cannot do. Servers named by URL may be anywhere."""
    named = bool(config.rollout.urls)
    where = config.launch.placement or "without launch.placement everything is on the CPU"
    if config.rollout.sleep and not named and not devices_of(placement.rollout):
        raise UserError(f"rollout.sleep true: {where}: vLLM has no sleep mode on a CPU; set rollout.sleep=false")
    if config.rollout.transport != placement.transport and (config.launch.placement or not named):
        chosen = placement.model_dump(exclude_unset=True) | {"transport": config.rollout.transport}
        validated(Placement, chosen, f"rollout.transport {config.rollout.transport}: {where}")


def unread(config: Config) -> list[str]:
    """Settings that are not at their defaults and that nothing in this recipe reads: which, and by what, in words.

    They are allowed: a study's rows share overrides.
    """
    o, t, r, idle = config.objective, config.teacher, config.rollout, config.objective.idle()
    found = [f"objective.{k} is not read by {idle[k]}" for k in _changed(o) if k in idle]
    if not t.about.routes and "field" in _changed(t):
        found.append(f"teacher.field is not read by teacher.kind {t.kind}")
    if r.source != "mix" and "student_share" in _changed(r):
        found.append(f"rollout.student_share is not read by rollout.source {r.source}")
    return found


def _changed(section: Section) -> list[str]:
    return [k for k, f in type(section).model_fields.items() if getattr(section, k) != f.default]


# What a run makes once its config.yaml is there.
MADE = ("metrics.jsonl", "samples.jsonl", "eval.jsonl", "bad_records.jsonl", "launches.jsonl", "checkpoints")


class Taken(UserError):
    """The run folder holds something else: not even a status may be written there."""


def state_of_run(config: Config) -> str:
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
    if differing := [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]:
        shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in differing[:6])
        found = f"run.dir {folder}: holds a run of another configuration: {shown}"
        raise Taken(f"{found}; choose another run.dir, or set run.overwrite=true to delete that run")
    if saved.status_of(folder).get("phase") == "finished":
        return "finished"
    return "resume" if saved.checkpoints(folder) else "new"


def prepare_run(config: Config) -> None:
    """Make the folder ready for `state_of_run`'s verdict; a new run writes its resolved config first."""
    folder = Path(config.run.dir)
    if state_of_run(config) == "new":
        for name in ("status.json", *MADE):
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(parents=True)
        made_by = {"versions": saved.package_versions(), "git_commit": saved.git_commit()}
        content = yaml.safe_dump({"config": dump_config(config), **made_by}, sort_keys=False)
        write_atomic(folder / "config.yaml", content)
