"""The charts of a study."""

from __future__ import annotations

from typing import Any

from opd.report.blocks import Figure
from opd.report.figure import COLOURS, GREY, figure
from opd.study.spec import BASE

STROKES, MARKERS = ("-", "--", ":"), ("o", "s", "^")  # a row beyond the colours has one of them again, drawn otherwise
World = dict[str, Any]


def charts(world: World) -> list[Figure]:
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
        lines(world, curves.format("steps, all stages counted"), "step", "step"),
        lines(world, curves.format("seconds of training"), "seconds", "seconds of training"),
        scatter(world, about, costs),
    ]


def trained(world: World) -> list[dict[str, Any]]:
    """The rows that are drawn in colour, in the order of their colours."""
    return [r for r in world["rows"] if r["curve"] and r["name"] != BASE]


def look(k: int) -> tuple[str, int]:
    """Colour of the k-th row, and how often that colour was given before."""
    return COLOURS[k % len(COLOURS)], k // len(COLOURS) % len(STROKES)


def lines(world: World, caption: str, x: str, label: str) -> Figure:
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

    return figure(caption, draw, (8.0, 3.4), "second" if x == "seconds" else "step")


def scatter(world: World, caption: str, panels: tuple[tuple[str, str, str], ...]) -> Figure:
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

    return figure(caption, draw, (10.0, 3.4))
