"""The HTML page of a report: headline, tables, charts, dialogues with per-token advantage as colour."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from typing import Any

from opd.report.charts import accuracy, curves, times
from opd.report.html import document, table, table_row
from opd.report.pipelines import PHASES, Pipeline, phases, seconds
from opd.report.runs import VIEWS, Run
from opd.scoring.statistics import Estimate

FULL = 3.0  # nats: an advantage of this size or more has the full colour
ORANGE, BLUE = "230,120,0", "0,114,178"

Cell = Callable[[dict[str, Any]], str]


def page(pipelines: list[Pipeline], report: dict[str, Any]) -> str:
    """One HTML document that loads nothing from anywhere."""
    runs = list({r.name: r for p in pipelines for r in p.runs}.values())
    body = [
        "<h1>opd report</h1>",
        *map(_headline, pipelines),
        _warnings(runs),
        "<h2>Stages</h2>",
        _stages(pipelines),
        accuracy(pipelines, "accuracy"),
        "<h2>By skill</h2>",
        _skills(pipelines),
        "<h2>Training</h2>",
        curves(
            *(pipelines, "kl", "Reverse KL on the student's own samples, by view (text dashed)."),
            (("reverse_kl/speech", "reverse_kl/text"), "nats per token", 0.01),
        ),
        curves(
            *(
                pipelines,
                "ratio",
                "Importance ratio of learner to sampler, and the share of tokens where it is cut off.",
            ),
            *(
                (("ratio/mean",), "importance ratio, mean", 0.02),
                (("ratio/clipped",), "importance ratio, share clipped", 0.02),
            ),
        ),
        curves(
            *(pipelines, "length", "Responses: mean length, and the share that never ended."),
            *((("length/mean",), "tokens", 1.0), (("length/truncated",), "share truncated", 0.02)),
        ),
        curves(
            *(pipelines, "loss", "Loss, which each objective defines for itself, and the norm of the gradient."),
            *((("loss",), "loss", 0.01), (("grad_norm",), "gradient norm", 0.01)),
        ),
        curves(
            *(
                pipelines,
                "mismatch",
                "Mean |learner - sampler| log-prob of the sampled tokens, and the student's entropy.",
            ),
            *((("mismatch/logprob",), "nats per token", 1e-6), (("entropy",), "entropy, nats per token", 0.01)),
        ),
        "<h2>Time</h2>",
        times(runs, "time"),
        _times(runs),
        "<h2>Dialogues</h2>",
        _dialogues(runs),
        "<h2>Runs</h2>",
        _runs(runs),
        _settings(runs, report),
    ]
    title = f"opd report: {', '.join(p.name for p in pipelines)}"
    return document(title, "".join(body))


def _headline(p: Pipeline) -> str:
    """What became of the pipeline, first stage to last; never across pipelines, nor across held-out records."""
    if p.first is None:
        return f"<p><strong>{escape(p.title)}</strong>: no evaluation yet.</p>"
    first, last = p.first, p.stages[-1]
    parts = []
    for label, show in _HEADLINE.items():
        shown = [show(s) for s in ([last] if first is last else [first, last])]
        if "–" not in shown:
            parts.append(f"{label} {' → '.join(shown)}")
    teacher = _percent(last["accuracy"]["teacher"])
    parts += [f"the teacher's typed accuracy is {teacher}"] if teacher != "–" else []
    stages = f"{first['name']} → {last['name']}" if first is not last else f"{last['name']}, nothing to compare it with"
    where = f"<strong>{escape(p.title)}</strong> ({escape(stages)})"
    return f"<p>{where}: {escape('; '.join(parts) or 'nothing was measured')}.</p>"


def _percent(e: Estimate | None) -> str:
    """A share as percent, with its standard error; – when it was not measured."""
    return _number(e, 1, 100.0, " %")


def _number(e: Estimate | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    if not e or e["mean"] is None:
        return "–"
    error = e.get("stderr")
    known = "n/a" if error is None else f"{scale * error:.{digits}f}"
    return f"{scale * e['mean']:.{digits}f} ± {known}{unit}"


def _of(stage: dict[str, Any], name: str, view: str = "") -> Estimate:
    mean, stderr = stage[name], stage["stderr"][name]
    return {"mean": mean[view], "stderr": stderr[view]} if view else {"mean": mean, "stderr": stderr}


_HEADLINE: dict[str, Cell] = {
    "spoken accuracy": lambda s: _percent(s["accuracy"]["speech"]),
    "typed accuracy": lambda s: _percent(s["accuracy"]["text"]),
    "retention": lambda s: _percent(s["retention"]),
    "reverse KL in nats per token of own spoken samples": lambda s: _number(_of(s, "reverse_kl", "speech")),
}


def _warnings(runs: list[Run]) -> str:
    found = [f"{r.name}: {r.state}" for r in runs if r.status.get("phase") != "finished"]
    found += [f"{r.name}: {text}" for r in runs for text in r.warnings]
    return "".join(f'<p class="warn">{escape(text)}</p>' for text in found)


def _stages(pipelines: list[Pipeline]) -> str:
    right: dict[str, Cell] = {
        "spoken": lambda s: _percent(s["accuracy"]["speech"]),
        "typed": lambda s: _percent(s["accuracy"]["text"]),
        "teacher, typed": lambda s: _percent(s["accuracy"]["teacher"]),
        "retention": lambda s: _percent(s["retention"]),
        "drop, spoken": lambda s: _number(_of(s, "drop", "speech"), 1, unit=" %"),
        "drop, typed": lambda s: _number(_of(s, "drop", "text"), 1, unit=" %"),
        "records": lambda s: str(next((e["n"] for e in s["accuracy"].values() if e and e.get("n")), "–")),
    }
    apart: dict[str, Cell] = {
        "reverse KL, spoken": lambda s: _number(_of(s, "reverse_kl", "speech"), 3),
        "reverse KL, typed": lambda s: _number(_of(s, "reverse_kl", "text"), 3),
        "misalignment M": lambda s: _number(_of(s, "misalignment"), 3),
        "forgetting F": lambda s: _number(_of(s, "forgetting"), 3),
        "steps": lambda s: str(s["steps"]),
        "training": lambda s: f"{s['seconds']:.0f} s",
    }
    about = "Accuracy, and the mean relative drop below the teacher. ± is one standard error over records."
    if any(s["records"] != p.stages[-1]["records"] for p in pipelines for s in p.stages):
        about += " * measured on other held-out records than its pipeline's last stage: not comparable with it."
    return _by_stage(pipelines, right, about) + _by_stage(
        pipelines, apart, "Divergences, in nats per token; steps and seconds of the stage's own run."
    )


def _skills(pipelines: list[Pipeline]) -> str:
    skills = sorted({g for p in pipelines for s in p.stages for v in (s["groups"] or {}).values() for g in v})
    if not skills:
        return "<p>No groups in the manifest.</p>"

    def cell(skill: str, view: str) -> Cell:
        return lambda s: _percent(((s["groups"] or {}).get(view) or {}).get(skill))

    titles = {"speech": "Spoken accuracy by skill.", "text": "Typed accuracy by skill."}
    return "".join(_by_stage(pipelines, {g: cell(g, v) for g in skills}, titles[v]) for v in VIEWS)


def _by_stage(pipelines: list[Pipeline], columns: dict[str, Cell], about: str) -> str:
    """A row per stage, the rows of each pipeline under its name."""
    rows = []
    for p in (p for p in pipelines if p.stages):
        if len(pipelines) > 1:
            rows.append(f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{escape(p.title)}</th></tr>')
        for s in p.stages:
            other = "*" if s["records"] != p.stages[-1]["records"] else ""
            alone = sum(t["name"] == s["name"] for t in p.stages) == 1
            name = s["name"] if alone else f"{s['name']} ({s['run']})"
            rows.append(table_row(name + other, [show(s) for show in columns.values()]))
    return table(["stage", *columns], rows, about)


def _times(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        mean = phases(run)
        totals = [f"{seconds(run, what):.0f}" for what in ("training", "evaluations")]
        rows.append(table_row(run.name, [*(_number(mean[n]) for n in (*PHASES, "step")), *totals]))
        whole = mean["step"]["mean"]
        if whole:
            rows.append(
                table_row("", [*(f"{100 * (mean[n]['mean'] or 0.0) / whole:.1f} %" for n in (*PHASES, "step")), "", ""])
            )
    about = "Mean seconds of a step, their standard error over steps, the share of the step; then the run's totals in "
    about += "seconds. rest: reading clips and whatever no other phase claims. Checkpoints are outside the steps."
    return table(["run", *PHASES, "step", "all steps", "all evaluations"], rows, about)


def _runs(runs: list[Run]) -> str:
    rows = [table_row(r.name, [r.state, str(r.folder), r.config["student"]["path"], r.commit[:12]]) for r in runs]
    about = "Where each run stands and what it started from."
    return table(["run", "state", "folder", "student", "commit"], rows, about, "text")


def _dialogues(runs: list[Run]) -> str:
    shown = "".join(_sample(run, s) for run in runs for s in _chosen(run))
    if not shown:
        return "<p>No graded samples: no on-policy run in this report has finished a step.</p>"
    scale = " ".join(_token(f" {a:+g} " if a else " 0 ", a) for a in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
    about = (
        "Each token is coloured by its advantage, log π(teacher) − log π(student), in nats: orange where the teacher "
        "finds it less likely than the student does, blue where more; full colour at 3 nats. Point at a token for its "
        "number."
    )
    legend = f'<p class="note">{about} <span class="tokens">{scale}</span></p>'
    return legend + shown


def _chosen(run: Run) -> list[dict[str, Any]]:
    """Two graded samples of each view, of the first step kept and of the last."""
    graded = [s for s in run.samples if s["advantage"]]
    steps = sorted({s["step"] for s in graded})
    picked = [[s for s in graded if (s["step"], s["view"]) == (step, v)][:2] for step in steps for v in VIEWS]
    return [s for few in picked for s in few]


def _sample(run: Run, s: dict[str, Any]) -> str:
    tokens = "".join(_token(t, a) for t, a in zip(s["tokens"], s["advantage"], strict=True))
    where = f"{run.name}, step {s['step']}, {s['view']} view, {s['id']}{', truncated' if s.get('truncated') else ''}"
    lines = f'<div class="note">{escape(where)}</div><div class="tokens">{escape(s["prompt"])}</div>'
    return f'<div class="sample">{lines}<div class="tokens">{tokens}</div></div>'


def _token(text: str, advantage: float | None) -> str:
    if advantage is None:
        return f'<span title="not a finite number">{escape(text)}</span>'
    strength = 0.55 * min(1.0, abs(advantage) / FULL)  # never so strong that light or dark text is lost on it
    colour = ORANGE if advantage < 0 else BLUE
    return f'<span style="background:rgba({colour},{strength:.2f})" title="{advantage:+.2f}">{escape(text)}</span>'


def _settings(runs: list[Run], report: dict[str, Any]) -> str:
    about = {k: report[k] for k in ("learner", "rollout", "wall_s")}
    of_runs = [(r.name, {"git_commit": r.commit, "versions": r.versions, "config": r.config}) for r in runs]
    parts = [("learner, rollout, wall-clock seconds", about), *of_runs]
    texts = [(escape(name), escape(json.dumps(content, indent=2, default=str))) for name, content in parts]
    return "".join(f"<details><summary>{name}</summary><pre>{text}</pre></details>" for name, text in texts)
