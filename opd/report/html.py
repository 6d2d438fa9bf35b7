"""What the pages share: style, tables, inline figures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8886; --warn: #d55e00; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: bottom; }
td, tbody th { white-space: nowrap; }
th:first-child, .text th, .text td { text-align: left; }
tbody th { font-weight: normal; } tbody th[colspan] { font-weight: bold; padding-top: .8rem; }
.text td { white-space: normal; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; } figure svg text { font-family: inherit !important; }
figcaption, .note { opacity: .8; font-size: .9rem; }
.warn { border-left: 4px solid var(--warn); padding-left: 1rem; }
.tokens { white-space: pre-wrap; } .tokens span { border-radius: .2rem; padding: .1rem 0; }
.sample { border-left: 3px solid var(--line); padding-left: 1rem; margin: 1rem 0; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page in the style of the reports, with more CSS where one needs it."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def table_row(name: str, cells: list[str]) -> str:
    """A row of a table, its name as the row's head."""
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>'


def table(head: list[str], rows: list[str], about: str, kind: str = "numbers") -> str:
    """A table that scrolls sideways where it must, with a line about it below."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    table = f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div><p class="note">{escape(about)}</p>'


# After Okabe and Ito, told apart by colour-blind readers too, and shifted to stand out from white and from black alike
BLUE, ORANGE, GREEN, PINK = "#2b83c6", "#c97a00", "#1a9a72", "#c2679b"
RED, VIOLET, GREY = "#d55e00", "#8f73d9", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, VIOLET)
INK = "#010203"  # stands for the page's text colour until the SVG is written
SETTINGS = {
    "svg.hashsalt": "opd",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a run's name is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def figure(key: str, caption: str, draw: Callable[[Any], None], inches: tuple[float, float], unit: str = "step") -> str:
    """A <figure> with its caption; a line that says so when there is nothing to plot. Keys tell ids of charts apart.

    `draw` fills a matplotlib figure; `unit` of the x axis is for readers who do not see the curves.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyph, the layout only guesses
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        drawn = [a for a in figure.axes if a.get_legend_handles_labels()[0]]
        if not drawn:
            return f'<p class="note">{escape(caption)} Nothing to plot yet.</p>'
        labelled = {label: h for a in drawn for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        widest = max(map(len, labelled))
        columns = max(1, min(len(labelled), 110 // (widest + 6)))
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=columns)
        lines = [line for a in drawn for line in a.get_lines() if not str(line.get_label()).startswith("_")]
        alt = " ".join([caption, *(_spoken(line, unit) for line in lines)])
        buffer = io.StringIO()
        nothing: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return f"<figure>{_inline(buffer.getvalue(), key, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def _spoken(line: Any, unit: str) -> str:
    x, y = line.get_xdata(), line.get_ydata()
    ends = f"{y[0]:.3g} at {unit} {x[0]:g}, {y[-1]:.3g} at {unit} {x[-1]:g}"
    return f"{line.axes.get_ylabel()} of {line.get_label().strip()}: {ends}."


def _inline(svg: str, key: str, alt: str) -> str:
    """matplotlib's file as an element of a page: no prologue or name spaces, ids of its own, the page's text colour."""

    def mend(tag: re.Match[str]) -> str:
        text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", tag[0]).replace("xlink:href", "href")
        text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", text)
        return text.replace(INK, "currentColor")

    body = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", mend, body)
    return body.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
