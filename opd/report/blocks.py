"""What a page consists of: blocks of a few kinds, which one template makes HTML of, and `markdown` Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html.jinja")
ID = "\ue000"  # of no script: no text has it


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
