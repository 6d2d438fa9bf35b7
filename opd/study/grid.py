"""Which runs a study needs, as far as is known: a row's rate is chosen before its reported runs have a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

from opd.config.load import resolve_model
from opd.config.schema import BETTER, Config, EvalConfig
from opd.settings import UserError
from opd.study import runs
from opd.study.runs import Outcome, Run
from opd.study.spec import BASE, Row, SelectionSpec, StudySpec, read_study, rows

HUB = "hub:"  # before the name of a manifest that is no file
HAIR = 1e-9  # of tolerance: 0.96 - 0.94 is more than 0.02 in binary
Means = dict[str, float]


@dataclass
class Choice:
    """A row's learning rate, and the whole sweep behind it."""

    rate: float
    sweep: list[dict[str, Any]] = field(default_factory=list)  # by rate: means over seeds, what the guard says
    notes: list[str] = field(default_factory=list)


class Study:
    """The rows of a study file and what their run folders hold; what was read is remembered until `forget`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec: StudySpec = read_study(path)
        self.out = Path(self.spec.out)
        self.rows = {r.id: r for r in rows(self.spec, path)}
        self.teachers: dict[str, list[str]] = {}  # by row
        self.students: dict[str, str] = {}  # the untrained one of each world
        # by row: on the validation split, on the test split; by seed where a seed is named in it
        self._configs: dict[str, tuple[list[Config], list[Config]]] = {}
        for row in self.rows.values():  # a mistake in a recipe shall come to light before the first run
            rate = row.rates[0] if row.rates else None
            start = Run(self.out, self.start(row), "report", 0, 1.0, {}) if row.start else None
            by_seed = []
            for split in (self.spec.selection, self.spec.report):
                seeds = split.seeds if runs.SEED in f"{row.overrides} {split.set}" else split.seeds[:1]
                own = [Run(self.out, row, "report", seed, rate, split.set, start) for seed in seeds]
                by_seed.append([runs.config_of(run) for run in own])
            self._configs[row.id] = (by_seed[0], by_seed[1])
            select, report = by_seed[0][0], by_seed[1][0]
            self._check_splits(row, select.eval, report.eval)
            each = {r: t.path if t.about.has_path else t.kind for r, t in report.teacher.each.items()}
            self.teachers[row.id] = sorted(f"{route} {name}".strip() for route, name in each.items())
            if not start and (found := report.student.path) != (expected := self.students.setdefault(row.world, found)):
                raise UserError(f"{path}: worlds.{row.world}: expected a student.path for all rows, found {expected} "
                                f"in that of base and {found} in that of {row.name}")  # fmt: skip
        self._outcomes: dict[Run, Outcome] = {}
        self._choices: dict[str, Choice | None] = {}

    def _check_splits(self, row: Row, select: EvalConfig, report: EvalConfig) -> None:
        """Raises UserError when the rates of a row would be chosen on reported records, or on none."""
        names = {self.spec.selection.metric, *self.spec.selection.guard}
        for key, needed in (("retention", "retention" in names), ("test", bool(names - {"retention"}))):
            chosen_on, told = getattr(select, key), getattr(report, key)
            if self.selects(row) and needed and (chosen_on is None or same(chosen_on, told)):
                found = chosen_on if chosen_on == told else f"{chosen_on}, which is the file {told}"
                expected = f"expected an eval.{key} that is not the reported runs'"
                raise UserError(f"{self.path}: selection.set: row {row.id} {expected}, found {found}")

    def check_files(self, wanted: list[Row]) -> None:
        """Raises UserError, naming row and key, when something that runs of these rows read is not there."""
        for row in wanted:
            select, report = self._configs[row.id]
            for config in [*(select if self.selects(row) else []), *report]:
                check_files(row.id, config, starts=row.start is not None)

    def outcome(self, run: Run) -> Outcome:
        """What the run's folder holds, read once."""
        if run not in self._outcomes:
            self._outcomes[run] = runs.outcome(run)
        return self._outcomes[run]

    def forget(self, run: Run) -> None:
        """Read the run's folder anew the next time."""
        self._outcomes.pop(run, None)
        self._choices.clear()

    def start(self, row: Row) -> Row:
        """The row that a row goes on from."""
        return self.rows[f"{row.world}/{row.start}"]

    def base(self, row: Row) -> Row:
        """The untrained student of a row's world."""
        return self.rows[f"{row.world}/{BASE}"]

    def chosen_rows(self, patterns: list[str]) -> list[Row]:
        """Rows that match WORLD/ROW patterns, or all, and what they need, in order. UserError: one has no match."""
        wanted: set[str] = set()
        for pattern in patterns or ["*"]:
            found = [r for r in self.rows.values() if fnmatch(r.id, pattern)]
            if not found:
                raise UserError(f"--only {pattern}: no such row; there are {', '.join(self.rows)}")
            for row in found:
                wanted.add(self.base(row).id)
                while row.start:
                    wanted.add(row.id)
                    row = self.start(row)
                wanted.add(row.id)
        return [r for name, r in self.rows.items() if name in wanted]

    def selects(self, row: Row) -> bool:
        """Whether the row has runs on the validation split: to choose its own rate, or for those that go on from it."""
        if row.name == BASE:
            return any(self.selects(r) for r in self.rows.values() if r.world == row.world and r.name != BASE)
        after = [r for r in self.rows.values() if (r.world, r.start) == (row.world, row.name)]
        return len(row.rates) > 1 or any(self.selects(r) for r in after)

    def count(self, row: Row) -> int:
        """Runs of the row in all, also of those that have no name yet."""
        select = len(self.spec.selection.seeds) * max(1, len(row.rates)) if self.selects(row) else 0
        return select + len(self.spec.report.seeds)

    def run(self, row: Row, phase: runs.Phase, rate: float | None, seed: int) -> Run | None:
        """A run on the validation or the test split; None while the rate of the row that it starts from is open."""
        start = self.run_at_choice(self.start(row), phase, seed) if row.start else None
        if row.start and start is None:
            return None
        split = self.spec.selection if phase == "select" else self.spec.report
        return Run(self.out, row, phase, seed, rate, split.set, start)

    def run_at_choice(self, row: Row, phase: runs.Phase, seed: int) -> Run | None:
        """The run at the chosen rate; None while that is open. The untrained student has none to choose."""
        if row.name == BASE:
            return self.run(row, phase, None, seed)
        choice = self.choice(row)
        return self.run(row, phase, choice.rate, seed) if choice else None

    def sweep(self, row: Row) -> dict[float | None, list[Run]]:
        """The runs on the validation split that can be named, by rate; without any where the row needs none."""
        if not self.selects(row):
            return {}
        tried: list[float | None] = list(row.rates) or [None]
        found = {rate: [self.run(row, "select", rate, s) for s in self.spec.selection.seeds] for rate in tried}
        return {rate: [r for r in some if r is not None] for rate, some in found.items()}

    def reported(self, row: Row) -> list[Run]:
        """The runs on the test split, once they can be named."""
        found = [self.run_at_choice(row, "report", seed) for seed in self.spec.report.seeds]
        return [r for r in found if r is not None]

    def named(self, row: Row) -> list[Run]:
        """All runs of the row that can be named by now."""
        return [*(r for some in self.sweep(row).values() for r in some), *self.reported(row)]

    def choice(self, row: Row) -> Choice | None:
        """The row's learning rate; None while runs of its sweep, or the untrained student's, are not done."""
        if row.id not in self._choices:
            self._choices[row.id] = self._choose(row)
        return self._choices[row.id]

    def _choose(self, row: Row) -> Choice | None:
        if len(row.rates) == 1:
            return Choice(row.rates[0])
        spec = self.spec.selection
        names = list(dict.fromkeys([spec.metric, *spec.guard]))
        base = [self.outcome(r) for r in self.sweep(self.base(row))[None]]
        if not all(o.finished for o in base):
            return None
        done, failed = {}, []
        for rate, some in self.sweep(row).items():
            assert rate is not None
            outcomes = [self.outcome(r) for r in some]
            if any(o.state == "failed" for o in outcomes):
                failed.append(rate)
            elif some and all(o.finished for o in outcomes):
                done[rate] = means([o.evaluation for o in outcomes], names, f"row {row.id}, rate {rate:g}")
            else:
                return None
        if not done:
            return None
        return choose(spec, means([o.evaluation for o in base], names, f"row {self.base(row).id}"), done, failed)

    def problem(self, run: Run) -> str | None:
        """Why the run cannot start now: what it starts from is not done. None when it can."""
        if run.start is None or self.outcome(run.start).finished:
            return None
        return f"starts from {run.start.name}, which is {self.outcome(run.start).state}"


def same(one: str | None, other: str | None) -> bool:
    """Whether two manifests are one, however their paths are spelt; names on a hub are compared as they are."""
    if one is None or other is None or one.startswith(HUB) or other.startswith(HUB):
        return one == other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def check_files(row: str, config: Config, starts: bool) -> None:
    """Raises UserError that names row and key when a manifest, or a local model's folder, of a run is not there.

    `starts`: its student is that of another row's run, which may be still to come. Reads no file, loads no model.
    """
    e = config.eval
    for key, path in (("data.train", config.data.train), ("eval.test", e.test), ("eval.retention", e.retention)):
        if path and not path.startswith(HUB) and not Path(path).is_file():
            raise UserError(f"row {row}: {key} {path}: no such manifest")
    models = [] if starts else [("student.path", config.student.path)]
    each = [(f"teacher.routes.{r}.path" if r else "teacher.path", t.path) for r, t in config.teacher.each.items()]
    models += [(key, path) for key, path in each if path]
    for key, path in models:
        try:
            resolve_model(path, key)
        except UserError as error:
            raise UserError(f"row {row}: {error}") from error


def means(evaluations: list[dict[str, Any]], names: list[str], where: str) -> Means:
    """Mean of each metric over evaluations. Raises UserError when one was not measured."""
    found = {}
    for name in names:
        values = [(e.get(name) or {}).get("mean") for e in evaluations]
        known = [v for v in values if v is not None]
        if not values or len(known) < len(values):
            raise UserError(f"{where}: selection needs {name}, which its evaluations lack; see selection.set")
        found[name] = fmean(known)
    return found


def choose(spec: SelectionSpec, base: Means, sweep: dict[float, Means], failed: list[float]) -> Choice:
    """The rate with the best metric among those whose guarded metrics stay close enough to `base`.

    Where none does, the one whose worst excess over what the guard allows is least. Ties go to the smaller rate.
    `sweep`: means over the selection seeds by rate, without the rates that `failed`.
    """
    assert sweep
    lines = []
    for rate in sorted(sweep):
        excess = [BETTER[g] * (base[g] - sweep[rate][g]) - allowed for g, allowed in spec.guard.items()]
        worst = max(excess, default=0.0)
        lines.append({"rate": rate, **sweep[rate], "excess": worst, "passes": worst <= HAIR})
    passing = [line for line in lines if line["passes"]]
    notes = []
    if passing:
        on, scores = spec.metric, [BETTER[spec.metric] * line[spec.metric] for line in passing]
    else:
        on, scores = "what they lose", [-line["excess"] for line in lines]
        allowed = ", ".join(f"{g} by {v:g}" for g, v in spec.guard.items())
        notes.append(f"no learning rate keeps what the guard asks ({allowed}): the one that loses least")
    equally = [line for line, score in zip(passing or lines, scores, strict=True) if score >= max(scores) - HAIR]
    best = equally[0]
    if len(equally) > 1:
        equal = ", ".join(f"{line['rate']:g}" for line in equally)
        notes.append(f"the rates {equal} tie on {on}: the smallest of them is taken")
    rates = sorted([*sweep, *failed])
    if passing and len(rates) > 1 and best["rate"] in (rates[0], rates[-1]):
        notes.append(f"the chosen rate is the {'smallest' if best['rate'] == rates[0] else 'largest'} that was tried")
    if failed:
        notes.append(f"chosen without {', '.join(f'{r:g}' for r in sorted(failed))}, where a run failed")
    return Choice(best["rate"], lines, notes)
