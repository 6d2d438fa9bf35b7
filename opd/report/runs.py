"""Run folders as records: what happened in each, strictly read, with what is broken named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, create_model, model_validator

from opd.settings import UserError
from opd.storage.json_lines import Line, conform, read_lines
from opd.storage.metrics import EVAL_METRICS, STEP_METRICS
from opd.storage.run_folder import split

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
    def _joined(self) -> _Sample:
        if self.advantage and len(self.advantage) != len(self.tokens):
            raise ValueError(f"expected an advantage per token, {len(self.tokens)}, found {len(self.advantage)}")
        return self


_Student = create_model("_Student", __base__=_Loose, path=str)
_Settings = create_model("_Settings", __base__=_Loose, student=_Student)
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
