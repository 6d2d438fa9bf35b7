"""Run folders -> report.json and one self-contained report.html."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd.config import UserError

VIEWS = ("speech", "text")


@dataclass
class Run:
    """What a run folder holds, parsed."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, str]
    commit: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Write `out`/report.json and `out`/report.html of one or more runs; returns their paths.

    Runs whose student is another given run are stages of one pipeline and follow it; others stand side by side.
    Raises UserError naming the folder and file that cannot be read.
    """
    from opd.report_page import page

    read = _chained([read_run(r) for r in runs])
    if not any(r.evaluations for r in read):
        raise UserError(f"{runs[0]}: no evaluation yet (eval.jsonl is missing or empty); nothing to report")
    report = summarise(read)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("report.json", json.dumps(report, indent=2)), ("report.html", page(read, report))):
        aside = out / f".{name}.writing"
        aside.write_text(text)
        aside.replace(out / name)
        written.append(out / name)
    return written


def read_run(folder: Path) -> Run:
    """Parse a run folder. UserError when it is none, or a line in it is not JSON."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml)")
    try:
        about = yaml.safe_load((folder / "config.yaml").read_text())
        config, versions, commit = about["config"], about["versions"], about["git_commit"]
    except (yaml.YAMLError, KeyError, TypeError) as e:
        raise UserError(f"{folder}/config.yaml: not a run's config") from e
    evaluations = {e["stage"]: e for e in _lines(folder / "eval.jsonl")}  # the last of each name counts
    steps, samples = _lines(folder / "metrics.jsonl"), _lines(folder / "samples.jsonl")
    return Run(folder, config, versions, commit, steps, list(evaluations.values()), samples)


def summarise(runs: list[Run]) -> dict[str, Any]:
    """The content of report.json."""
    newest = next(e for r in reversed(runs) for e in reversed(r.evaluations))
    seconds = [_seconds(r) + sum(e["eval_seconds"] for e in r.evaluations) for r in runs]
    return {
        "package_versions": runs[-1].versions,
        "git_commit": runs[-1].commit,
        "learner": newest["learner"],
        "rollout": newest["rollout"],
        "stages": [_stage(r, e) for r in runs for e in r.evaluations],
        "wall_s": round(sum(seconds), 1),
    }


def phases(run: Run) -> dict[str, float]:
    """Mean seconds of a step by phase, the first step left out when there are more (it warms everything up)."""
    counted = run.steps[1:] or run.steps
    names = ("rollout", "teacher", "learner", "sync", "rest")
    return {n: sum(m.get(f"time/{n}", 0.0) for m in counted) / max(1, len(counted)) for n in names}


def _stage(run: Run, e: dict[str, Any]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        return e[name]["mean"] if name in e else None

    def stderr(name: str) -> float | None:
        return e[name]["stderr"] if name in e else None

    singles, by_view = ("misalignment", "forgetting"), ("drop", "reverse_kl")
    return {
        "name": e["stage"],
        "run": run.name,
        "accuracy": {v: e.get(f"accuracy/{v}") for v in (*VIEWS, "teacher")},
        "retention": e.get("retention"),
        **{n: mean(n) for n in singles},
        **{n: {v: mean(f"{n}/{v}") for v in VIEWS} for n in by_view},
        "stderr": {n: stderr(n) for n in singles} | {n: {v: stderr(f"{n}/{v}") for v in VIEWS} for n in by_view},
        "groups": e.get("groups"),
        "steps": e["step"],
        "seconds": round(e["train_seconds"], 2),
    }


def _seconds(run: Run) -> float:
    return run.steps[-1]["seconds"] if run.steps else 0.0


def _chained(runs: list[Run]) -> list[Run]:
    """Parents before the runs that start from them, otherwise as given."""
    ordered: list[Run] = []
    waiting = list(runs)
    while waiting:
        ready = next((r for r in waiting if not any(p is not r and _starts_from(r, p) for p in waiting)), waiting[0])
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _starts_from(run: Run, parent: Run) -> bool:
    return Path(run.config["student"]["path"]).resolve().is_relative_to(parent.folder.resolve())


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    whole = path.read_text().split("\n")[:-1]  # a line without its newline is still being written
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not JSON: {e.msg}") from e
    return found
