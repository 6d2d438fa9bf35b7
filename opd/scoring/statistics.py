"""Means, ratios and drops with their standard errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95  # of every confidence interval
Estimate = dict[str, float | int | None]


def mean_stderr(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n) (s with n - 1 degrees of freedom); None where n is too small."""
    return ratio_stderr(values, [1.0] * len(values))


def ratio_stderr(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[str] | None = None
) -> Estimate:
    """Ratio of sums m = sum(a) / sum(b) with its linearised standard error, one (a, b) per record:

    sqrt(g / (g - 1) * sum((a_i - m b_i)^2)) / sum(b) over g independent records. A mean per token whose tokens belong
    to records. Records of the same cluster, such as recordings of one question, are not independent: they are added
    up first, and g counts clusters. `n` counts records.
    """
    n = len(numerators)
    tops: dict[Any, float] = defaultdict(float)
    bottoms: dict[Any, float] = defaultdict(float)
    for key, a, b in zip(clusters if clusters is not None else range(n), numerators, denominators, strict=True):
        tops[key] += a
        bottoms[key] += b
    total, g = sum(bottoms.values()), len(bottoms)
    if total == 0:
        return {"mean": None, "stderr": None, "n": n}
    m = sum(tops.values()) / total
    squares = sum((tops[key] - m * bottoms[key]) ** 2 for key in tops)
    return {"mean": m, "stderr": math.sqrt(g / (g - 1) * squares) / total if g > 1 else None, "n": n}


def drop(right: Sequence[float], teacher: Sequence[float], asked: Sequence[str] | None = None) -> Estimate:
    """Mean relative drop below the teacher in percent, 100 * (1 - student / teacher), with its standard error.

    Both answered the same records: the delta method over paired records, clustered by what is `asked`.
    """
    ratio = ratio_stderr(right, teacher, asked)
    mean, stderr = ratio["mean"], ratio["stderr"]
    percent = None if mean is None else 100.0 * (1.0 - mean)
    return {"mean": percent, "stderr": None if stderr is None else 100.0 * stderr}
