"""Run folders -> report.json, report.html: headline, tables, charts, dialogues with per-token advantage as colour."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from opd.report.blocks import Block, Details, Heading, Paragraph, Table, Tokens, document
from opd.report.charts import CURVES, accuracy, curves, times
from opd.report.runs import PHASES, Pipeline, Run, chain, phases, read_runs, seconds, summarise
from opd.scoring.statistics import Estimate
from opd.settings import UserError
from opd.storage.json_lines import write_atomic
from opd.types import VIEWS

FULL = 3.0  # nats: an advantage of this size or more has the full colour
ORANGE, BLUE = "230,120,0", "0,114,178"

Cell = Callable[[dict[str, Any]], str]


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Write `out`/report.json and `out`/report.html of one or more runs; returns their paths.

    Runs whose student is another given run are stages of one pipeline and follow it; others stand side by side.
    Raises UserError naming the file (and line) that cannot be read, or the folder that cannot be written to.
    """
    read = read_runs(runs)
    if not any(r.steps or r.evaluations for r in read):
        states = "; ".join(f"{r.folder}: {r.state}" for r in read)
        raise UserError(f"nothing to report yet, neither a finished step nor an evaluation ({states})")
    pipelines = chain(read)
    report = summarise(pipelines)
    html = document(f"opd report: {', '.join(p.name for p in pipelines)}", _blocks(pipelines, report))
    texts = {"report.json": json.dumps(report, indent=2, default=str), "report.html": html}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
    except OSError as e:
        raise UserError(f"{out}: cannot write the report there ({e.strerror}); choose another --out") from e
    return [out / name for name in texts]


def _blocks(pipelines: list[Pipeline], report: dict[str, Any]) -> Iterator[Block]:
    runs = list({r.name: r for p in pipelines for r in p.runs}.values())
    yield Heading("opd report", 1)
    yield from map(_headline, pipelines)
    yield from (Paragraph(f"{r.name}: {r.state}", "warn") for r in runs if r.status.get("phase") != "finished")
    yield from (Paragraph(f"{r.name}: {text}", "warn") for r in runs for text in r.warnings)
    yield Heading("Stages")
    yield from _stages(pipelines)
    yield accuracy(pipelines)
    yield Heading("By skill")
    yield from _skills(pipelines)
    yield Heading("Training")
    yield from (curves(pipelines, caption) for caption in CURVES)
    yield Heading("Time")
    yield times(runs)
    yield _times(runs)
    yield Heading("Dialogues")
    yield from _dialogues(runs)
    yield Heading("Runs")
    rows = [[r.name, r.state, str(r.folder), r.config["student"]["path"], r.commit[:12]] for r in runs]
    about = "Where each run stands and what it started from."
    yield Table(["run", "state", "folder", "student", "commit"], rows, about, "text")
    settings = {"learner, rollout, wall-clock seconds": {k: report[k] for k in ("learner", "rollout", "wall_s")}}
    settings |= {r.name: {"git_commit": r.commit, "versions": r.versions, "config": r.config} for r in runs}
    yield from (Details(name, [json.dumps(content, indent=2, default=str)]) for name, content in settings.items())


def _headline(p: Pipeline) -> Paragraph:
    """What became of the pipeline, first stage to last; never across pipelines, nor across held-out records."""
    if p.first is None:
        return Paragraph(": no evaluation yet.", lead=p.title)
    first, last = p.first, p.stages[-1]
    parts = []
    for label, show in HEADLINE.items():
        shown = [show(s) for s in ([last] if first is last else [first, last])]
        if "–" not in shown:
            parts.append(f"{label} {' → '.join(shown)}")
    teacher = _percent(last["accuracy"]["teacher"])
    parts += [f"the teacher's typed accuracy is {teacher}"] if teacher != "–" else []
    stages = f"{first['name']} → {last['name']}" if first is not last else f"{last['name']}, nothing to compare it with"
    return Paragraph(f" ({stages}): {'; '.join(parts) or 'nothing was measured'}.", lead=p.title)


def _percent(e: Estimate | None) -> str:
    """A share as percent, with its standard error; – when it was not measured."""
    return _number(e, 1, 100.0, " %")


def _number(e: Estimate | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    if not e or e["mean"] is None:
        return "–"
    error = e.get("stderr")
    known = "n/a" if error is None else f"{scale * error:.{digits}f}"
    return f"{scale * e['mean']:.{digits}f} ± {known}{unit}"


def _accuracy(view: str) -> Cell:
    return lambda s: _percent(s["accuracy"][view])


def _mean(name: str, view: str = "", digits: int = 3, unit: str = "") -> Cell:
    """A metric whose mean and standard error a stage has apart, by view or not."""

    def show(stage: dict[str, Any]) -> str:
        mean, stderr = ((of[view] if view else of) for of in (stage[name], stage["stderr"][name]))
        return _number({"mean": mean, "stderr": stderr}, digits, unit=unit)

    return show


HEADLINE: dict[str, Cell] = {
    "spoken accuracy": _accuracy("speech"),
    "typed accuracy": _accuracy("text"),
    "retention": lambda s: _percent(s["retention"]),
    "reverse KL in nats per token of own spoken samples": _mean("reverse_kl", "speech", 2),
}
ACCURACIES: dict[str, Cell] = {
    "spoken": _accuracy("speech"),
    "typed": _accuracy("text"),
    "teacher, typed": _accuracy("teacher"),
    "retention": lambda s: _percent(s["retention"]),
    "drop, spoken": _mean("drop", "speech", 1, " %"),
    "drop, typed": _mean("drop", "text", 1, " %"),
    "records": lambda s: str(next((e["n"] for e in s["accuracy"].values() if e and e.get("n")), "–")),
}
DIVERGENCES: dict[str, Cell] = {
    "reverse KL, spoken": _mean("reverse_kl", "speech"),
    "reverse KL, typed": _mean("reverse_kl", "text"),
    "misalignment M": _mean("misalignment"),
    "forgetting F": _mean("forgetting"),
    "steps": lambda s: str(s["steps"]),
    "training": lambda s: f"{s['seconds']:.0f} s",
}


def _stages(pipelines: list[Pipeline]) -> Iterator[Table]:
    about = "Accuracy, and the mean relative drop below the teacher. ± is one standard error over records."
    if any(s["records"] != p.stages[-1]["records"] for p in pipelines for s in p.stages):
        about += " * measured on other held-out records than its pipeline's last stage: not comparable with it."
    yield _by_stage(pipelines, ACCURACIES, about)
    about = "Divergences, in nats per token; steps and seconds of the stage's own run."
    yield _by_stage(pipelines, DIVERGENCES, about)


def _skills(pipelines: list[Pipeline]) -> Iterator[Block]:
    skills = sorted({g for p in pipelines for s in p.stages for v in (s["groups"] or {}).values() for g in v})
    if not skills:
        yield Paragraph("No groups in the manifest.")
        return

    def cell(skill: str, view: str) -> Cell:
        return lambda s: _percent(((s["groups"] or {}).get(view) or {}).get(skill))

    for view, title in (("speech", "Spoken accuracy by skill."), ("text", "Typed accuracy by skill.")):
        yield _by_stage(pipelines, {g: cell(g, view) for g in skills}, title)


def _by_stage(pipelines: list[Pipeline], columns: dict[str, Cell], about: str) -> Table:
    """A row per stage, the rows of each pipeline under its name."""
    rows = []
    for p in (p for p in pipelines if p.stages):
        rows += [[p.title]] if len(pipelines) > 1 else []
        for s in p.stages:
            other = "*" if s["records"] != p.stages[-1]["records"] else ""
            alone = sum(t["name"] == s["name"] for t in p.stages) == 1
            name = s["name"] if alone else f"{s['name']} ({s['run']})"
            rows.append([name + other, *(show(s) for show in columns.values())])
    return Table(["stage", *columns], rows, about)


def _times(runs: list[Run]) -> Table:
    rows = []
    for run in runs:
        mean = phases(run)
        totals = [f"{seconds(run, what):.0f}" for what in ("training", "evaluations")]
        rows.append([run.name, *(_number(mean[n]) for n in (*PHASES, "step")), *totals])
        if whole := mean["step"]["mean"]:
            shares = [f"{100 * (mean[n]['mean'] or 0.0) / whole:.1f} %" for n in (*PHASES, "step")]
            rows.append(["", *shares, "", ""])
    about = "Mean seconds of a step, their standard error over steps, the share of the step; then the run's totals in "
    about += "seconds. rest: reading clips and whatever no other phase claims. Checkpoints are outside the steps."
    return Table(["run", *PHASES, "step", "all steps", "all evaluations"], rows, about)


def _dialogues(runs: list[Run]) -> Iterator[Block]:
    shown = [(run, s) for run in runs for s in _chosen(run)]
    if not shown:
        yield Paragraph("No scored samples: no on-policy run in this report has finished a step.")
        return
    about = "Each token is coloured by its advantage, log π(teacher) − log π(student), in nats: orange where the "
    about += "teacher finds it less likely than the student does, blue where more; full colour at 3 nats. "
    about += "Point at a token for its number."
    yield Tokens(about, "", [_token(f" {a:+g} " if a else " 0 ", float(a)) for a in range(-3, 4)])
    for run, s in shown:
        cut = ", truncated" if s.get("truncated") else ""
        where = f"{run.name}, step {s['step']}, {s['view']} view, {s['id']}{cut}"
        yield Tokens(where, s["prompt"], [_token(t, a) for t, a in zip(s["tokens"], s["advantage"], strict=True)])


def _chosen(run: Run) -> list[dict[str, Any]]:
    """Two scored samples of each view, of the first step kept and of the last."""
    graded = [s for s in run.samples if s["advantage"]]
    places = product(sorted({s["step"] for s in graded}), VIEWS)
    return [s for place in places for s in [g for g in graded if (g["step"], g["view"]) == place][:2]]


def _token(text: str, advantage: float | None) -> tuple[str, str, str]:
    if advantage is None:
        return text, "", "not a finite number"
    strength = 0.55 * min(1.0, abs(advantage) / FULL)  # never so strong that light or dark text is lost on it
    colour = ORANGE if advantage < 0 else BLUE
    return text, f"background:rgba({colour},{strength:.2f})", f"{advantage:+.2f}"
