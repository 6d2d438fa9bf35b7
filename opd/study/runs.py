"""The runs of a study: their commands, their folders, what they measured. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from opd.config.load import Taken, load_config, state_of_run
from opd.config.schema import Config
from opd.report.runs import Run as Folder
from opd.report.runs import read_run
from opd.settings import UserError
from opd.storage.run_folder import checkpoints
from opd.study.spec import BASE, LATER, Row, as_arguments

SEED = "{seed}"
Phase = Literal["select", "report"]
# conflict: the folder holds something else, or a damaged run: only the user may delete it
State = Literal["missing", "partial", "failed", "conflict", "finished"]


@dataclass(frozen=True)
class Run:
    """One launch: a row at one learning rate and seed. `start` is the run whose student it goes on with."""

    out: Path  # the study's folder
    row: Row
    phase: Phase
    seed: int
    rate: float | None  # none: the untrained student, which is measured and not trained
    split: dict[str, Any] = field(compare=False)
    start: Run | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Its folder below the study's."""
        rate = [] if self.rate is None else [f"lr_{self.rate:g}"]
        return "/".join([self.row.id, self.phase, *rate, f"seed_{self.seed}"])

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """Where the launcher's output goes, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def overrides(self) -> list[str]:
        """Of the recipe, for the command line; `{world}` and `{seed}` in those of the study's file are this run's."""
        own: dict[str, Any] = {"run.dir": str(self.folder), "train.keep_checkpoints": 1}
        # a later stage goes on with other prompts: the same seed would begin with those of the stage before
        own["run.seed"] = self.seed + LATER * (len(self.lineage) - 1)
        if self.rate is None:  # a run has at least one step: nothing is measured after it
            own |= {"run.stage": BASE, "train.steps": 1, "eval.start": BASE, "eval.end": False}
        else:
            own |= {"optim.lr": self.rate, "eval.start": None, "eval.end": True, "eval.patience": None}
        if self.start is not None:
            own["student.path"] = str(self.start.folder)
        given = self.row.overrides | self.split
        for key, value in given.items():
            if isinstance(value, str):
                given[key] = value.replace("{world}", self.row.world).replace(SEED, str(self.seed))
        return as_arguments(given | own)

    @property
    def lineage(self) -> list[Run]:
        """Itself and the runs before it, the first one first."""
        return [*(self.start.lineage if self.start else []), self]


@dataclass
class Outcome:
    """What there is of a run."""

    state: State
    error: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)  # the final one; of the untrained student, its only one
    interim: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    samples: int = 0  # responses learnt from
    seconds: float = 0.0  # of training steps: no start, no evaluation
    wall: float = 0.0  # of all launches

    @property
    def finished(self) -> bool:
        """Whether its numbers may be used."""
        return self.state == "finished"


def config_of(run: Run) -> Config:
    """The run's recipe with its overrides. Raises UserError that names the row."""
    try:
        return load_config(run.row.recipe, run.overrides)
    except UserError as e:
        raise UserError(f"row {run.row.id}: {e}") from e


def outcome(run: Run) -> Outcome:
    """What the run's folder holds. Raises UserError for a recipe that is wrong or a file that cannot be read."""
    config = config_of(run)
    try:
        verdict = state_of_run(config)
    except Taken as e:
        # a study owns run.dir and run.overwrite: another way out than for a single run
        reason, other, _ = str(e).partition("; choose another run.dir")
        return Outcome("conflict", f"{reason}; move that folder away" if other else reason)
    if verdict == "finished":
        return _measured(run, config, read_run(run.folder))
    if not (run.folder / "config.yaml").is_file():
        return Outcome("missing")
    there = read_run(run.folder)
    if there.status.get("phase") == "failed":
        return Outcome("failed", there.state)
    return Outcome("partial" if checkpoints(run.folder) else "missing", there.state)


def _measured(run: Run, config: Config, found: Folder) -> Outcome:
    stage, step = (BASE, 0) if run.rate is None else (config.run.stage, config.train.steps)
    final = next((e for e in found.evaluations if (e["stage"], e["step"]) == (stage, step)), None)
    if final is None:
        return _damaged(run, f"eval.jsonl: expected an evaluation {stage} at step {step}, found none")
    result = Outcome("finished", evaluation=final, interim=found.interim)
    result.wall = sum(line["seconds"] for line in found.launches)
    if run.rate is not None:
        whole = [m["step"] for m in found.steps if None not in (m.get("samples_per_s"), m.get("time/step"))]
        if whole != list(range(1, step + 1)):
            return _damaged(run, f"metrics.jsonl: expected samples and seconds of {step} steps, found {len(whole)}")
        result.steps, result.seconds = found.done, found.steps[-1]["seconds"]
        result.samples = sum(round(m["samples_per_s"] * m["time/step"]) for m in found.steps)
    return result


def _damaged(run: Run, what: str) -> Outcome:
    return Outcome("conflict", f"{run.folder}/{what}; move that folder away, it will be run again")
