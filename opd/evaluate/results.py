"""Numbers from the measured records: metrics, groups, examples. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
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
GROUPED = ("accuracy/speech", "accuracy/text", "accuracy/teacher", "drop/speech", *DIVERGENCES[:2])


def renamed(r: Record) -> Record:
    """A record of before, when its divergences had the names of a run's own, under the names of today."""
    return {sampled(k) if k in OF_LOGITS else k: v for k, v in r.items()}


def term(name: str, r: Record) -> Term | None:
    """What a record adds to a metric; None when the metric is not of it or was not measured.

    drop is 100 (1 - ratio) of its terms.
    """
    if (name == "retention") != (r["part"] == "retention"):
        return None
    kind, _, view = name.partition("/")
    answer, teacher = (r["views"].get(v) for v in (view or "speech", "teacher"))
    if kind == "drop":
        return (_score(answer), _score(teacher)) if answer and teacher else None
    if kind == "length":
        return (float(answer["tokens"]), 1.0) if answer else None
    if kind in ("accuracy", "retention"):
        return (_score(answer), 1.0) if answer else None
    found = r.get(name)
    return (found["nats"], float(found["tokens"])) if found else None


def _score(answer: dict[str, Any]) -> float:
    """In [0, 1]; a bool where there is only right and wrong, None where a judge talked nonsense."""
    return float(answer["right"] or 0)


def parts(records: Sequence[Record]) -> dict[str, dict[str, Estimate]]:
    """Further numbers of the rules that scored the test records: name -> view -> ratio of sums."""
    found: dict[str, dict[str, list[tuple[float, float, str]]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        for view, answer in r["views"].items() if r["part"] == "test" else ():
            for name, (top, bottom) in answer.get("parts", {}).items():
                found[name][view].append((top, bottom, r["question"]))
    return {n: {v: ratio_stderr(*zip(*terms, strict=True)) for v, terms in by.items()} for n, by in found.items()}


def metrics(records: Sequence[Record], names: Sequence[str] = METRICS) -> dict[str, Estimate]:
    """All metrics that the records have, with standard errors over questions, by the names of an evaluation."""
    out = {}
    for name in names:
        if found := [(*t, r["question"]) for r in records if (t := term(name, r)) is not None]:
            terms = zip(*found, strict=True)
            out[name] = drop(*terms) | {"n": len(found)} if name.startswith("drop/") else ratio_stderr(*terms)
    return out


def counts(records: Sequence[Record]) -> dict[str, Any]:
    """What was left out, cut off, or judged with nonsense."""
    views = [(v, a) for r in records for v, a in r["views"].items()]
    return {
        "records": dict(Counter(r["part"] for r in records)),
        "left_out": dict(Counter(n for n in DIVERGENCES for r in records if n in r and r[n] is None)),
        "truncated": dict(Counter(w for w in VIEWS for v, a in views if v == w and a["truncated"])),
        "nonsense": sum(a["right"] is None for _, a in views),
    }


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
        label = _range(field, tests, bins.get(field)) if field in numbers else partial(_value, field)
        parts: dict[str, list[Record]] = defaultdict(list)
        for r in sorted(tests, key=label):
            parts[label(r)[1]].append(r)
        if len(parts) > 1 or named is not None:
            out[field] = {k: metrics(some, GROUPED) for k, some in parts.items()}
    return out


def check_fields(named: list[str] | None, bins: dict[str, list[float]], known: set[str]) -> None:
    """Raise UserError for a field that no record has."""
    if unknown := [f for f in [*(named or []), *bins] if f not in known]:
        there = ", ".join(sorted(known)) or "none"
        raise UserError(f"eval.groups, eval.bins: no record of eval.test has a field {unknown[0]!r}; they have {there}")


def _value(field: str, r: Record) -> tuple[int, str]:
    """A record's value of a field, behind its place in the order of the values, where NONE is the last."""
    value = r["fields"].get(field) or NONE
    return int(value == NONE), value


def _range(field: str, records: Sequence[Record], edges: list[float] | None) -> Callable[[Record], tuple[int, str]]:
    """As `_value`, the range of a number, from one edge up to below the next; edges: quartiles where none are given."""
    values = [r["numbers"][field] for r in records if field in r["numbers"]]
    if edges is None:
        edges = [round(q, 2) for q in quantiles(values, n=4)] if len(values) > 1 else []
    cuts = sorted(set(edges))
    names = [f"{a:g} to {b:g}" for a, b in zip(cuts, cuts[1:], strict=False)]
    names = [f"below {cuts[0]:g}", *names, f"{cuts[-1]:g} and more"] if cuts else ["all"]

    def label(r: Record) -> tuple[int, str]:
        place = bisect_right(cuts, r["numbers"][field]) if field in r["numbers"] else len(names)
        return place, [*names, NONE][place]

    return label


def examples(records: Sequence[Record], limit: int = EXAMPLES) -> list[dict[str, Any]]:
    """Test records that are right in the text view and wrong in the speech view, spread over the groups.

    Of scores between right and wrong: that are worse by WORSE or more in the speech view.
    """
    by_group: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        if r["part"] == "test" and _score(r["views"]["text"]) - _score(r["views"]["speech"]) >= WORSE:
            by_group[r["fields"].get("group", "")].append(r)
    turns = [r for place in zip_longest(*(some for _, some in sorted(by_group.items()))) for r in place if r]
    keys = ("id", "question", "answer")
    return [{k: r[k] for k in keys} | {v: a["text"] for v, a in r["views"].items()} for r in turns[:limit]]
