"""Charts as inline SVG that takes the page's text colour and has no background of its own."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from opd.report.blocks import ID, Figure

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


Draw = Callable[[Any], None]  # fills a matplotlib figure


def figure(caption: str, draw: Draw, inches: tuple[float, float], unit: str = "step") -> Figure:
    """A chart with its caption; without SVG when there is nothing to plot.

    `unit` of the x axis is for readers who do not see the curves.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyph, the layout only guesses
        canvas = Canvas(figsize=inches, layout="constrained")
        draw(canvas)
        drawn = [a for a in canvas.axes if a.get_legend_handles_labels()[0]]
        if not drawn:
            return Figure(caption)
        labelled = {label: h for a in drawn for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        widest = max(map(len, labelled))
        columns = max(1, min(len(labelled), 110 // (widest + 6)))
        canvas.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=columns)
        lines = [line for a in drawn for line in a.get_lines() if not str(line.get_label()).startswith("_")]
        alt = " ".join([caption, *(_spoken(line, unit) for line in lines)])
        buffer = io.StringIO()
        nothing: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Figure(caption, _inline(buffer.getvalue(), alt))


def _spoken(line: Any, unit: str) -> str:
    x, y = line.get_xdata(), line.get_ydata()
    ends = f"{y[0]:.3g} at {unit} {x[0]:g}, {y[-1]:.3g} at {unit} {x[-1]:g}"
    return f"{line.axes.get_ylabel()} of {line.get_label().strip()}: {ends}."


def _inline(svg: str, alt: str) -> str:
    """matplotlib's file as an element of a page: no prologue or name spaces, ids of its own, the page's text colour."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.items()):
            del element.attrib[name]
            value = value.replace(INK, "currentColor").replace("url(#", f"url(#{ID}")
            own = {"id": ID + value, "href": value.replace("#", f"#{ID}")}
            element.set(short := name.rpartition("}")[2], own.get(short, value))
    root.attrib |= {"role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")
