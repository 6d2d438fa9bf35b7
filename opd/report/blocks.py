"""The blocks of a page: one template makes HTML of them, `markdown` Markdown; charts are inline SVG, transparent."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TEMPLATE = Path(__file__).with_name("page.html.jinja")
ID = "\ue000"  # of no script: no text has it
# After Okabe and Ito, told apart by colour-blind readers too, and shifted to stand out from white and from black alike
BLUE, ORANGE, GREEN, PINK = "#2b83c6", "#c97a00", "#1a9a72", "#c2679b"
RED, VIOLET, GREY = "#d55e00", "#8f73d9", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, VIOLET)
INK = "#010203"  # stands for the page's text colour until the SVG is written
SETTINGS = {
    **{"svg.hashsalt": "opd", "svg.fonttype": "none", "axes.axisbelow": True, "grid.alpha": 0.15},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False),
    "text.parse_math": False,  # a $ in a run's name is a $
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
}


@dataclass(frozen=True)
class Heading:
    """Of level 1 to 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """`kind`: a class of the template's style, warn or note; `lead`: words in front, in bold."""

    text: str
    kind: str = ""
    lead: str = ""


@dataclass(frozen=True)
class Bullets:
    """Sentences of equal rank."""

    items: list[Paragraph]


@dataclass(frozen=True)
class Table:
    """Rows whose first cell names them, and what they show. A row of one cell alone is a head over those below it."""

    heads: list[str]
    rows: list[list[str]]
    about: str = ""
    kind: str = "numbers"  # or text, whose cells are aligned to the left


@dataclass(frozen=True)
class Figure:
    """A chart as inline SVG, or a player of the sound at a data URI; Markdown goes without.

    Ids in the SVG begin with `ID`, for which the template writes the number of the block: no two charts share one.
    """

    caption: str
    svg: str = ""
    sound: str = ""


@dataclass(frozen=True)
class Details:
    """Long texts behind a summary; Markdown goes without."""

    summary: str
    texts: list[str]


@dataclass(frozen=True)
class Tokens:
    """A text whose tokens have CSS and a title each: (token, CSS, title). Markdown goes without."""

    about: str
    prompt: str
    tokens: list[tuple[str, str, str]]


Block = Heading | Paragraph | Bullets | Table | Figure | Details | Tokens


def document(title: str, blocks: Iterable[Block], layout: str = "") -> str:
    """A whole HTML page, which loads nothing from anywhere. `layout`: wide, for many columns, and wrap, for more."""
    from jinja2 import Environment

    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = env.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, blocks=list(blocks), layout=layout, ID=ID)


def markdown(blocks: Iterable[Block]) -> str:
    """The same as Markdown, as far as it can say it."""
    return "\n\n".join(filter(None, map(_markdown, blocks))) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text, kind, lead):
            text = f"**{_plain(text)}**" if kind == "warn" else _plain(text)
            return f"**{_plain(lead)}**{text}" if lead else text
        case Bullets(items):
            return "\n".join(f"- {_markdown(item)}" for item in items)
        case Table(heads, rows, about):
            lines = [f"| {' | '.join(map(_plain, row))} |" for row in [heads, *rows]]
            return "\n".join([_plain(about), "", lines[0], "|---" * len(heads) + "|", *lines[1:]])
    return ""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("\n", " ")


def figure(caption: str, draw: Callable[[Any], None], inches: tuple[float, float], unit: str = "step") -> Figure:
    """A chart that `draw` fills; no SVG without points. `unit`: of the x axis, for readers who see no curves."""
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
        columns = max(1, min(len(labelled), 110 // (max(map(len, labelled)) + 6)))
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
