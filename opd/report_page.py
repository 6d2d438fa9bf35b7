"""The HTML page of a report: tables, inline SVG plots, dialogues with per-token advantage as colour."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from html import escape
from typing import Any

from opd.report import VIEWS, Run, phases

# Okabe-Ito: told apart by colour-blind readers too
COLOURS = {"speech": "#0072B2", "text": "#E69F00", "teacher": "#999999", "retention": "#009E73"}
PHASES = {"rollout": "#0072B2", "teacher": "#E69F00", "learner": "#009E73", "sync": "#CC79A7", "rest": "#999999"}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8885; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; background: #fff; border-radius: .4rem; padding: .5rem; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: .9rem; }
.tokens span { border-radius: .2rem; color: #000; white-space: pre-wrap; padding: .1rem 0; }
.sample { border-left: 3px solid #8888; padding-left: 1rem; margin: 1rem 0; }
.note { opacity: .75; font-size: .9rem; } pre { overflow-x: auto; font-size: .8rem; }
"""


def page(runs: list[Run], report: dict[str, Any]) -> str:
    """One HTML document that loads nothing from anywhere."""
    body = [
        "<h1>opd report</h1>",
        f"<p>{_headline(report['stages'])}</p>",
        "<h2>Stages</h2>",
        _stages(report["stages"]),
        _figure("Accuracy by stage, with standard errors.", lambda ax: _accuracy(ax, report["stages"])),
        "<h2>By skill</h2>",
        _groups(report["stages"]),
        "<h2>Training</h2>",
        _figure(
            "Reverse KL on the student's own samples, by view.", lambda ax: _curves(ax, runs, _KL, "nats per token")
        ),
        _figure("Mean response length.", lambda ax: _curves(ax, runs, ("length/mean",), "tokens")),
        _figure("Loss.", lambda ax: _curves(ax, runs, ("loss",), "loss")),
        _figure("Mean |learner - sampler| log-prob.", lambda ax: _curves(ax, runs, ("mismatch/logprob",), "nats")),
        "<h2>Time</h2>",
        _figure("Seconds per step by phase, first step left out.", lambda ax: _time(ax, runs)),
        _time_table(runs),
        "<h2>Dialogues</h2>",
        _dialogues(runs),
        "<h2>Settings</h2>",
        _settings(runs, report),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>opd</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>'


_KL = ("reverse_kl/speech", "reverse_kl/text")


def _headline(stages: list[dict[str, Any]]) -> str:
    first, last = stages[0], stages[-1]
    parts = []
    for label, pick in (
        ("spoken accuracy", lambda s: s["accuracy"]["speech"]),
        ("typed accuracy", lambda s: s["accuracy"]["text"]),
        ("retention", lambda s: s["retention"]),
    ):
        a, b = pick(first), pick(last)
        if a and b:
            parts.append(f"{label} {_percent(a)} → {_percent(b)}")
    kl = [s["reverse_kl"]["speech"] for s in (first, last)]
    if None not in kl:
        parts.append(f"reverse KL on own spoken samples {kl[0]:.2f} → {kl[1]:.2f} nats per token")
    names = f"{escape(first['name'])} → {escape(last['name'])}"
    return f"<strong>{names}</strong>: {'; '.join(parts) or 'no comparison yet'}."


def _percent(e: dict[str, Any]) -> str:
    return f"{100 * e['mean']:.1f} ± {100 * (e['stderr'] or 0):.1f} %"


def _stages(stages: list[dict[str, Any]]) -> str:
    rows = [
        ("spoken accuracy", lambda s: _maybe(s["accuracy"]["speech"], _percent)),
        ("typed accuracy", lambda s: _maybe(s["accuracy"]["text"], _percent)),
        ("teacher, typed", lambda s: _maybe(s["accuracy"]["teacher"], _percent)),
        ("retention", lambda s: _maybe(s["retention"], _percent)),
        (
            "drop below the teacher, spoken (%)",
            lambda s: _number(s["drop"]["speech"], s["stderr"]["drop"]["speech"], 1),
        ),
        ("drop below the teacher, typed (%)", lambda s: _number(s["drop"]["text"], s["stderr"]["drop"]["text"], 1)),
        ("misalignment M", lambda s: _number(s["misalignment"], s["stderr"]["misalignment"])),
        ("forgetting F", lambda s: _number(s["forgetting"], s["stderr"]["forgetting"])),
        ("reverse KL, spoken", lambda s: _number(s["reverse_kl"]["speech"], s["stderr"]["reverse_kl"]["speech"])),
        ("reverse KL, typed", lambda s: _number(s["reverse_kl"]["text"], s["stderr"]["reverse_kl"]["text"])),
        ("steps", lambda s: str(s["steps"])),
        ("training seconds", lambda s: f"{s['seconds']:.0f}"),
    ]
    return _table(["", *(f"{s['name']} ({s['run']})" for s in stages)], [[n, *map(f, stages)] for n, f in rows])


def _groups(stages: list[dict[str, Any]]) -> str:
    columns = [(s, v) for s in stages for v in VIEWS if s.get("groups")]
    names = sorted({g for s, v in columns for g in s["groups"][v]})
    if not names:
        return "<p>No groups in the manifest.</p>"
    rows = [[g, *(_maybe(s["groups"][v].get(g), _percent) for s, v in columns)] for g in names]
    return _table(["skill", *(f"{s['name']}, {v}" for s, v in columns)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _maybe(value: Any, show: Callable[[Any], str]) -> str:
    return "–" if not value or value.get("mean") is None else show(value)


def _number(mean: float | None, stderr: float | None, digits: int = 3) -> str:
    return "–" if mean is None else f"{mean:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _figure(caption: str, draw: Callable[[Any], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "opd"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    if not axes.has_data():
        return f"<p class=note>{escape(caption)} Nothing to plot.</p>"
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"


def _accuracy(axes: Any, stages: list[dict[str, Any]]) -> None:
    series = {v: [s["accuracy"][v] for s in stages] for v in (*VIEWS, "teacher")}
    series["retention"] = [s["retention"] for s in stages]
    width = 0.2
    for k, (name, values) in enumerate(series.items()):
        known = [(i, v) for i, v in enumerate(values) if v and v["mean"] is not None]
        if known:
            x, heights = [i + (k - 1.5) * width for i, _ in known], [v["mean"] for _, v in known]
            axes.bar(x, heights, width, yerr=[v["stderr"] or 0 for _, v in known], color=COLOURS[name], label=name)
    axes.set_xticks(range(len(stages)), [s["name"] for s in stages])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("accuracy")
    axes.legend(loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 1.2))


def _curves(axes: Any, runs: list[Run], names: tuple[str, ...], label: str) -> None:
    offset = 0
    for run in runs:
        for name in names:
            points = [(offset + m["step"], m[name]) for m in run.steps if m.get(name) is not None]
            if points:
                view = name.rpartition("/")[2]
                axes.plot(*zip(*points, strict=True), color=COLOURS.get(view), label=f"{run.name} {name}")
        offset += run.steps[-1]["step"] if run.steps else 0
    axes.set_xlabel("step (runs one after another)")
    axes.set_ylabel(label)
    if axes.has_data():
        axes.legend(frameon=False)


def _time(axes: Any, runs: list[Run]) -> None:
    left = [0.0] * len(runs)
    for phase, colour in PHASES.items():
        values = [phases(r)[phase] for r in runs]
        axes.barh(range(len(runs)), values, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(runs)), [r.name for r in runs])
    axes.set_xlabel("seconds per step")
    axes.legend(ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2))


def _time_table(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        seconds = phases(run)
        whole = sum(seconds.values()) or 1.0
        rows.append([run.name, *(f"{s:.2f} s ({100 * s / whole:.0f} %)" for s in seconds.values())])
    return _table(["run", *PHASES], rows)


def _dialogues(runs: list[Run]) -> str:
    parts = [
        "<p class=note>Each token is coloured by its advantage log π(teacher) − log π(student): "
        f"<span class=tokens>{_token('teacher far less likely', -3)} {_token('alike', 0)} "
        f"{_token('teacher far more likely', 3)}</span></p>"
    ]
    for run in runs:
        graded = [s for s in run.samples if s["advantage"]]
        early, late = graded[:2], graded[-4:]
        for title, chosen in (("early", early), ("late", [s for s in late if s not in early])):
            parts += [_sample(run, title, s) for s in chosen]
    return "".join(parts) if len(parts) > 1 else "<p>No graded samples: no on-policy run is in this report.</p>"


def _sample(run: Run, title: str, s: dict[str, Any]) -> str:
    tokens = "".join(_token(t, a) for t, a in zip(s["tokens"], s["advantage"], strict=True))
    where = f"{run.name}, {title} (step {s['step']}), {s['view']} view, {s['id']}"
    lines = f"<div class=note>{escape(where)}</div>{escape(s['prompt'])}<div class=tokens>{tokens}</div>"
    return f"<div class=sample>{lines}</div>"


def _token(text: str, advantage: float) -> str:
    strength = min(1.0, abs(advantage) / 3.0)
    colour = "230,120,0" if advantage < 0 else "0,114,178"
    background = f"background:linear-gradient(rgba({colour},{strength:.2f}),rgba({colour},{strength:.2f})),#fff"
    return f'<span style="{background}" title="{advantage:+.2f}">{escape(text)}</span>'


def _settings(runs: list[Run], report: dict[str, Any]) -> str:
    about = {k: report[k] for k in ("package_versions", "git_commit", "learner", "rollout", "wall_s")}
    parts = [("versions", about), *((r.name, r.config) for r in runs)]
    return "".join(
        f"<details><summary>{escape(n)}</summary><pre>{escape(json.dumps(c, indent=2))}</pre></details>"
        for n, c in parts
    )
