"""Numbers from the measured records: metrics, groups, examples. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from statistics import quantiles
from typing import Any

from opd.scoring.statistics import Estimate, drop, ratio_stderr
from opd.settings import UserError
from opd.storage.metrics import EVAL_METRICS

Record = dict[str, Any]
Term = tuple[float, float]  # numerator and denominator: a metric is a ratio of their sums
OF_LOGITS = ("misalignment", "forgetting", "reverse_kl/speech", "reverse_kl/text")  # in a run: of full logits
FEW = 12  # values of a field at most that is tabulated unasked
EXAMPLES = 20
WORSE = 0.5
NONE = "(none)"
VIEWS = ("speech", "text", "teacher")


def sampled(name: str) -> str:
    """Name of a divergence estimated along one sampled response a record, which is another number than a run's own."""
    return f"{name}/sampled"


DIVERGENCES = tuple(map(sampled, OF_LOGITS))
METRICS = tuple(sampled(n) if n in OF_LOGITS else n for n in EVAL_METRICS)  # of an evaluation by `opd eval`
GROUPED = (
    *("accuracy/speech", "accuracy/text", "accuracy/teacher", "drop/speech"),
    *(sampled("misalignment"), sampled("forgetting")),
)


def renamed(r: Record) -> Record:
    """A record of before, when its divergences had the names of a run's own, under the names of today."""
    return {sampled(k) if k in OF_LOGITS else k: v for k, v in r.items()}


def term(name: str, r: Record) -> Term | None:
    """What a record adds to a metric; None when the metric is not of it or was not measured.

    drop is 100 (1 - ratio) of its terms.
    """
    if (name == "retention") != (r["part"] == "retention"):
        return None
    views = r["views"]
    if name == "retention":
        return _score(views["speech"]), 1.0
    kind, _, view = name.partition("/")
    if kind == "drop":
        both = view in views and "teacher" in views
        return (_score(views[view]), _score(views["teacher"])) if both else None
    if kind in ("accuracy", "length"):
        if view not in views:
            return None
        return _score(views[view]) if kind == "accuracy" else float(views[view]["tokens"]), 1.0
    found = r.get(name)
    return (found["nats"], float(found["tokens"])) if found else None


def _score(answer: dict[str, Any]) -> float:
    """In [0, 1]; a bool where there is only right and wrong, None where a judge talked nonsense."""
    return float(answer["right"] or 0)


def parts(records: Sequence[Record]) -> dict[str, dict[str, Estimate]]:
    """Further numbers of the rules that graded the test records: name -> view -> ratio of sums."""
    found: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for r in records:
        for view, answer in r["views"].items() if r["part"] == "test" else ():
            for name, (top, bottom) in answer.get("parts", {}).items():
                found.setdefault(name, {}).setdefault(view, []).append((top, bottom, r["question"]))
    return {n: {v: ratio_stderr(*zip(*terms, strict=True)) for v, terms in by.items()} for n, by in found.items()}


def estimate(name: str, records: Sequence[Record]) -> Estimate | None:
    """A metric with its standard error over questions; None when no record has it."""
    found = [(t, r["question"]) for r in records if (t := term(name, r)) is not None]
    if not found:
        return None
    terms, asked = zip(*found, strict=True)
    tops, bottoms = zip(*terms, strict=True)
    if name.startswith("drop/"):
        return drop(tops, bottoms, asked) | {"n": len(found)}
    return ratio_stderr(tops, bottoms, asked)


def metrics(records: Sequence[Record], names: Sequence[str] = METRICS) -> dict[str, Estimate]:
    """All metrics that the records have, by the names of an evaluation."""
    return {n: e for n in names if (e := estimate(n, records)) is not None}


def counts(records: Sequence[Record]) -> dict[str, Any]:
    """What was left out, cut off, or judged with nonsense."""
    views = [(v, a) for r in records for v, a in r["views"].items()]
    return {
        "records": dict(Counter(r["part"] for r in records)),
        "left_out": dict(Counter(n for n in DIVERGENCES for r in records if n in r and r[n] is None)),
        "truncated": dict(Counter(w for w in VIEWS for v, a in views if v == w and a["truncated"])),
        "nonsense": sum(a["right"] is None for _, a in views),
    }


# ---- groups ---------------------------------------------------------------------------------------------------------


def groups(
    records: Sequence[Record], named: list[str] | None, bins: dict[str, list[float]]
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Field -> value or range of it -> metrics of the test records there.

    `named`: fields; None: all strings with 2 to FEW values, the numbers in `bins`, and the clips' seconds. Raises
    UserError for a field that no record has.
    """
    tests = [r for r in records if r["part"] == "test"]
    strings = {f: len({r["fields"].get(f) for r in tests}) for r in tests for f in r["fields"]}
    numbers = {f for r in tests for f in r["numbers"]}
    check_fields(named, bins, {*strings, *numbers})
    default = [f for f, n in strings.items() if 2 <= n <= FEW] + [f for f in ("seconds", *bins) if f in numbers]
    out = {}
    for field in dict.fromkeys(default if named is None else named):
        label = _ranges(field, tests, bins.get(field)) if field in numbers else _value(field)
        parts: dict[str, list[Record]] = {}
        for r in tests:
            parts.setdefault(label(r), []).append(r)
        order = sorted(parts, key=lambda k: (k == NONE, _start(k), k) if field in numbers else (k == NONE, 0.0, k))
        if len(order) > 1 or named is not None:
            out[field] = {k: metrics(parts[k], GROUPED) for k in order}
    return out


def check_fields(named: list[str] | None, bins: dict[str, list[float]], known: set[str]) -> None:
    """Raise UserError for a field that no record has."""
    if unknown := [f for f in [*(named or []), *bins] if f not in known]:
        there = ", ".join(sorted(known)) or "none"
        raise UserError(f"eval.groups, eval.bins: no record of eval.test has a field {unknown[0]!r}; they have {there}")


def _value(field: str) -> Callable[[Record], str]:
    return lambda r: r["fields"].get(field) or NONE


def _ranges(field: str, records: Sequence[Record], edges: list[float] | None) -> Callable[[Record], str]:
    """The range of a record's number, from one edge up to below the next; edges: quartiles where none are given."""
    values = [r["numbers"][field] for r in records if field in r["numbers"]]
    if edges is None:
        edges = [round(q, 2) for q in quantiles(values, n=4)] if len(values) > 1 else []
    cuts = sorted(set(edges))
    names = [f"{a:g} to {b:g}" for a, b in zip(cuts, cuts[1:], strict=False)]
    names = [f"below {cuts[0]:g}", *names, f"{cuts[-1]:g} and more"] if cuts else ["all"]

    def label(r: Record) -> str:
        return names[bisect_right(cuts, r["numbers"][field])] if field in r["numbers"] else NONE

    return label


def _start(name: str) -> float:
    first = name.split(" ")[0]
    return float("-inf") if first in ("below", "all", NONE) else float(first)


def examples(records: Sequence[Record], limit: int = EXAMPLES) -> list[dict[str, Any]]:
    """Test records whose question is answered right when read and wrong when heard, spread over the groups.

    Of scores between right and wrong: that are worse by WORSE or more when heard.
    """
    tests = [r for r in records if r["part"] == "test"]
    found = [r for r in tests if _score(r["views"]["text"]) - _score(r["views"]["speech"]) >= WORSE]
    by_group: dict[str, list[Record]] = {}
    for r in found:
        by_group.setdefault(r["fields"].get("group", ""), []).append(r)
    turns = [r for place in zip_longest(*(some for _, some in sorted(by_group.items()))) for r in place if r]
    keys = ("id", "question", "answer")
    return [{k: r[k] for k in keys} | {v: a["text"] for v, a in r["views"].items()} for r in turns[:limit]]


def failures(records: Sequence[Record]) -> int:
    """How many test records are answered right when read and wrong when heard."""
    return len(examples(records, len(records)))
