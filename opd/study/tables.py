"""What study.md and study.html say and draw, from the content of study.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opd.report import blocks as page
from opd.report.blocks import COLOURS, GREY, Block, Figure, Heading, Paragraph, Table, figure
from opd.study.spec import BASE

World = dict[str, Any]
# heading, metric, scale, digits
COLUMNS = (
    ("speech %", "accuracy/speech", 100, 1),
    ("text %", "accuracy/text", 100, 1),
    ("drop S %", "drop/speech", 1, 1),
    ("drop T %", "drop/text", 1, 1),
    ("M", "misalignment", 1, 2),
    ("F", "forgetting", 1, 3),
    ("retention %", "retention", 100, 1),
    ("reverse KL", "reverse_kl/speech", 1, 2),
    ("length", "length/speech", 1, 1),
)
# of the tables by group: what it is of, its name in study.json, scale, digits
GROUPED = (("Spoken accuracy by group, %", "speech", 100, 1), ("M by group, nats per token", "misalignment", 1, 3))
COMPARED = ("accuracy/speech", "accuracy/text", "retention", "forgetting")  # of the tables of differences
STAR = "†"  # marks a row that is not matched; it means nothing in Markdown
STROKES, MARKERS = ("-", "--", ":"), ("o", "s", "^")  # a row beyond the colours has one of them again, drawn otherwise
FEW = 5  # seeds below which a table warns of itself


def pages(content: dict[str, Any]) -> dict[str, str]:
    """study.md and study.html: the same blocks, each spelt its way; Markdown goes without charts."""
    found = list(blocks(content))
    return {"study.md": page.markdown(found), "study.html": page.document("opd study", found, "wide wrap")}


def blocks(content: dict[str, Any]) -> Iterator[Block]:
    """All that is said of a study, in order."""
    seeds = content["seeds"]
    yield Heading(f"Study: {content['study']}", 1)
    yield Paragraph(
        f"Test split, seeds {', '.join(map(str, seeds))}: mean over seeds ± half of its 95 % confidence interval (t). "
        "Speech, text and retention are accuracies; drop S and T are percent below the teacher's typed accuracy; M, F "
        "and reverse KL nats per token; length is tokens of a spoken question's answer. Samples are responses learnt "
        "from, seconds those of all training steps on this machine, the stages before included."
    )
    if (n := len(seeds)) < FEW:
        yield Paragraph(f"{n} seeds are few: the intervals are wide, and rely on a normal distribution.", "warn")
    for world in content["worlds"]:
        yield Heading(world["name"])
        heads = ["row", "rate", *(c[0] for c in COLUMNS), "samples", "seconds"]
        yield Table(heads, cells(world), "Means over seeds ± half of their 95 % confidence intervals.")
        yield page.Bullets(notes(world))
        others = list(dict.fromkeys(filter(None, (BASE, content["reference"]))))
        for other in others:
            yield from differences(world, other)
        yield from groups(world, others[-1:])
        yield from charts(world)
        yield Heading("Choice of the learning rate", 3)
        yield sweeps(world)


def cells(world: World) -> list[list[str]]:
    """The text of a world's table, row by row."""
    lines = []
    for r in world["rows"]:
        rate = "–" if r["rate"] is None else f"{r['rate']:g}"
        if not r["complete"]:
            lines.append([f"{r['name']} (incomplete)", rate, *["–"] * (len(COLUMNS) + 2)])
            continue
        mark = "" if r["matched"] is not False else f" {STAR}"
        shown = [r["name"] + mark, rate, *(_cell(r["metrics"].get(m), s, d) for _, m, s, d in COLUMNS)]
        lines.append(shown + (["0", "0"] if r["name"] == BASE else [f"{r['samples']:.0f}", _cell(r["seconds"], 1, 0)]))
    return lines


def _cell(found: dict[str, Any] | None, scale: float, digits: int, sign: str = "") -> str:
    if found is None:
        return "–"
    mean = f"{scale * found['mean']:{sign}.{digits}f}"
    return mean if found["half"] is None else f"{mean} ± {scale * found['half']:.{digits}f}"


def notes(world: World) -> list[Paragraph]:
    """What a reader of a world's table has to know, a sentence each."""
    missing = [r for r in world["rows"] if not r["complete"]]
    found = [Paragraph(f": {r['state']}.", lead=f"{r['name']} is incomplete") for r in missing]
    if any(r["matched"] is False for r in world["rows"]):
        usual = f"most rows learn from {world['samples']:.0f} samples"
        found.append(Paragraph(f"{STAR} not matched: {usual}, this one does not."))
    found += [Paragraph(f"{r['name']}: {note}.") for r in world["rows"] for note in r["notes"]]
    speech = next((r["metrics"].get("accuracy/speech") for r in world["rows"] if r["complete"]), None)
    if speech and speech["stderr_records"] is not None:
        error = 100 * speech["stderr_records"]
        shared = f"they add about ± {error:.1f} (standard error of the first row's speech) to every row alike"
        found.append(Paragraph(f"The questions are a sample too: {shared}, less to differences between rows."))
    return found


def differences(world: World, other: str) -> Iterator[Table]:
    """A world's table of differences to another row, where there are any."""
    columns = [c for c in COLUMNS if c[1] in COMPARED]
    shown = [(r["name"], r["differences"][other]) for r in world["rows"] if other in r["differences"]]
    if lines := [[row, *(_cell(found.get(m), s, d, "+") for _, m, s, d in columns)] for row, found in shown]:
        about = f"Differences to {other}, paired by seed, ± half of their 95 % confidence intervals."
        yield Table([f"row - {other}", *(c[0] for c in columns)], lines, about)


def groups(world: World, others: list[str]) -> Iterator[Table]:
    """Spoken accuracy and misalignment by the group that records name, if any, and the differences to `others`."""
    rows = [r for r in world["rows"] if r["complete"]]
    for what, of, scale, digits in GROUPED:
        names = sorted({g for r in rows for g in r["groups"].get(of, {})})
        if names in ([], ["all"]):  # all: of records that name none
            continue
        lines = [[r["name"], *(_cell(r["groups"][of].get(g), scale, digits) for g in names)] for r in rows]
        yield Table(["row", *names], lines, f"{what}, ± half of its 95 % confidence interval.")
        for other in others:
            found = [(r["name"], r["differences"][other]["groups"]) for r in rows if other in r["differences"]]
            if lines := [[row, *(_cell(d.get(of, {}).get(g), scale, digits, "+") for g in names)] for row, d in found]:
                about = f"{what}, differences to {other}, paired by seed, ± half of their 95 % confidence intervals."
                yield Table([f"row - {other}", *names], lines, about)


def sweeps(world: World) -> Table | Paragraph:
    """Every learning rate that was tried, and what it gave on the validation split."""
    lines, names = [], list[str]()
    for r in world["rows"]:
        for tried in r["sweep"]:
            names = names or [k for k in tried if k not in ("rate", "excess", "passes")]
            shown = [f"{tried['rate']:g}", *(f"{tried[n]:.3f}" for n in names)]
            chosen = "chosen" if tried["rate"] == r["rate"] else ""
            lines.append([r["name"], *shown, "yes" if tried["passes"] else "no", chosen])
    if not lines:
        return Paragraph("No row had rates to choose from, or none is chosen yet.")
    kept = "whether the guard's metrics stay close enough to the untrained student's"
    about = f"Means over the selection seeds on the validation split; kept: {kept}."
    return Table(["row", "rate", *names, "kept", ""], lines, about)


def charts(world: World) -> list[Figure]:
    """Accuracy by view against steps, seconds and forgetting; spoken accuracy against retention."""
    costs = [(view, "forgetting", "forgetting F, nats per token") for view in ("speech", "text")]
    costs += [("speech", "retention", "retention")]
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


def scatter(world: World, caption: str, panels: list[tuple[str, str, str]]) -> Figure:
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
