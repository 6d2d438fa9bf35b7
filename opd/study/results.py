"""study.json: what the run folders say, row by row. Rewritten from them at any time. Imports no torch."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from opd.settings import UserError
from opd.storage.json_lines import write_atomic
from opd.storage.metrics import EVAL_METRICS
from opd.study.grid import Study
from opd.study.runs import Outcome, Run
from opd.study.spec import BASE, Row
from opd.study.stats import LEVEL, interval, paired

GROUPED = ("speech", "text", "misalignment")  # what an evaluation has by group: accuracy by view, misalignment
OF_TEACHER = ("accuracy/teacher", "drop/", "forgetting", "reverse_kl/")  # measured against the row's own teacher


def write(study: Study, say: Callable[[str], None]) -> None:
    """Write study.json, study.md and study.html. Raises UserError where that is not possible.

    Those that are there and hold a complete row which is not complete any more are moved aside first.
    """
    from opd.study.tables import pages  # it draws

    content = summarise(study)
    texts = {"study.json": json.dumps(content, indent=2), **pages(content)}
    try:
        study.out.mkdir(parents=True, exist_ok=True)
        lost = [row for row in _complete(study.out) if row not in _complete_rows(content)]
        if lost:
            say(f"kept the earlier tables as {_move_aside(study.out, list(texts))}: complete there, not any more: "
                f"{', '.join(lost)}")  # fmt: skip
        for name, text in texts.items():
            write_atomic(study.out / name, text)
            say(f"wrote {study.out / name}")
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


# ---- study.json -------------------------------------------------------------------------------------------------


def summarise(study: Study) -> dict[str, Any]:
    """The content of study.json. A row that is not `complete` has no aggregates: what is missing is in its `state`."""
    spec = study.spec
    worlds = []
    for world in spec.worlds:
        rows = [_row(study, r) for r in study.rows.values() if r.world == world]
        usual = _usual([r["samples"] for r in rows if r["samples"]])
        by_name = {r["name"]: r for r in rows}
        for r in rows:
            if study.teachers[f"{world}/{r['name']}"] != study.teachers[f"{world}/{BASE}"]:
                _regrade(r, by_name[BASE])
        for r in rows:
            r["matched"] = r["samples"] == usual if r["samples"] else None
            for other in (BASE, spec.reference) if r["name"] != BASE else ():
                if other and other != r["name"] and r["complete"] and by_name[other]["complete"]:
                    r["differences"][other] = _differences(r, by_name[other])
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


def _row(study: Study, row: Row) -> dict[str, Any]:
    reported = study.reported(row)
    done = [r for r in reported if _outcome(study, r).finished]
    choice = study.choice(row) if row.rates else None
    complete = len(done) == len(study.spec.report.seeds)
    totals = [_totals(study, r) for r in done]
    return {
        "name": row.name,
        "start": row.start,
        "complete": complete,
        "state": "complete" if complete else _missing(study, row, reported, done),
        "rate": choice.rate if choice else None,
        "sweep": choice.sweep if choice else [],
        "notes": choice.notes if choice else [],
        "metrics": _aggregates([study.outcome(r).evaluation for r in done], EVAL_METRICS) if complete else {},
        "groups": _groups(study, done) if complete else {},
        "samples": fmean(t["samples"] for t in totals) if complete else None,
        "seconds": interval([t["seconds"] for t in totals]) if complete else None,
        "by_seed": {r.seed: _means(study.outcome(r).evaluation) for r in done},
        "groups_by_seed": {r.seed: {n: _known(_by_group(study, r, n)) for n in GROUPED} for r in done},
        "differences": {},
        "curve": _curve(study, row, done) if complete else [],
    }


def _regrade(row: dict[str, Any], base: dict[str, Any]) -> None:
    """A row with another teacher than base's: its drops are below base's, what else needs a teacher is left out."""
    for seed, own in row["by_seed"].items():
        row["by_seed"][seed] = own = {k: v for k, v in own.items() if not k.startswith(OF_TEACHER)}
        teacher = base["by_seed"].get(seed, {}).get("accuracy/teacher")
        for view in ("speech", "text"):
            if teacher and f"accuracy/{view}" in own:
                own[f"drop/{view}"] = 100 * (1 - own[f"accuracy/{view}"] / teacher)
    if row["complete"]:
        row["metrics"] = {k: v for k, v in row["metrics"].items() if not k.startswith(OF_TEACHER)}
        for name in ("drop/speech", "drop/text"):
            values = [own[name] for own in row["by_seed"].values() if name in own]
            if len(values) == len(row["by_seed"]):
                row["metrics"][name] = interval(values) | {"stderr_records": None}
    note = "its teacher is not base's: drops are below base's teacher, F and reverse KL are left out"
    row["notes"] = [*row["notes"], note]


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
    found = [f", {failed} failed"] if failed else []
    return "".join([*found, *([f", {len(unusable)} cannot be used ({unusable[0]})"] if unusable else [])])


def _totals(study: Study, run: Run) -> dict[str, float]:
    """Over a run and those before it: responses learnt from, seconds of training steps."""
    outcomes = [study.outcome(r) for r in run.lineage]
    return {k: sum(getattr(o, k) for o in outcomes) for k in ("steps", "samples", "seconds")}


def _means(evaluation: dict[str, Any]) -> dict[str, float]:
    return _known({name: evaluation.get(name) or {} for name in EVAL_METRICS})


def _known(estimates: dict[str, Any]) -> dict[str, float]:
    return {name: e["mean"] for name, e in estimates.items() if e.get("mean") is not None}


def _aggregates(found: list[dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """By name of what all seeds measured: the interval over seeds, and the mean standard error over records, which all
    rows share."""
    aggregates = {}
    for name in names:
        estimates = [f.get(name) or {} for f in found]
        if all(e.get("mean") is not None for e in estimates):
            errors = [e["stderr"] for e in estimates if e.get("stderr") is not None]
            over_records = fmean(errors) if errors else None
            aggregates[name] = {**interval([e["mean"] for e in estimates]), "stderr_records": over_records}
    return aggregates


def _groups(study: Study, done: list[Run]) -> dict[str, dict[str, Any]]:
    """Accuracy by view, and misalignment, by the group that records name, as `_aggregates` has it."""
    by_name: dict[str, Any] = {}
    for name in GROUPED:
        found = [_by_group(study, r, name) for r in done]
        by_name[name] = _aggregates(found, sorted(set().union(*found)))
    return by_name


def _by_group(study: Study, run: Run, name: str) -> dict[str, Any]:
    return (study.outcome(run).evaluation.get("groups") or {}).get(name) or {}


def _differences(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Paired by seed: by metric, and under `groups` by what is grouped and group."""
    found = _paired(row["metrics"], row["by_seed"], other["by_seed"])
    of_groups = {}
    for name, some in row["groups"].items():
        of_groups[name] = _paired(some, *({s: g[name] for s, g in r["groups_by_seed"].items()} for r in (row, other)))
    return found | {"groups": of_groups}


def _paired(names: Iterable[str], ours: dict[int, Any], theirs: dict[int, Any]) -> dict[str, Any]:
    found = {}
    for name in names:
        difference = paired(*({s: m[name] for s, m in by_seed.items() if name in m} for by_seed in (ours, theirs)))
        if difference is not None:
            found[name] = difference
    return found


def _curve(study: Study, row: Row, done: list[Run]) -> list[dict[str, Any]]:
    """Points of the row's curve over its whole pipeline, means over seeds; steps and seconds count from its start.

    All of them, also those of whole evaluations, are of the records that interim evaluations are measured on.
    """
    points: dict[int, list[dict[str, Any]]] = {}
    for run in done:
        steps, seconds = 0, 0.0
        for part in run.lineage:
            outcome = study.outcome(part)
            for e in [*outcome.interim, outcome.evaluation]:
                at = {"seconds": seconds + e["train_seconds"]}
                points.setdefault(steps + e["step"], []).append(at | _means(e.get("first") or e))
            steps, seconds = steps + outcome.steps, seconds + outcome.seconds
    found = []
    for step, of_point in sorted(points.items()):
        if len(of_point) == len(done):
            names = set.intersection(*(set(p) for p in of_point))
            found.append({"step": step, **{n: fmean(p[n] for p in of_point) for n in names}})
    return found


def _usual(samples: list[float]) -> float | None:
    """The number of samples that most rows have seen."""
    return Counter(samples).most_common(1)[0][0] if samples else None


def _run(study: Study, run: Run) -> dict[str, Any]:
    o = study.outcome(run)
    return {
        "name": run.name,
        "row": run.row.id,
        "phase": run.phase,
        "rate": run.rate,
        "seed": run.seed,
        "state": o.state,
        "error": o.error,
        "recipe": run.row.recipe,
        "overrides": run.overrides,
        "steps": o.steps,
        "samples": o.samples,
        "seconds": o.seconds,
        "wall": o.wall,
        "evaluation": {k: v for k, v in o.evaluation.items() if k in (*EVAL_METRICS, "groups")},
    }
