"""study.html: the tables and plots of a study in one page that loads nothing from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from opd.report_page import STYLE, table, table_row
from opd.report_plots import COLOURS, GREY, figure
from opd.study.results import COLUMNS, cells, compared_with, differences, notes
from opd.study.spec import BASE

STROKES, MARKERS = ("-", "--", ":"), ("o", "s", "^")  # a row beyond the colours has one of them again, drawn otherwise
World = dict[str, Any]


def page(content: dict[str, Any]) -> str:
    """One HTML document from the content of study.json."""
    body = [f"<h1>opd study</h1><p>{escape(content['study'])}, seeds {', '.join(map(str, content['seeds']))}</p>"]
    for k, world in enumerate(content["worlds"]):
        body += [f"<h2>{escape(world['name'])}</h2>", results(world)]
        body += [*against(world, compared_with(content)), *charts(world, f"w{k}")]
        body += ["<h3>Choice of the learning rate</h3>", sweeps(world)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>opd study</title>'
    head += f"<style>{STYLE} body {{ max-width: 80rem; }}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def results(world: World) -> str:
    """The table of a world, what is wrong with it below."""
    lines = [table_row(name, shown) for name, *shown in cells(world, "*")]
    heads = ["row", "rate", *(c[0] for c in COLUMNS), "samples", "seconds"]
    about = "Mean over seeds ± half of its 95 % confidence interval. " + " ".join(notes(world, "*"))
    return table(heads, lines, about)


def against(world: World, others: list[str]) -> list[str]:
    """A table of differences to each of some rows, where there are any."""
    found = []
    for other in others:
        heads, lines = differences(world, other)
        if lines:
            about = f"Differences to {other}, paired by seed, ± half of their 95 % confidence intervals."
            found.append(table(heads, [table_row(name, shown) for name, *shown in lines], about))
    return found


def sweeps(world: World) -> str:
    """Every learning rate that was tried, and what it gave on the validation split."""
    lines, names = [], list[str]()
    for r in world["rows"]:
        for tried in r["sweep"]:
            names = names or [k for k in tried if k not in ("rate", "excess", "passes")]
            shown = [f"{tried['rate']:g}", *(f"{tried[n]:.3f}" for n in names)]
            chosen = "chosen" if tried["rate"] == r["rate"] else ""
            lines.append(table_row(r["name"], [*shown, "yes" if tried["passes"] else "no", chosen]))
    if not lines:
        return "<p>No row had rates to choose from, or none is chosen yet.</p>"
    about = (
        "Means over the selection seeds on the validation split; kept: whether the guard's metrics stay close enough "
    )
    return table(["row", "rate", *names, "kept", ""], lines, about + "to the untrained student's.")


# ---- plots --------------------------------------------------------------------------------------------------------


def charts(world: World, key: str) -> list[str]:
    """Accuracy by view against steps, seconds and forgetting; spoken accuracy against retention."""
    forgetting = "forgetting F, nats per token"
    costs = (
        ("speech", "forgetting", forgetting),
        ("text", "forgetting", forgetting),
        ("speech", "retention", "retention"),
    )
    about = "Accuracy by view against forgetting, spoken accuracy against retention, 95 % intervals."
    curves = "Accuracy by view against {}, means over seeds, on the first eval.every_limit records of the split."
    return [
        lines(world, f"{key}-steps", curves.format("steps, all stages counted"), "step", "step"),
        lines(world, f"{key}-seconds", curves.format("seconds of training"), "seconds", "seconds of training"),
        scatter(world, f"{key}-cost", about, costs),
    ]


def trained(world: World) -> list[dict[str, Any]]:
    """The rows that are drawn in colour, in the order of their colours."""
    return [r for r in world["rows"] if r["curve"] and r["name"] != BASE]


def look(k: int) -> tuple[str, int]:
    """Colour of the k-th row, and how often that colour was given before."""
    return COLOURS[k % len(COLOURS)], k // len(COLOURS) % len(STROKES)


def lines(world: World, key: str, caption: str, x: str, label: str) -> str:
    """A line per row; its last point is the final evaluation, its first the untrained student's."""
    zero = next((r["curve"][0] for r in world["rows"] if r["name"] == BASE and r["curve"]), None)

    def draw(fig: Any) -> None:
        for ax, view in zip(fig.subplots(1, 2), ("speech", "text"), strict=True):
            ax.grid(True, axis="y")
            ax.set(xlabel=label, ylabel=f"accuracy, {view}")
            for k, r in enumerate(trained(world)):
                points = [p for p in ([zero] if zero else []) + r["curve"] if f"accuracy/{view}" in p]
                colour, again = look(k)
                style = {"color": colour, "linestyle": STROKES[again], "marker": MARKERS[again]}
                xs, ys = [p[x] for p in points], [p[f"accuracy/{view}"] for p in points]
                ax.plot(xs, ys, **style, markersize=3, linewidth=1.4, label=r["name"])

    return figure(key, caption, draw, (8.0, 3.4), "second" if x == "seconds" else "step")


def scatter(world: World, key: str, caption: str, panels: tuple[tuple[str, str, str], ...]) -> str:
    """A point with its intervals for each complete row; of a panel: view, metric and label of its x axis."""
    rows, order = [r for r in world["rows"] if r["complete"]], [r["name"] for r in trained(world)]

    def draw(fig: Any) -> None:
        for ax, (view, metric, label) in zip(fig.subplots(1, len(panels)), panels, strict=True):
            ax.grid(True)
            ax.set(xlabel=label, ylabel=f"accuracy, {view}")
            for r in rows:
                colour, again = (GREY, 0) if r["name"] == BASE else look(order.index(r["name"]))
                found, right = r["metrics"].get(metric), r["metrics"].get(f"accuracy/{view}")
                if found and right:
                    at = {"x": found["mean"], "xerr": found["half"], "y": right["mean"], "yerr": right["half"]}
                    ax.errorbar(**at, fmt=MARKERS[again], color=colour, elinewidth=0.8, label=r["name"])

    return figure(key, caption, draw, (10.0, 3.4))
