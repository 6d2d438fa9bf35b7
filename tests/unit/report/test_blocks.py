"""What every block becomes, as HTML and as Markdown; nothing in it is markup."""

from __future__ import annotations

import re

from report_runs import EVIL, Page

from opd.report.blocks import Bullets, Details, Figure, Heading, Paragraph, Table, Tokens, document, figure, markdown

ALL = [
    Heading(EVIL, 1),
    Paragraph(EVIL, "warn"),
    Bullets([Paragraph(EVIL, lead=EVIL)]),
    Table([EVIL, "n"], [[EVIL], [EVIL, "1.0 ± 0.5"]], EVIL),
    Figure(EVIL, sound=EVIL),
    Details(EVIL, [EVIL]),
    Tokens(EVIL, EVIL, [(EVIL, "", EVIL)]),
]


def test_nothing_from_outside_is_markup() -> None:
    page = Page(document(EVIL, ALL))
    assert "script" not in [tag for tag, _ in page.tags]
    # title; heading; paragraph; two of the bullet; four of the table; caption; two of the details; three of the tokens
    assert "".join(page.text).count(EVIL) == 15
    assert [a["src"] for tag, a in page.tags if tag == "audio"] == [EVIL]
    assert [a["title"] for tag, a in page.tags if tag == "span"] == [EVIL]


def test_a_number_stays_with_its_error_where_cells_wrap() -> None:
    table = [Table(["", "n"], [["x", "1.0 ± 0.5"]])]
    assert "<td>1.0 ± 0.5</td>" in document("t", table)
    assert "<td>1.0 ±\u00a00.5</td>" in document("t", table, "wide wrap")


def test_markdown_says_what_it_can() -> None:
    blocks = [
        Heading("a * b"),
        Paragraph("mind <this>", "warn"),
        Bullets([Paragraph(": it is", lead="so"), Paragraph("`code`")]),
        Table(["a|b", "n"], [["x\ny", "1"]], "About."),
        Details("long", ["text"]),
        Figure("A chart."),
    ]
    table = "About.\n\n| a\\|b | n |\n|---|---|\n| x y | 1 |"
    assert markdown(blocks) == f"## a \\* b\n\n**mind &lt;this>**\n\n- **so**: it is\n- `code`\n\n{table}\n"


def test_the_same_chart_twice_has_other_ids() -> None:
    def draw(canvas: object) -> None:
        canvas.subplots().plot([0, 1], [0, 1], label="line")  # type: ignore[attr-defined]

    page = Page(document("t", [figure("A chart.", draw, (4, 3))] * 2))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 0
    used = re.findall(r"#(f\d-[\w-]+)", " ".join(v for _, a in page.tags for v in a.values()))
    assert used and set(used) <= set(ids)


def test_a_chart_without_points_says_so() -> None:
    assert "A chart. Nothing to plot yet." in document("t", [figure("A chart.", lambda canvas: None, (4, 3))])
