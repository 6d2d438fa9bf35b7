"""The command `opd compare`: run folders and evaluations side by side. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd.evaluate import page
from opd.evaluate.records import RECORDS, SETTINGS, differing, read_records, stored
from opd.evaluate.results import METRICS, Record, Term, metrics, sampled, term
from opd.report.runs import read_run, section
from opd.scoring.statistics import LEVEL, Estimate
from opd.settings import UserError
from opd.storage.json_lines import finite, write_atomic
from opd.storage.metrics import EVAL_METRICS

RESAMPLES = 10_000
BLOCK = 4_000_000  # counts of questions in memory at a time
# settings of a recipe that say how an evaluation measures, not what; in its own settings without the section
MEASURED = ("eval.match", "eval.tolerance", "eval.judge", "rollout.max_tokens", "data.max_audio_seconds")


@dataclass
class Column:
    """One folder of a comparison."""

    name: str
    folder: Path
    metrics: dict[str, Estimate]
    records: dict[tuple[str, str, str], Record] = field(default_factory=dict)  # of an evaluation, by what is asked
    measured_on: dict[str, Any] = field(default_factory=dict)  # of a run: which records
    how: dict[str, Any] = field(default_factory=dict)  # it was measured: settings by their names in MEASURED


def main(folders: list[Path], out: Path | None, common: bool, seed: int = 0, unlike: bool = False) -> int:
    """Print the table, and write it to `out`/compare.html and compare.json where that is given."""
    if seed < 0:
        raise UserError(f"--seed: expected 0 or more, found {seed}")
    content = compare(folders, common, seed, unlike)
    print(page.compare_text(content))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / "compare.json", json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")
            write_atomic(out / "compare.html", page.compare_page(content))
        except OSError as e:
            raise UserError(f"--out {out}: cannot write there ({e.strerror}); name another folder") from e
        for name in ("compare.json", "compare.html"):
            print(f"wrote {out / name}")
    return 0


def compare(folders: list[Path], common: bool = False, seed: int = 0, unlike: bool = False) -> dict[str, Any]:
    """Columns with their metrics, and the differences of every later evaluation to the first folder, if it is one.

    Raises UserError for a folder that is neither a run nor an evaluation; for evaluations, or runs, that were measured
    otherwise than the first of them, unless `unlike` notes it; and for evaluations of other records than the first's,
    unless `common` restricts all to those that they share.
    """
    if len({f.resolve() for f in folders}) < max(2, len(folders)):
        raise UserError("opd compare: expected two or more different folders")
    paths = [Path(os.path.abspath(f)).parts for f in folders]  # their last names, as many as tell each apart
    depth = next(d for d in range(1, max(map(len, paths)) + 1) if len({p[-d:] for p in paths}) == len(paths))
    columns = [_read(f, "/".join(p[-depth:]).replace("//", "/")) for f, p in zip(folders, paths, strict=True)]
    evaluations = [c for c in columns if c.records]
    runs = [c for c in columns if not c.records]
    notes = [note for kind in (evaluations, runs) for note in _measured_alike(kind, unlike)]
    if len(evaluations) > 1:
        notes += _same_records(evaluations, common)
    if len({json.dumps(c.measured_on, sort_keys=True, default=str) for c in runs}) > 1:
        notes.append("The runs were measured on other records than one another: their columns do not compare.")
    if runs and evaluations:
        notes.append("Between runs and evaluations no difference is tested: what a run measured is not kept by record.")
    first = columns[0]
    differences = {c.name: _differences(first, c, seed) for c in evaluations[1:] if first.records}
    if first.records:
        how = f"paired bootstrap over questions, {RESAMPLES} resamples, seed {seed}, with 95 % intervals"
        notes.append(f"Differences to {first.name}: {how}; p is two-sided and of each difference by itself.")
    return {
        "columns": [{"name": c.name, "folder": str(c.folder), "metrics": c.metrics} for c in columns],
        "names": [n for name in EVAL_METRICS for n in (name, sampled(name)) if any(n in c.metrics for c in columns)],
        "differences": differences,
        "notes": notes,
    }


def _read(folder: Path, name: str) -> Column:
    if (folder / RECORDS).is_file():
        records = read_records(folder)
        if (settings := stored(folder)) is None:
            raise UserError(f"{folder}: expected {SETTINGS} of an evaluation beside {RECORDS}, found none")
        how = {k: settings.get(k.partition(".")[2]) for k in MEASURED} | {"version": settings.get("version")}
        return Column(name, folder, metrics(records), {(r["part"], r["id"], r["record"]): r for r in records}, how=how)
    if not (folder / "config.yaml").is_file():
        wanted = f"a run (config.yaml) or a finished evaluation ({RECORDS})"
        there = "neither" if folder.exists() else "nothing"
        raise UserError(f"{folder}: expected the folder of {wanted}, found {there}")
    run = read_run(folder, name)
    if not run.evaluations:
        raise UserError(f"{folder}: {run.state}; it has no evaluation to compare")
    last = run.evaluations[-1]
    found = {n: last[n] for n in EVAL_METRICS if last.get(n)}
    how = {f"{a}.{b}": section(run.config, a).get(b) for a, b in (k.split(".") for k in MEASURED)}
    return Column(name, folder, found, measured_on=run.records, how=how)


def _measured_alike(columns: list[Column], unlike: bool) -> list[str]:
    """Refuse columns that were measured otherwise than the first; when `unlike`, notes that say in what."""
    notes = []
    for c in columns[1:]:
        if other := differing(columns[0].how, c.how):
            told = "; ".join(f"{k} {old} and {new}" for k, (old, new) in other.items())
            told = f"were measured under other settings: {told}"
            if not unlike:
                remedy = "measure both alike, or take --unlike, which compares them all the same"
                raise UserError(f"{columns[0].folder} and {c.folder} {told}; {remedy}")
            notes.append(f"{columns[0].name} and {c.name} {told}.")
    return notes


def _same_records(evaluations: list[Column], common: bool) -> list[str]:
    """Restrict evaluations to what they share, when `common`; refuse where they differ, when not."""
    first = evaluations[0]
    shared = set.intersection(*(set(c.records) for c in evaluations))
    for c in evaluations:
        if set(c.records) != set(first.records) and not common:
            same = len(set(c.records) & set(first.records))
            told = f"{len(c.records)} records, {len(first.records)} in {first.folder}, of which {same} are the same"
            remedy = "evaluate the same manifest, or take --common, which restricts all to what they share"
            raise UserError(f"{c.folder}: {told}; {remedy}")
    if not shared:
        raise UserError(f"{first.folder}: shares no record with all others: there is nothing to compare")
    if all(len(shared) == len(c.records) for c in evaluations):
        return []
    told = ", ".join(f"{c.name} of {len(c.records)}" for c in evaluations)
    for c in evaluations:
        c.records = {k: r for k, r in c.records.items() if k in shared}
        c.metrics = metrics(list(c.records.values()))
    return [f"Restricted to the {len(shared)} records that the evaluations share: {told}."]


def _differences(first: Column, other: Column, seed: int) -> dict[str, Any]:
    out = {}
    for name in METRICS:
        pairs = [
            (a, b, r["question"])
            for key, r in first.records.items()
            if (a := term(name, r)) is not None and (b := term(name, other.records[key])) is not None
        ]
        ours, theirs, asked = zip(*pairs, strict=True) if pairs else ((), (), ())
        if pairs and (found := paired(name, ours, theirs, asked, seed)):
            out[name] = found
    return out


def paired(
    name: str, first: Sequence[Term], other: Sequence[Term], asked: Sequence[str], seed: int = 0, n: int = RESAMPLES
) -> dict[str, Any] | None:
    """Paired bootstrap over questions (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

    Difference other - first of a metric over the same records, whose terms these are, with interval and p.
    Whole questions, all their recordings together, are drawn with replacement, the same for both. The interval is of
    percentiles, LEVEL of the resamples; p = 2 min(share of resamples with a difference <= 0, with one >= 0), each
    counted with one more resample that has it, at most 1. Resamples in which a denominator is 0 are left out.

    Returns {"difference", "low", "high", "p", "records", "questions"}; None where the metric has no value.
    """
    index = {q: i for i, q in enumerate(dict.fromkeys(asked))}
    sums, g = np.zeros((len(index), 4)), len(index)
    np.add.at(sums, [index[q] for q in asked], np.hstack([first, other]))
    whole = _ratios(name, sums.sum(0)[None])
    if not len(whole):
        return None
    rng, block = np.random.default_rng(seed), max(1, BLOCK // g)
    sizes = [min(block, n - start) for start in range(0, n, block)]
    found = np.concatenate([_ratios(name, rng.multinomial(g, np.full(g, 1 / g), size) @ sums) for size in sizes])
    tail = 100 * (1 - LEVEL) / 2
    sides = [(np.sum(side) + 1) / (len(found) + 1) for side in (found <= 0, found >= 0)]
    low, high, p = (*np.percentile(found, [tail, 100 - tail]), min(1.0, 2 * min(sides))) if g > 1 else [np.nan] * 3
    about = {"records": len(asked), "questions": g}
    return {"difference": float(whole[0]), "low": float(low), "high": float(high), "p": float(p)} | about


def _ratios(name: str, totals: np.ndarray) -> np.ndarray:
    """[n] differences of totals [n, 4], those with a denominator of 0 left out."""
    kept = totals[(totals[:, 1] != 0) & (totals[:, 3] != 0)]
    ratios = kept[:, 2] / kept[:, 3] - kept[:, 0] / kept[:, 1]
    return -100.0 * ratios if name.startswith("drop/") else ratios
