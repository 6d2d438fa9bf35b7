"""Means over seeds with Student's t intervals, and paired differences. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

LEVEL = 0.95
Interval = dict[str, Any]  # mean, half (of the interval's width, None for one value), n


def interval(values: Sequence[float]) -> Interval:
    """Mean of n >= 1 values and half the width of its 95% confidence interval, t_{0.975, n-1} * s / sqrt(n)."""
    n = len(values)
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": fmean(values), "half": half, "n": n}


def paired(values: dict[int, float], others: dict[int, float]) -> Interval | None:
    """Interval of the difference values - others over the seeds that both have; None without such a seed."""
    shared = sorted(values.keys() & others.keys())
    return interval([values[s] - others[s] for s in shared]) if shared else None


def t_quantile(p: float, df: int) -> float:
    """The value that Student's t with df >= 1 degrees of freedom stays below with probability p, 0.5 <= p < 1."""
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"expected 0.5 <= p < 1 and df >= 1, found {p}, {df}")
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, df: int) -> float:
    """P(T <= t), t >= 0, for whole degrees of freedom: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4.

    With a = atan(t / sqrt(df)), P(|T| <= t) is, for even df, sin(a) * (1 + 1/2 cos²a + 1·3/(2·4) cos⁴a + ... up to
    cos^(df-2)); for odd df, 2/π * (a + sin(a) * (cos a + 2/3 cos³a + 2·4/(3·5) cos⁵a + ... up to cos^(df-2))).
    """
    angle = math.atan(t / math.sqrt(df))
    square = math.cos(angle) ** 2
    term, total = (1.0 if df % 2 == 0 else math.cos(angle)), 0.0
    for k in range(df % 2, df - 1, 2):
        total += term
        term *= square * (k + 1) / (k + 2)
    both = math.sin(angle) * total
    if df % 2:
        both = 2 / math.pi * (angle + both)
    return 0.5 + both / 2
