"""What lmms-eval found, as one table: metric, value, standard error, and what to know before believing it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import Any

NEEDS = {"pedant_score": "qa_metrics"}  # metric -> package without which lmms-eval gives 0
ONE_RECORD = ("score", "overall")  # a record's value, where it is a mapping


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task and metric of the results of `lmms_eval.evaluator.simple_evaluate`."""
    out = []
    for task in sorted(found["configs"]):
        for key, value in found["results"][task].items():
            metric, _, filtered = key.partition(",")
            if not filtered or "_stderr" in metric or not isinstance(value, int | float):
                continue
            if metric in NEEDS and find_spec(NEEDS[metric]) is None:
                continue
            records = [_value(s.get(metric)) for s in found["samples"][task]]
            out.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": float(value),
                    "stderr": stderr(float(value), records),
                    "n": len(records),
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "version": found["versions"].get(task),
                }
            )
    return out


def left_out(found: dict[str, Any]) -> list[str]:
    """Metrics that lmms-eval gave as 0 for want of a package."""
    given = {k.partition(",")[0] for task in found["configs"] for k in found["results"][task]}
    return [f"{m} is left out: it needs {p}" for m, p in NEEDS.items() if m in given and find_spec(p) is None]


def stderr(value: float, records: list[float | None]) -> float | None:
    """Standard error of a metric that is the mean of its records, or 100 times that; None for any other.

    lmms-eval's own is that of the records also where the metric is in percent.
    """
    known = [x for x in records if x is not None]
    if len(known) < 2 or len(known) < len(records):
        return None
    for scale in (1.0, 100.0):
        if math.isclose(scale * fmean(known), value, rel_tol=1e-4, abs_tol=1e-4):
            return scale * stdev(known) / math.sqrt(len(known))
    return None


def _value(x: Any) -> float | None:
    if isinstance(x, Mapping):
        x = next((x[k] for k in ONE_RECORD if k in x), None)
    return float(x) if isinstance(x, int | float) else None


def datasets_of(loaded: Mapping[str, Any]) -> dict[str, str]:
    """Data set and revision of each task, as `datasets` loaded it."""
    out = {}
    for name, task in loaded.items():
        split = task.config.test_split or task.config.validation_split
        sources = task.dataset[split].info.download_checksums or {}
        revisions = {u.partition("@")[2].partition("/")[0] for u in sources if u.startswith("hf://")}
        config = f"/{task.config.dataset_name}" if task.config.dataset_name else ""
        out[name] = f"{task.config.dataset_path}{config}" + "".join(f"@{r}" for r in sorted(revisions) if r)
    return out


def text(content: dict[str, Any]) -> str:
    """The table and its notes, for a terminal."""
    lines = [["task", "metric", "value", "records", "guessed", "cut off"]]
    for r in content["results"]:
        error = "" if r["stderr"] is None else f" ± {r['stderr']:.3f}"
        counts = [str(r[k]) for k in ("n", "guessed", "cut_off")]
        lines.append([r["task"], r["metric"], f"{r['value']:.3f}{error}", *counts])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, *content["notes"]])
