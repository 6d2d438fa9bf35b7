"""What `opd eval` and `opd compare` show: tables of a terminal, and pages that load nothing from anywhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from opd.report.html import document, table, table_row
from opd.scoring.statistics import Estimate

TITLES = {
    "accuracy/speech": "accuracy, spoken",
    "accuracy/text": "accuracy, typed",
    "accuracy/teacher": "accuracy, teacher typed",
    "drop/speech": "drop below the teacher, spoken",
    "drop/text": "drop below the teacher, typed",
    "misalignment": "misalignment M",
    "forgetting": "forgetting F",
    "reverse_kl/speech": "reverse KL, spoken",
    "reverse_kl/text": "reverse KL, typed",
    "length/speech": "length, spoken",
    "length/text": "length, typed",
}
UNITS = "Accuracy and retention in %, drops in % of the teacher's, divergences in nats per token, lengths in tokens."
ERRORS = "± is one standard error over questions: recordings of one question count as one."
SAMPLED = (
    "M, F and reverse KL are estimates from one sampled response a record, not from gold responses: they do not "
    "compare with those of a training run."
)


def title(metric: str) -> str:
    """A metric's name for readers."""
    plain = metric.removesuffix("/sampled")
    return TITLES.get(plain, plain) + (" (sampled)" if metric != plain else "")


def number(metric: str, value: float | None, sign: bool = False) -> str:
    """A metric's value, or a difference of two; n/a for none."""
    if value is None or value != value:
        return "n/a"
    scale, digits = (100.0, 1) if _is_share(metric) else (1.0, 1 if metric.startswith(("drop/", "length/")) else 3)
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def cell(metric: str, e: Estimate | None) -> str:
    """A metric with its standard error."""
    if not e or e.get("mean") is None:
        return "–"
    return f"{number(metric, e['mean'])} ± {number(metric, e.get('stderr'))}"


def _is_share(metric: str) -> bool:
    return metric.startswith(("accuracy/", "retention"))


def against(metric: str, d: dict[str, Any] | None) -> str:
    """A difference with its interval and p."""
    if d is None:
        return "–"
    low, high = (number(metric, d[k], True) for k in ("low", "high"))
    return f"{number(metric, d['difference'], True)} [{low}, {high}], p {shown_p(d['p'])}"


def shown_p(p: float) -> str:
    """Of 10,000 resamples no p below 2e-4 can come."""
    return "n/a" if p != p else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


# ---- opd eval -------------------------------------------------------------------------------------------------------


def eval_text(content: dict[str, Any]) -> str:
    """The metrics and the tables by group, for a terminal."""
    rows = [[title(n), cell(n, e), str(e.get("n", ""))] for n, e in content["metrics"].items()]
    parts = [columns([["", "value", "records"], *rows])]
    if content["parts"]:
        parts += ["", columns([["by the rule", *_views(content)], *_parts(content)]), ""]
    parts += notes(content)
    for field, groups in content["groups"].items():
        names = _names(groups)
        lines = [[group, *(cell(n, m.get(n)) for n in names), _count(m)] for group, m in groups.items()]
        parts += ["", columns([[f"by {field}", *map(title, names), "records"], *lines])]
    return "\n".join(parts)


def _views(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(view for by in content["parts"].values() for view in by))


def _parts(content: dict[str, Any]) -> list[list[str]]:
    """Further numbers of the rules, a row each, by view."""
    views = _views(content)
    return [[name, *(cell("", by.get(view)) for view in views)] for name, by in content["parts"].items()]


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


def eval_page(content: dict[str, Any]) -> str:
    """One HTML document from the content of eval.json."""
    models = content["settings"]
    who = ", ".join(f"{k} {models[k]['path']}" for k in ("student", "teacher") if k in models)
    rows = [table_row(title(n), [cell(n, e), str(e.get("n", ""))]) for n, e in content["metrics"].items()]
    body = [f"<h1>opd eval</h1><p>{escape(who)}</p>", table(["", "value", "records"], rows, " ".join(notes(content)))]
    if content["parts"]:
        lines = [table_row(name, cells) for name, *cells in _parts(content)]
        body += ["<h2>By the rule that graded</h2>", table(["", *_views(content)], lines, ERRORS)]
    for field, groups in content["groups"].items():
        names = _names(groups)
        lines = [table_row(g, [*(cell(n, m.get(n)) for n in names), _count(m)]) for g, m in groups.items()]
        body += [f"<h2>By {escape(field)}</h2>", table([field, *map(title, names), "records"], lines, ERRORS)]
    body += ["<h2>Wrong when heard, right when read</h2>", _examples(content)]
    about = {k: content[k] for k in ("settings", "versions", "git_commit", "counts") if k in content}
    body.append(f"<details><summary>settings</summary><pre>{escape(json.dumps(about, indent=2))}</pre></details>")
    return _document("opd eval", body)


def _names(groups: dict[str, dict[str, Estimate]]) -> list[str]:
    return list(dict.fromkeys(n for m in groups.values() for n in m))


def _count(m: dict[str, Estimate]) -> str:
    return str(next((e["n"] for e in m.values() if e.get("n") is not None), 0))


def _examples(content: dict[str, Any]) -> str:
    shown, count = content["examples"], content["failures"]
    if not shown:
        return "<p>None.</p>"
    heads = ["record", "question", "expected", "heard", "read"]
    rows = [table_row(e["id"], [e["question"], e["answer"] or "–", e["speech"], e["text"]]) for e in shown]
    return table(heads, rows, f"{len(shown)} of {count}, in turn from every group.", "text")


# ---- opd compare ----------------------------------------------------------------------------------------------------


def compare_text(content: dict[str, Any]) -> str:
    """The table of all metrics and the differences to the first folder, for a terminal."""
    cols, names = content["columns"], content["names"]
    rows = [[title(n), *(cell(n, c["metrics"].get(n)) for c in cols)] for n in names]
    parts = [columns([["", *(c["name"] for c in cols)], *rows])]
    for name, found in content["differences"].items():
        lines = [[title(n), against(n, found[n]), str(found[n]["records"])] for n in names if n in found]
        parts += ["", columns([[f"{name} - {cols[0]['name']}", "difference, 95 % interval", "records"], *lines])]
    return "\n".join([*parts, UNITS, ERRORS, *content["notes"]])


def compare_page(content: dict[str, Any]) -> str:
    """One HTML document from the content of compare.json."""
    cols, names = content["columns"], content["names"]
    rows = [table_row(title(n), [cell(n, c["metrics"].get(n)) for c in cols]) for n in names]
    about = " ".join([UNITS, ERRORS, *content["notes"]])
    body = ["<h1>opd compare</h1>", table(["", *(c["name"] for c in cols)], rows, about)]
    for name, found in content["differences"].items():
        shown = [(n, found[n]) for n in names if n in found]
        lines = [table_row(title(n), [against(n, d), str(d["records"]), str(d["questions"])]) for n, d in shown]
        body.append(f"<h2>{escape(name)} − {escape(cols[0]['name'])}</h2>")
        body.append(table(["", "difference [95 % interval], p", "records", "questions"], lines, ""))
    folders = [table_row(c["name"], [c["folder"]]) for c in cols]
    return _document("opd compare", [*body, table(["", "folder"], folders, "", "text")])


def columns(rows: list[list[str]]) -> str:
    """Rows of cells in aligned columns, the first to the left."""
    widths = [max(map(len, some)) for some in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _document(name: str, body: list[str]) -> str:
    return document(name, "".join(body), " body { max-width: 80rem; }")
