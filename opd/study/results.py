"""study.json: what the run folders say, row by row. Rewritten from them at any time. Imports no torch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import fmean, mode
from typing import Any

from pandas import DataFrame, Series
from scipy.special import stdtrit

from opd.scoring.statistics import LEVEL
from opd.settings import UserError
from opd.storage.json_lines import write_atomic
from opd.storage.metrics import EVAL_METRICS
from opd.study.grid import Study
from opd.study.runs import Outcome, Run
from opd.study.spec import BASE, Row

ALL = "all records"
GROUPED = ("speech", "text", "misalignment")  # what an evaluation has by group: accuracy by view, misalignment
OF_TEACHER = ("accuracy/teacher", "drop/", "forgetting", "reverse_kl/")  # measured against the row's own teacher
Interval = dict[str, Any]  # mean, half (of the interval's width, None for one value), n
Measured = dict[str, DataFrame]  # of ALL, a metric a column; of each of GROUPED, a group a column; a line a seed


def write(study: Study) -> None:
    """Write study.json, study.md and study.html. Raises UserError where that is not possible.

    Those that are there and hold a complete row which is not complete any more are moved aside first.
    """
    from opd.study.tables import pages  # it draws

    content = summarise(study)
    texts = {"study.json": json.dumps(content, indent=2), **pages(content)}
    try:
        study.out.mkdir(parents=True, exist_ok=True)
        if lost := [row for row in _complete(study.out) if row not in _complete_rows(content)]:
            kept = f"kept the earlier tables as {_move_aside(study.out, list(texts))}"
            print(f"{kept}: complete there, not any more: {', '.join(lost)}", flush=True)
        for name, text in texts.items():
            write_atomic(study.out / name, text)
            print(f"wrote {study.out / name}", flush=True)
    except OSError as e:
        raise UserError(f"{study.out}: cannot write the study there ({e.strerror})") from e


def _complete_rows(content: dict[str, Any]) -> list[str]:
    return [f"{w['name']}/{r['name']}" for w in content["worlds"] for r in w["rows"] if r["complete"]]


def _complete(out: Path) -> list[str]:
    """The complete rows of the tables that are there; none where there are none, or none that can be read."""
    try:
        return _complete_rows(json.loads((out / "study.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def _move_aside(out: Path, names: list[str]) -> str:
    """Rename the files to study.before.N.*, N the first that is free; returns that pattern's path."""
    number = next(n for n in itertools.count(1) if not any(out.glob(f"study.before.{n}.*")))
    for path in (out / name for name in names):
        if path.is_file():
            path.rename(path.with_name(f"study.before.{number}{path.suffix}"))
    return str(out / f"study.before.{number}.*")


def summarise(study: Study) -> dict[str, Any]:
    """The content of study.json. A row that is not `complete` has no aggregates: what is missing is in its `state`."""
    spec = study.spec
    worlds = []
    for world in spec.worlds:
        measured: dict[str, Measured] = {}
        rows = [_row(study, r, measured) for r in study.rows.values() if r.world == world]
        usual = mode([r["samples"] for r in rows if r["samples"]] or [None])
        for r in rows:
            r["matched"] = r["samples"] == usual if r["samples"] else None
            for other in (BASE, spec.reference) if r["name"] != BASE else ():
                if other and other != r["name"] and all(x["complete"] for x in rows if x["name"] in (r["name"], other)):
                    r["differences"][other] = _differences(r, measured[r["name"]], measured[other])
        worlds.append({"name": world, "samples": usual, "rows": rows})
    return {
        "study": str(study.path),
        "level": LEVEL,
        "seeds": spec.report.seeds,
        "reference": spec.reference,
        "settings": spec.model_dump(by_alias=True, mode="json"),
        "worlds": worlds,
        "runs": [_run(study, run) for row in study.rows.values() for run in study.named(row)],
    }


def _row(study: Study, row: Row, measured: dict[str, Measured]) -> dict[str, Any]:
    """A row of its world; what its finished runs measured joins `measured`, where that of base is already."""
    reported = study.reported(row)
    done = [r for r in reported if _outcome(study, r).finished]
    choice = study.choice(row) if row.rates else None
    notes = choice.notes if choice else []
    means, errors = (_measured(study, done, what) for what in ("mean", "stderr"))
    if study.teachers[row.id] != study.teachers[study.base(row).id]:
        means[ALL] = _regraded(means[ALL], measured[BASE][ALL])
        errors[ALL] = errors[ALL].drop(columns=["drop/speech", "drop/text"], errors="ignore")
        notes = [*notes, "its teacher is not base's: drops are below base's teacher, F and reverse KL are left out"]
    measured[row.name] = means
    complete = len(done) == len(study.spec.report.seeds)
    aggregates = {of: _aggregates(means[of], errors[of]) for of in means} if complete else {ALL: {}}
    lineages = [[study.outcome(part) for part in r.lineage] for r in done]
    seconds = Series([sum(o.seconds for o in outcomes) for outcomes in lineages], dtype=float)
    by_seed = {of: {seed: _known(line) for seed, line in means[of].iterrows()} for of in means}
    return {
        "name": row.name,
        "start": row.start,
        "complete": complete,
        "state": "complete" if complete else _missing(study, row, reported, done),
        "rate": choice.rate if choice else None,
        "sweep": choice.sweep if choice else [],
        "notes": notes,
        "metrics": aggregates.pop(ALL),
        "groups": aggregates,
        "samples": fmean(sum(o.samples for o in outcomes) for outcomes in lineages) if complete else None,
        "seconds": interval(seconds) if complete else None,
        "by_seed": by_seed[ALL],
        "groups_by_seed": {r.seed: {of: by_seed[of][r.seed] for of in GROUPED} for r in done},
        "differences": {},
        "curve": _curve(study, done) if complete else [],
    }


def _missing(study: Study, row: Row, reported: list[Run], done: list[Run]) -> str:
    seeds = len(study.spec.report.seeds)
    if not reported and row.start and study.choice(study.start(row)) is None:
        return f"waits for the learning rate of {row.start}, which it starts from"
    if not reported:
        swept = [r for some in study.sweep(row).values() for r in some]
        finished = sum(study.outcome(r).finished for r in swept)
        all_ = study.count(row) - seeds
        return f"learning rate not chosen: {finished} of {all_} runs of its selection finished" + _bad(study, swept)
    return f"{len(done)} of {seeds} seeds finished" + _bad(study, reported)


def _outcome(study: Study, run: Run) -> Outcome:
    """That of the first of a run and those before it which is not finished; its own where all are."""
    return next((o for o in map(study.outcome, run.lineage) if not o.finished), study.outcome(run))


def _bad(study: Study, some: list[Run]) -> str:
    """How many failed or cannot be used, and why the first of those cannot."""
    outcomes = [_outcome(study, r) for r in some]
    failed = sum(o.state == "failed" for o in outcomes)
    unusable = [o.error for o in outcomes if o.state == "conflict"]
    told = f", {failed} failed" if failed else ""
    return told + (f", {len(unusable)} cannot be used ({unusable[0]})" if unusable else "")


def _run(study: Study, run: Run) -> dict[str, Any]:
    found = {k: v for k, v in vars(study.outcome(run)).items() if k != "interim"}
    found["evaluation"] = {k: v for k, v in found["evaluation"].items() if k in (*EVAL_METRICS, "groups")}
    about = {"name": run.name, "row": run.row.id, "phase": run.phase, "rate": run.rate, "seed": run.seed}
    return about | {"recipe": run.row.recipe, "overrides": run.overrides} | found


def interval(values: Series) -> Interval:
    """Mean of n >= 1 values and half the width of its 95% confidence interval, t_{0.975, n-1} * s / sqrt(n)."""
    n = len(values)
    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2) * values.sem()) if n > 1 else None
    return {"mean": float(values.mean()), "half": half, "n": n}


def paired(values: DataFrame, others: DataFrame) -> dict[str, Interval]:
    """By column, the interval of the difference values - others over the seeds that both have, where there is one."""
    found = {name: (values[name] - others[name]).dropna() for name in values if name in others}
    return {name: interval(difference) for name, difference in found.items() if len(difference)}


def _measured(study: Study, done: list[Run], what: str) -> Measured:
    """`what` of each estimate: its mean, or its standard error over records."""
    found: dict[str, list[dict[str, Any]]] = {of: [] for of in (ALL, *GROUPED)}
    for run in done:
        evaluation = study.outcome(run).evaluation
        groups = (evaluation.get("groups") or {}) | {ALL: {name: evaluation.get(name) for name in EVAL_METRICS}}
        for of, lines in found.items():
            lines.append({name: (e or {}).get(what) for name, e in (groups.get(of) or {}).items()})
    columns, seeds = {ALL: EVAL_METRICS}, [r.seed for r in done]
    return {of: DataFrame(lines, seeds, columns.get(of), dtype=float) for of, lines in found.items()}


def _regraded(means: DataFrame, base: DataFrame) -> DataFrame:
    """Of a row with another teacher than base's: its drops are below base's, what else needs a teacher is left out."""
    found = means.drop(columns=[name for name in means if name.startswith(OF_TEACHER)])
    teacher = base["accuracy/teacher"].reindex(means.index).replace(0, float("nan"))
    for view in ("speech", "text"):
        found[f"drop/{view}"] = 100 * (1 - found[f"accuracy/{view}"] / teacher)
    return found


def _aggregates(means: DataFrame, errors: DataFrame) -> dict[str, Any]:
    """By name of what all seeds measured: the interval over seeds, and the mean standard error over records, which all
    rows share."""
    over_records = _known(errors.mean())
    whole = means.dropna(axis="columns")
    return {name: {**interval(whole[name]), "stderr_records": over_records.get(name)} for name in whole}


def _known(numbers: Series) -> dict[str, float]:
    return numbers.dropna().to_dict()


def _differences(row: dict[str, Any], ours: Measured, theirs: Measured) -> dict[str, Any]:
    """Paired by seed: by metric, and under `groups` by what is grouped and group."""
    groups = {of: paired(ours[of][[*row["groups"][of]]], theirs[of]) for of in GROUPED}
    return {**paired(ours[ALL][[*row["metrics"]]], theirs[ALL]), "groups": groups}


def _curve(study: Study, done: list[Run]) -> list[dict[str, Any]]:
    """Points of the row's curve over its whole pipeline, means over seeds; steps and seconds count from its start.

    All of them, also those of whole evaluations, are of the records that interim evaluations are measured on.
    """
    points = []
    for run in done:
        steps, seconds = 0, 0.0
        for part in run.lineage:
            outcome = study.outcome(part)
            for e in [*outcome.interim, outcome.evaluation]:
                at = {"step": steps + e["step"], "seconds": seconds + e["train_seconds"]}
                points.append(at | {n: ((e.get("first") or e).get(n) or {}).get("mean") for n in EVAL_METRICS})
            steps, seconds = steps + outcome.steps, seconds + outcome.seconds
    by_step = DataFrame(points, dtype=float).groupby("step")
    of_all = by_step.mean().where(by_step.count() == len(done)).dropna(subset="seconds")
    return [{"step": int(step), **_known(line)} for step, line in of_all.iterrows()]
