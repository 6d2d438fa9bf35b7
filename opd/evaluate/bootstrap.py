"""Paired bootstrap over questions (Efron and Tibshirani, An Introduction to the Bootstrap, 1993). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd.evaluate.results import Term
from opd.scoring.statistics import LEVEL

RESAMPLES = 10_000
BLOCK = 4_000_000  # counts of questions in memory at a time


def paired(
    name: str, first: Sequence[Term], other: Sequence[Term], asked: Sequence[str], seed: int = 0, n: int = RESAMPLES
) -> dict[str, Any] | None:
    """Difference other - first of a metric over the same records, whose terms these are, with interval and p.

    Whole questions, all their recordings together, are drawn with replacement, the same for both. The interval is of
    percentiles, LEVEL of the resamples; p = 2 min(share of resamples with a difference <= 0, with one >= 0), each
    counted with one more resample that has it, at most 1. Resamples in which a denominator is 0 are left out.

    Returns {"difference", "low", "high", "p", "records", "questions"}; None where the metric has no value.
    """
    index = {q: i for i, q in enumerate(dict.fromkeys(asked))}
    sums = np.zeros((len(index), 4))
    for a, b, q in zip(first, other, asked, strict=True):
        sums[index[q]] += (*a, *b)
    whole = _differences(name, sums.sum(0)[None])
    if not len(whole):
        return None
    rng, g = np.random.default_rng(seed), len(index)
    block = max(1, BLOCK // g)
    draws = [
        _differences(name, rng.multinomial(g, np.full(g, 1 / g), size=min(block, n - start)) @ sums)
        for start in range(0, n, block)
    ]
    found = np.concatenate(draws)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(found, [tail, 100 - tail]) if g > 1 else (float("nan"), float("nan"))
    sides = [(np.sum(found <= 0) + 1) / (len(found) + 1), (np.sum(found >= 0) + 1) / (len(found) + 1)]
    p = min(1.0, 2 * float(min(sides))) if g > 1 else float("nan")
    about = {"records": len(asked), "questions": g}
    return {"difference": float(whole[0]), "low": float(low), "high": float(high), "p": p} | about


def _differences(name: str, totals: np.ndarray) -> np.ndarray:
    """[n] differences of totals [n, 4], those with a denominator of 0 left out."""
    kept = totals[(totals[:, 1] != 0) & (totals[:, 3] != 0)]
    ratios = kept[:, 2] / kept[:, 3] - kept[:, 0] / kept[:, 1]
    return -100.0 * ratios if name.startswith("drop/") else ratios
