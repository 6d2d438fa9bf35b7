"""Means, ratios and drops with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95  # of every confidence interval
Estimate = dict[str, float | int | None]


def mean_stderr(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n) (s with n - 1 degrees of freedom); None where n is too small."""
    n = len(values)
    if n == 0:
        return {"mean": None, "stderr": None, "n": 0}
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else None
    return {"mean": mean, "stderr": None if variance is None else math.sqrt(variance / n), "n": n}


def ratio_stderr(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str] | None = None
) -> Estimate:
    """Ratio of sums m = sum(a) / sum(b) with its linearised standard error, one (a, b) per record:

    sqrt(g / (g - 1) * sum((a_i - m b_i)^2)) / sum(b) over g independent records. A mean per token whose tokens belong
    to records. Records of the same cluster, such as recordings of one question, are not independent: they are added
    up first, and g counts clusters. `n` counts records.
    """
    n = len(numerators)
    sums: dict[Any, tuple[float, float]] = {}
    for key, a, b in zip(clusters if clusters is not None else range(n), numerators, denominators, strict=True):
        before = sums.get(key, (0.0, 0.0))
        sums[key] = (before[0] + a, before[1] + b)
    total, g = sum(b for _, b in sums.values()), len(sums)
    if total == 0:
        return {"mean": None, "stderr": None, "n": n}
    m = sum(a for a, _ in sums.values()) / total
    if g < 2:
        return {"mean": m, "stderr": None, "n": n}
    squares = sum((a - m * b) ** 2 for a, b in sums.values())
    return {"mean": m, "stderr": math.sqrt(g / (g - 1) * squares) / total, "n": n}


def drop(right: Sequence[float], teacher: Sequence[float], asked: Sequence[str] | None = None) -> Estimate:
    """Mean relative drop below the teacher in percent, 100 * (1 - student / teacher), with its standard error.

    Both answered the same records: the delta method over paired records, clustered by what is `asked`.
    """
    ratio = ratio_stderr(right, teacher, asked)
    if ratio["mean"] is None:
        return {"mean": None, "stderr": None}
    stderr = ratio["stderr"]
    return {"mean": 100.0 * (1.0 - float(ratio["mean"])), "stderr": None if stderr is None else 100.0 * float(stderr)}
