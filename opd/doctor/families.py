"""`opd families`: which there are, and with `--check` the proof, on small random checkpoints, that each works here.

For each family: a real vLLM server and two real ZeRO-3 learner ranks (opd/doctor/family_worker.py), a fresh server on a
checkpoint of ours, and two steps of X-OPD through `opd launch`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from opd.config.load import load_config
from opd.models.registry import FAMILIES, Entry
from opd.processes.commands import Command, learner, student_server
from opd.processes.guard import run, serving
from opd.processes.layout import Place, layout
from opd.processes.worker import arguments, worker
from opd.settings import UserError
from opd.storage.json_lines import read_lines

AGREE = 1e-4  # nats, float32
LIMIT_S = 900.0  # for a process of the check
DIFFER = 0.1  # nats: what a push that was left out must cost
TOLERANCES = {"parity": AGREE, "zero3": AGREE, "LoRA checkpoint": AGREE, "checkpoint": AGREE, "X-OPD": AGREE}
PUSHES: dict[str, list[str]] = {"llm": ["llm"], "llm+adapter": ["llm", "adapter"], "all": ["llm", "adapter", "tower"]}
LORA = ["student.train=[llm]", "student.lora={r: 8, alpha: 64, targets: [q_proj, v_proj]}"]  # parts of a fused layer
RECIPE: dict[str, Any] = {
    "rollout": {"max_tokens": 12, "n": 2, "server": {"max_model_len": 2048}},
    "train": {"steps": 2, "prompts_per_step": 2, "gradient_checkpointing": True},
    "optim": {"lr": 1e-3},
}
SENTENCES = ("what is three plus four", "set a timer", "who wrote this", "for ten minutes")


def main(names: list[str], check: bool, keep: Path | None) -> int:
    """Print the table of families, or of some; with `check` prove them and print a line for each; 0 when all hold.

    keep: a folder for checkpoints, runs and logs. Raises UserError for a name that is not known.
    """
    if unknown := [n for n in names if n not in FAMILIES]:
        raise UserError(f"families: {', '.join(unknown)}: not known; known: {', '.join(FAMILIES)}")
    entries, code = [FAMILIES[n] for n in names or FAMILIES], 0
    if not check:
        for e in entries:
            print(f"{e.name:16} model_type {', '.join(e.model_types)}; text teacher such as {e.teacher} (unchecked)")
        return 0
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        for e in entries:
            began = time.monotonic()
            found = prove(e, Path(str(folder), e.name))
            faults = judge(found)
            code = 1 if faults else code
            print(f"{e.name:16} {'FAILS: ' + '; '.join(faults) if faults else 'holds'}  {describe(found)}", end="  ")
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    return code


def prove(family: Entry, folder: Path) -> dict[str, Any]:
    """Everything that is measured of one family; an "error" where a part of it did not run."""
    from opd.models.tiny import build

    folder.mkdir(parents=True, exist_ok=True)
    build(family.name, folder)
    recipe = write_recipe(folder, family.clips)
    found: dict[str, Any] = {}
    try:
        with server(recipe, folder / "student") as url:
            found |= on_ranks(recipe, folder, url)
        with server(recipe, folder / "trained") as url:
            found |= afresh(recipe, folder, url)
        found["X-OPD"] = launch(recipe, folder)
    except ChildProcessError as e:
        found["error"] = str(e)
    return found


def judge(found: dict[str, Any]) -> list[str]:
    """What does not hold, or was not measured, in words."""
    faults = [found["error"]] if "error" in found else []
    for name, limit in TOLERANCES.items():
        if name in found and not found[name] <= limit:
            faults.append(f"{name}: {found[name]:.1e}, at most {limit:g} expected")
    for name, (stale, fresh) in found.get("push", {}).items():
        if not fresh <= AGREE:
            faults.append(f"push of {name}: {fresh:.1e} afterwards, at most {AGREE:g} expected")
        if not stale > DIFFER:
            faults.append(f"push of {name}: only {stale:.1e} when it is left out, more than {DIFFER:g} expected")
    if "mixed" in found and not math.isfinite(found["mixed"]):
        faults.append(f"ranks of speech only and text only: a loss of {found['mixed']}")
    missing = [n for n in (*TOLERANCES, "mixed") if n not in found]
    missing += [f"push of {n}" for n in (*PUSHES, "LoRA") if n not in found.get("push", {})]
    if missing and "error" not in found:
        faults.append(f"not measured: {', '.join(missing)}")
    return faults


def describe(found: dict[str, Any]) -> str:
    """The numbers in one line."""
    parts = [f"{n} {found[n]:.0e}" for n in TOLERANCES if n in found]
    parts += [f"push of {n} {stale:.1f} -> {fresh:.0e}" for n, (stale, fresh) in found.get("push", {}).items()]
    return ", ".join(parts)


def write_recipe(folder: Path, clips: int) -> Path:
    """A recipe and a manifest: prompts with one clip and with `clips`, with text beside it, in one turn and two."""
    import soundfile
    import yaml

    rng = np.random.default_rng(0)
    (folder / "clips").mkdir(exist_ok=True)
    parts = []
    for i, (text, seconds) in enumerate(zip(SENTENCES, (2.01, 0.9, 1.5, 3.3), strict=True)):
        t = np.arange(int(16000 * seconds)) / 16000
        tone = np.sin(2 * np.pi * (200 + 90 * i) * t * (1 + 0.2 * t)) * 0.3 + rng.normal(0, 0.02, len(t))
        soundfile.write(folder / f"clips/{i}.wav", tone, 16000, subtype="FLOAT")
        parts.append({"type": "audio", "path": f"clips/{i}.wav", "transcript": text})
    more: dict[str, Any] = {"type": "text", "text": " answer."}
    reply = {"role": "assistant", "content": "ten"}
    a, b, c, d = parts
    asked: list[list[Any]] = [[[a]], [[b, more]], [[c, d, more]], [[d], [a]], ["who?", [b]]]  # the user's turns
    asked.append([(parts * clips)[:clips]])
    lines = []
    for turns in asked:
        chat = [m for content in turns for m in ({"role": "user", "content": content}, reply)][:-1]
        if sum(part["type"] == "audio" for m in chat for part in m["content"] if isinstance(part, dict)) <= clips:
            lines.append(json.dumps({"messages": chat}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines))
    recipe = {
        **RECIPE,
        "student": {"path": f"{folder}/student", "dtype": "float32"},
        "teacher": {"path": f"{folder}/teacher", "kind": "local", "dtype": "float32"},
        "data": {"train": f"{folder}/prompts.jsonl", "check": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def server(recipe: Path, model: Path) -> AbstractContextManager[str]:
    """URL of a vLLM server that holds `model`, stopped at the end."""
    config = load_config(recipe, [f"student.path={model}"])
    command = student_server(config, Place.here("student"))
    return serving(command, model.with_name(f"{model.name}-server.log"), config.launch.health_timeout_s)


def on_ranks(recipe: Path, folder: Path, url: str) -> dict[str, Any]:
    """Findings of two learner ranks on the student. They leave a checkpoint, `trained`."""
    overrides = [f"run.dir={folder}/worker", f'rollout.urls=["{url}"]', "student.train=[llm, adapter, tower]"]
    config = load_config(recipe, [*overrides, "launch.processes=2"])
    command = learner(config, str(recipe), overrides, layout(config), 0)
    assert command is not None
    found = folder / "ranks.json"
    given = {"recipe": str(recipe), "overrides": overrides, "out": f"{folder}/trained", "found": str(found)}
    argv = command.argv[: command.argv.index("opd.train")]
    argv += arguments("opd.doctor.family_worker:ranks", folder, given)
    run(Command("ranks", argv, command.env), folder / "ranks.log", LIMIT_S)
    return json.loads(found.read_text())


def afresh(recipe: Path, folder: Path, url: str) -> dict[str, Any]:
    """Findings of transformers on that checkpoint, which a fresh server holds."""
    overrides = [f"run.dir={folder}/worker", f'rollout.urls=["{url}"]', f"student.path={folder}/trained"]
    found = folder / "fresh.json"
    given = {"recipe": str(recipe), "overrides": overrides, "found": str(found)}
    run(worker("fresh", "opd.doctor.family_worker:fresh", folder, given), folder / "fresh.log", LIMIT_S)
    return json.loads(found.read_text())


def launch(recipe: Path, folder: Path) -> float:
    """Two steps of X-OPD; the greater of their mean |learner - sampler|."""
    argv = [sys.executable, "-m", "opd.cli", "launch", str(recipe), f"run.dir={folder}/run", "run.overwrite=true"]
    run(Command("launch", [*argv, "--plain"], {}), folder / "launch.log", LIMIT_S)
    lines = list(read_lines(folder / "run/metrics.jsonl"))
    if len(lines) != RECIPE["train"]["steps"]:
        raise ChildProcessError(f"launch: expected {RECIPE['train']['steps']} steps, found {len(lines)}")
    return max(line["mismatch/logprob"] for line in lines)
