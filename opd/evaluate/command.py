"""The command `opd eval`: servers up, records measured, tables written. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from opd.config.schema import Config
from opd.evaluate import page, records, results
from opd.evaluate.records import Item, fields
from opd.processes.with_servers import ask
from opd.settings import RunFailed, UserError
from opd.storage import run_folder
from opd.storage.journal import Journal
from opd.storage.json_lines import write_atomic


def main(recipe: str, overrides: list[str], out: Path, teacher: bool = True, plain: bool = False) -> int:
    """Measure what is missing, then write the tables. 0: done; 128 + number: a signal ended it.

    Raises UserError for what the user can mend, and RunFailed for all else that ends a server or the measuring.
    """
    config = records.eval_config(recipe, overrides, out, teacher)
    began = time.monotonic()
    with run_folder.lock(out, of="--out", by="opd eval"):
        found = records.settings(config)
        items = records.read_items(config)
        prompts = [i.prompt for i in items if i.part == "test"]
        known = {"seconds"} | {f for p in prompts for f in (*fields(p), *p.numbers)}
        results.check_fields(config.eval.groups, config.eval.bins, known)
        records.claim(out, found)
        done = _measured(out, items)
        if missing := sum(i.key not in done for i in items):
            print(f"{missing} of {len(items)} records to measure", flush=True)
            given = {"recipe": recipe, "overrides": overrides, "teacher": teacher}
            if code := ask(config, "evaluation", "opd.evaluate.worker:run", given, plain):
                return code
        write(config, out, items, found, time.monotonic() - began)
    return 0


def _measured(out: Path, items: list[Item]) -> dict[str, dict[str, Any]]:
    """What is measured of the items, by key."""
    with closing(Journal(out / "measured", 0)) as journal:
        return {i.key: results.renamed(journal[i.key]["record"]) for i in items if i.key in journal}


def write(config: Config, out: Path, items: list[Item], found: dict[str, Any], seconds: float) -> None:
    """Write records.jsonl, eval.jsonl, eval.json and eval.html, and print the tables."""
    measured = _measured(out, items)
    if missing := [i.prompt.place for i in items if i.key not in measured]:
        raise RunFailed(f"{out}: {len(missing)} records are not measured, such as {missing[0]}; see {out}/logs")
    lines = [records.line(i, measured[i.key]) for i in items]
    about = yaml.safe_load((out / records.SETTINGS).read_text())
    content = {"settings": found, **{k: about[k] for k in ("versions", "git_commit")}}
    content |= summary(lines, config.eval.groups, config.eval.bins)
    evaluation = {"stage": "eval", "step": 0, "seconds": round(seconds, 1)}
    evaluation |= content["metrics"] | {k: content[k] for k in ("parts", "groups", "counts")}
    held = (out / records.RECORDS).read_bytes().count(b"\n") if (out / records.RECORDS).is_file() else 0
    if held > len(lines):
        print(f"{out}: told of {held} records until now, of {len(lines)} from here; all that is measured is kept")
    try:
        records.write_records(out, lines)
        write_atomic(out / "eval.jsonl", json.dumps(evaluation, ensure_ascii=False) + "\n")
        write_atomic(out / "eval.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / "eval.html", page.eval_page(content))
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}; what is measured is kept, the same command goes on") from e
    print(page.eval_text(content))
    for name in ("records.jsonl", "eval.jsonl", "eval.json", "eval.html"):
        print(f"wrote {os.path.join(out, name)}")


def summary(lines: list[dict[str, Any]], named: list[str] | None, bins: dict[str, list[float]]) -> dict[str, Any]:
    """Metrics, counts, groups and examples of the lines of records.jsonl. Raises UserError for an unknown field."""
    return {
        "metrics": results.metrics(lines),
        "parts": results.parts(lines),
        "counts": results.counts(lines),
        "groups": results.groups(lines, named, bins),
        "failures": len(results.examples(lines, len(lines))),
        "examples": results.examples(lines),
    }
