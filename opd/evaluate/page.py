"""What `opd eval`, `opd compare` and `opd benchmark` show: tables, and pages that load nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from opd.report.blocks import Block, Details, Heading, Paragraph, Table, document
from opd.scoring.statistics import Estimate

KINDS = {"drop": "drop below the teacher", "reverse_kl": "reverse KL"}  # of metrics; others are titles as they are
KINDS |= {"misalignment": "misalignment M", "forgetting": "forgetting F"}
ASKED = {"speech": ", spoken", "text": ", typed", "teacher": ", teacher typed"}
RULE = "by the rule"
UNITS = "Accuracy and retention in %, drops in % of the teacher's, divergences in nats per token, lengths in tokens."
ERRORS = "± is one standard error over questions: recordings of one question count as one."
SAMPLED = (
    "M, F and reverse KL are estimates from one sampled response a record, not from gold responses: they do not "
    "compare with those of a training run."
)


def title(metric: str) -> str:
    """A metric's name for readers."""
    plain = metric.removesuffix("/sampled")
    kind, _, view = plain.partition("/")
    return KINDS.get(kind, kind) + ASKED.get(view, "") + " (sampled)" * (metric != plain)


def number(metric: str, value: float | None, sign: bool = False) -> str:
    """A metric's value, or a difference of two; n/a for none."""
    if value is None or value != value:
        return "n/a"
    scale = 100.0 if metric.startswith(("accuracy/", "retention")) else 1.0
    digits = 1 if scale > 1 or metric.startswith(("drop/", "length/")) else 3
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def cell(metric: str, e: Estimate | None) -> str:
    """A metric with its standard error."""
    if not e or e.get("mean") is None:
        return "–"
    return f"{number(metric, e['mean'])} ± {number(metric, e.get('stderr'))}"


def against(metric: str, d: dict[str, Any] | None) -> str:
    """A difference with its interval and p."""
    if d is None:
        return "–"
    mean, low, high = (number(metric, d[k], True) for k in ("difference", "low", "high"))
    p = d["p"]  # of 10,000 resamples none below 2e-4 can come
    shown = "n/a" if p != p else f"{p:.{4 if p < 0.01 else 2}f}"
    return f"{mean} [{low}, {high}], p {shown}"


def eval_text(content: dict[str, Any]) -> str:
    """The metrics and the tables by group, for a terminal."""
    metrics, *others = _eval_tables(content)
    rules = [f"\n{_columns(table)}\n" for table in others if table.heads[0] == RULE]
    groups = [f"\n{_columns(table)}" for table in others if table.heads[0] != RULE]
    return "\n".join([_columns(metrics), *rules, *notes(content), *groups])


def eval_page(content: dict[str, Any]) -> str:
    """One HTML document from the content of eval.json."""
    models = content["settings"]
    who = ", ".join(f"{k} {models[k]['path']}" for k in ("student", "teacher") if k in models)
    metrics, *tables = _eval_tables(content)
    blocks: list[Block] = [Heading("opd eval", 1), Paragraph(who), metrics]
    for table in tables:
        blocks += [Heading(table.heads[0].capitalize()), table]
    shown = content["examples"]
    rows = [[e["id"], e["question"], e["answer"] or "–", e["speech"], e["text"]] for e in shown]
    about = f"{len(shown)} of {content['failures']}, in turn from every group."
    examples = Table(["record", "question", "expected", "speech view", "text view"], rows, about, "text")
    blocks += [Heading("Wrong in the speech view, right in the text view"), examples if shown else Paragraph("None.")]
    settings = {k: content[k] for k in ("settings", "versions", "git_commit", "counts") if k in content}
    return document("opd eval", [*blocks, Details("settings", [json.dumps(settings, indent=2)])], "wide")


def _eval_tables(content: dict[str, Any]) -> list[Table]:
    """The metrics, further numbers of the rules by view where there are any, and the metrics by each field."""
    rows = [[title(n), cell(n, e), str(e.get("n", ""))] for n, e in content["metrics"].items()]
    tables = [Table(["", "value", "records"], rows, " ".join(notes(content)))]
    if parts := content["parts"]:
        views = list(dict.fromkeys(view for by in parts.values() for view in by))
        rows = [[name, *(cell("", by.get(view)) for view in views)] for name, by in parts.items()]
        tables.append(Table([RULE, *views], rows, ERRORS))
    for field, groups in content["groups"].items():
        names = list(dict.fromkeys(n for m in groups.values() for n in m))
        rows = []
        for group, m in groups.items():
            count = next((e["n"] for e in m.values() if e.get("n") is not None), 0)
            rows.append([group, *(cell(n, m.get(n)) for n in names), str(count)])
        tables.append(Table([f"by {field}", *map(title, names), "records"], rows, ERRORS))
    return tables


def notes(content: dict[str, Any]) -> list[str]:
    """What a reader has to know of how the numbers came about."""
    c, found = content["counts"], [UNITS, ERRORS]
    if any(n.endswith("/sampled") for n in content["metrics"]):
        found.append(SAMPLED)
    for name, n in c["left_out"].items():
        found.append(f"{title(name)}: {n} records left out, whose response the server reads as other tokens.")
    if c["nonsense"]:
        found.append(f"{c['nonsense']} answers count as wrong because the judge's verdict made no sense.")
    if c["truncated"]:
        told = ", ".join(f"{n} {view}" for view, n in c["truncated"].items())
        found.append(f"Cut off at rollout.max_tokens, and so wrong: {told}.")
    return found


def compare_text(content: dict[str, Any]) -> str:
    """The table of all metrics and the differences to the first folder, for a terminal."""
    metrics, *differences = _compare_tables(content)
    short = [Table(t.heads[:3], [row[:3] for row in t.rows]) for t in differences]  # the page has questions too
    return "\n".join(["\n\n".join(map(_columns, [metrics, *short])), UNITS, ERRORS, *content["notes"]])


def compare_page(content: dict[str, Any]) -> str:
    """One HTML document from the content of compare.json."""
    metrics, *differences = _compare_tables(content)
    blocks: list[Block] = [Heading("opd compare", 1), metrics]
    for table in differences:
        blocks += [Heading(table.heads[0]), table]
    folders = Table(["", "folder"], [[c["name"], c["folder"]] for c in content["columns"]], kind="text")
    return document("opd compare", [*blocks, folders], "wide")


def _compare_tables(content: dict[str, Any]) -> list[Table]:
    """All metrics side by side, and for each folder but the first its differences to that."""
    cols, names = content["columns"], content["names"]
    rows = [[title(n), *(cell(n, c["metrics"].get(n)) for c in cols)] for n in names]
    tables = [Table(["", *(c["name"] for c in cols)], rows, " ".join([UNITS, ERRORS, *content["notes"]]))]
    for name, found in content["differences"].items():
        shown = [(n, found[n]) for n in names if n in found]
        rows = [[title(n), against(n, d), str(d["records"]), str(d["questions"])] for n, d in shown]
        tables.append(Table([f"{name} - {cols[0]['name']}", "difference, 95 % interval", "records", "questions"], rows))
    return tables


def benchmark_text(content: dict[str, Any]) -> str:
    """The table of benchmark.json and its notes, for a terminal."""
    rows = []
    for r in content["results"]:
        error = "" if r["stderr"] is None else f" ± {r['stderr']:.3f}"
        counts = [str(r[k]) for k in ("n", "guessed", "cut_off")]
        rows.append([r["task"], r["metric"], f"{r['value']:.3f}{error}", *counts])
    heads = ["task", "metric", "value", "records", "guessed", "cut off"]
    return "\n".join([_columns(Table(heads, rows), str.ljust), *content["notes"]])


def _columns(table: Table, aligned: Callable[[str, int], str] = str.rjust) -> str:
    """A table in aligned columns, the first to the left."""
    rows = [table.heads, *table.rows]
    widths = [max(map(len, some)) for some in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(aligned, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
