"""study.html: the tables and plots of a study in one page that loads nothing from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from opd.report.html import COLOURS, GREY, document, figure, table, table_row
from opd.study.spec import BASE
from opd.study.tables import Block, Heading, Notes, Plots, Table, Text, World, blocks

STROKES, MARKERS = ("-", "--", ":"), ("o", "s", "^")  # a row beyond the colours has one of them again, drawn otherwise
# many columns: a number and its interval may stand below each other, so that a laptop's screen shows them all
WRAP = "body { max-width: 80rem; } .numbers td { white-space: normal; } .numbers th, .numbers td { padding: .3rem; }"


def page(content: dict[str, Any]) -> str:
    """One HTML document from the content of study.json."""
    body = "".join(map(_html, blocks(content)))
    return document("opd study", body, WRAP)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, warning):
            kind = ' class="warn"' if warning else ""
            return f"<p{kind}>{escape(text)}</p>"
        case Notes(found):
            items = (f"<li><strong>{escape(first)}</strong>{escape(rest)}</li>" for first, rest in found)
            return f"<ul>{''.join(items)}</ul>" if found else ""
        case Table(heads, lines, about):
            rows = [table_row(name, [c.replace("± ", "±\u00a0") for c in shown]) for name, *shown in lines]
            return table(heads, rows, about)
        case Plots(world, k):
            return "".join(charts(world, f"w{k}"))


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
