"""Run folders -> report.json and one self-contained report.html."""

from __future__ import annotations

import json
from pathlib import Path

from opd.report.pipelines import chain, summarise
from opd.report.runs import read_runs
from opd.settings import UserError
from opd.storage.json_lines import write_atomic


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Write `out`/report.json and `out`/report.html of one or more runs; returns their paths.

    Runs whose student is another given run are stages of one pipeline and follow it; others stand side by side.
    Raises UserError naming the file (and line) that cannot be read, or the folder that cannot be written to.
    """
    from opd.report.page import page

    read = read_runs(runs)
    if not any(r.steps or r.evaluations for r in read):
        states = "; ".join(f"{r.folder}: {r.state}" for r in read)
        raise UserError(f"nothing to report yet, neither a finished step nor an evaluation ({states})")
    pipelines = chain(read)
    report = summarise(pipelines)
    texts = {"report.json": json.dumps(report, indent=2, default=str), "report.html": page(pipelines, report)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
    except OSError as e:
        raise UserError(f"{out}: cannot write the report there ({e.strerror}); choose another --out") from e
    return [out / name for name in texts]
