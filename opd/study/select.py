"""Which learning rate a row is reported with: the best on the validation split among those that forget little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from opd.config.evaluation import BETTER
from opd.settings import UserError
from opd.study.spec import SelectionSpec

Means = dict[str, float]
HAIR = 1e-9  # of tolerance: 0.96 - 0.94 is more than 0.02 in binary


@dataclass
class Choice:
    """A row's learning rate, and the whole sweep behind it."""

    rate: float
    sweep: list[dict[str, Any]] = field(default_factory=list)  # by rate: means over seeds, what the guard says
    notes: list[str] = field(default_factory=list)


def means(evaluations: list[dict[str, Any]], names: list[str], where: str) -> Means:
    """Mean of each metric over evaluations. Raises UserError when one was not measured."""
    found = {}
    for name in names:
        values = [(e.get(name) or {}).get("mean") for e in evaluations]
        known = [v for v in values if v is not None]
        if not values or len(known) < len(values):
            raise UserError(f"{where}: selection needs {name}, which its evaluations lack; see selection.set")
        found[name] = fmean(known)
    return found


def choose(spec: SelectionSpec, base: Means, sweep: dict[float, Means], failed: list[float]) -> Choice:
    """The rate with the best metric among those whose guarded metrics stay close enough to `base`.

    Where none does, the one whose worst excess over what the guard allows is least. Ties go to the smaller rate.
    `sweep`: means over the selection seeds by rate, without the rates that `failed`.
    """
    assert sweep
    lines = []
    for rate in sorted(sweep):
        excess = [BETTER[g] * (base[g] - sweep[rate][g]) - allowed for g, allowed in spec.guard.items()]
        worst = max(excess, default=0.0)
        lines.append({"rate": rate, **sweep[rate], "excess": worst, "passes": worst <= HAIR})
    passing = [line for line in lines if line["passes"]]
    notes = []
    if passing:
        best, tied = _best(passing, lambda line: BETTER[spec.metric] * line[spec.metric])
        on = spec.metric
    else:
        best, tied = _best(lines, lambda line: -line["excess"])
        on = "what they lose"
        allowed = ", ".join(f"{g} by {v:g}" for g, v in spec.guard.items())
        notes.append(f"no learning rate keeps what the guard asks ({allowed}): the one that loses least")
    if tied:
        equal = ", ".join(f"{line['rate']:g}" for line in [best, *tied])
        notes.append(f"the rates {equal} tie on {on}: the smallest of them is taken")
    rates = sorted([*sweep, *failed])
    if passing and len(rates) > 1 and best["rate"] in (rates[0], rates[-1]):
        notes.append(f"the chosen rate is the {'smallest' if best['rate'] == rates[0] else 'largest'} that was tried")
    if failed:
        notes.append(f"chosen without {', '.join(f'{r:g}' for r in sorted(failed))}, where a run failed")
    return Choice(best["rate"], lines, notes)


def _best(lines: list[dict[str, Any]], score: Callable[[dict[str, Any]], float]) -> tuple[dict[str, Any], list[Any]]:
    """The first of the lines with the highest score, and the others that have it too."""
    most = max(map(score, lines))
    first, *others = [line for line in lines if score(line) >= most - HAIR]
    return first, others
