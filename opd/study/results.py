"""study.json and study.md: what the run folders say, row by row. Rewritten from them at any time. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from opd.config import UserError
from opd.metrics import EVAL_METRICS, write_atomic
from opd.study.grid import Study
from opd.study.runs import Outcome, Run
from opd.study.spec import BASE, Row
from opd.study.stats import LEVEL, interval, paired

# heading, metric, scale, digits
COLUMNS = (
    ("speech %", "accuracy/speech", 100, 1),
    ("text %", "accuracy/text", 100, 1),
    ("drop S %", "drop/speech", 1, 1),
    ("drop T %", "drop/text", 1, 1),
    ("M", "misalignment", 1, 2),
    ("F", "forgetting", 1, 3),
    ("retention %", "retention", 100, 1),
    ("reverse KL", "reverse_kl/speech", 1, 2),
    ("length", "length/speech", 1, 1),
)
COMPARED = ("accuracy/speech", "accuracy/text", "retention", "forgetting")  # of the tables of differences
STAR = "\\*"  # in Markdown
OF_TEACHER = ("accuracy/teacher", "drop/", "forgetting", "reverse_kl/")  # measured against the row's own teacher
FEW = 5  # seeds below which a table warns of itself


def write(study: Study) -> list[Path]:
    """Write study.json, study.md and study.html; returns their paths. Raises UserError where that is not possible."""
    from opd.study.page import page  # it reads this module, and draws

    content = summarise(study)
    texts = {"study.json": json.dumps(content, indent=2), "study.md": markdown(content), "study.html": page(content)}
    try:
        study.out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(study.out / name, text)
    except OSError as e:
        raise UserError(f"{study.out}: cannot write the study there ({e.strerror})") from e
    return [study.out / name for name in texts]


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
        "metrics": _aggregates(study, done) if complete else {},
        "samples": fmean(t["samples"] for t in totals) if complete else None,
        "seconds": interval([t["seconds"] for t in totals]) if complete else None,
        "by_seed": {r.seed: _means(study.outcome(r).evaluation) for r in done},
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
    found = {name: (evaluation.get(name) or {}).get("mean") for name in EVAL_METRICS}
    return {name: value for name, value in found.items() if value is not None}


def _aggregates(study: Study, done: list[Run]) -> dict[str, Any]:
    """By metric: the interval over seeds, and the mean standard error over records, which all rows share."""
    found = {}
    for name in EVAL_METRICS:
        estimates = [study.outcome(r).evaluation.get(name) or {} for r in done]
        if all(e.get("mean") is not None for e in estimates):
            errors = [e["stderr"] for e in estimates if e.get("stderr") is not None]
            over_records = fmean(errors) if errors else None
            found[name] = {**interval([e["mean"] for e in estimates]), "stderr_records": over_records}
    return found


def _differences(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in row["metrics"]:
        ours, theirs = ({s: m[name] for s, m in r["by_seed"].items() if name in m} for r in (row, other))
        if (difference := paired(ours, theirs)) is not None:
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
        "evaluation": {k: v for k, v in o.evaluation.items() if k in EVAL_METRICS},
    }


# ---- study.md ---------------------------------------------------------------------------------------------------


def markdown(content: dict[str, Any]) -> str:
    """The tables of study.json for people."""
    seeds = content["seeds"]
    lines = [
        f"# Study: {content['study']}",
        "",
        f"Test split, seeds {', '.join(map(str, seeds))}: mean over seeds ± half of its 95 % confidence interval (t). "
        "Speech, text and retention are accuracies; drop S and T are percent below the teacher's typed accuracy; M, F "
        "and reverse KL nats per token; length is tokens of a spoken question's answer. Samples are responses learnt "
        "from, seconds those of all training steps on this machine, the stages before included.",
    ]
    if len(seeds) < FEW:
        lines += ["", f"**{len(seeds)} seeds are few: the intervals are wide, and rely on a normal distribution.**"]
    for world in content["worlds"]:
        lines += ["", f"## {world['name']}", "", *_table(world), "", *(f"- {n}" for n in notes(world, STAR, "**"))]
        for other in compared_with(content):
            lines += _against(world, other)
    return "\n".join(lines) + "\n"


def _table(world: dict[str, Any]) -> list[str]:
    heads = ["row", "rate", *(c[0] for c in COLUMNS), "samples", "seconds"]
    return _markdown(heads, cells(world, STAR))


def _markdown(heads: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *("| " + " | ".join(x) + " |" for x in lines)]


def compared_with(content: dict[str, Any]) -> list[str]:
    """The rows that the others are compared with."""
    return list(dict.fromkeys(filter(None, (BASE, content["reference"]))))


def cells(world: dict[str, Any], star: str) -> list[list[str]]:
    """The text of a world's table, row by row; `star` marks a row that is not matched."""
    lines = []
    for r in world["rows"]:
        rate = "–" if r["rate"] is None else f"{r['rate']:g}"
        if not r["complete"]:
            lines.append([f"{r['name']} (incomplete)", rate, *["–"] * (len(COLUMNS) + 2)])
            continue
        mark = "" if r["matched"] is not False else f" {star}"
        shown = [r["name"] + mark, rate, *(_cell(r["metrics"].get(m), s, d) for _, m, s, d in COLUMNS)]
        trained = r["name"] != BASE
        lines.append(shown + ([f"{r['samples']:.0f}", _cell(r["seconds"], 1, 0)] if trained else ["0", "0"]))
    return lines


def _cell(found: dict[str, Any] | None, scale: float, digits: int, sign: str = "") -> str:
    if found is None:
        return "–"
    mean = f"{scale * found['mean']:{sign}.{digits}f}"
    return mean if found["half"] is None else f"{mean} ± {scale * found['half']:.{digits}f}"


def notes(world: dict[str, Any], star: str, strong: str = "") -> list[str]:
    """What a reader of a world's table has to know, a sentence each."""
    found = [f"{strong}{r['name']} is incomplete{strong}: {r['state']}." for r in world["rows"] if not r["complete"]]
    if any(r["matched"] is False for r in world["rows"]):
        found.append(f"{star} not matched: most rows learn from {world['samples']:.0f} samples, this one does not.")
    found += [f"{r['name']}: {note}." for r in world["rows"] for note in r["notes"]]
    speech = next((r["metrics"].get("accuracy/speech") for r in world["rows"] if r["complete"]), None)
    if speech and speech["stderr_records"] is not None:
        error = 100 * speech["stderr_records"]
        found.append(
            f"The questions are a sample too: they add about ± {error:.1f} (standard error of the first row's speech) "
            "to every row alike, less to differences between rows."
        )
    return found


def differences(world: dict[str, Any], other: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a world's table of differences to another row; no rows where none is complete."""
    columns = [c for c in COLUMNS if c[1] in COMPARED]
    lines = []
    for r in world["rows"]:
        if (found := r["differences"].get(other)) is not None:
            lines.append([r["name"], *(_cell(found.get(m), s, d, "+") for _, m, s, d in columns)])
    return [f"row - {other}", *(c[0] for c in columns)], lines


def _against(world: dict[str, Any], other: str) -> list[str]:
    heads, lines = differences(world, other)
    if not lines:
        return []
    return ["", f"Differences to {other}, paired by seed:", "", *_markdown(heads, lines)]
