"""What `opd families --check` makes of what it measured. It runs all eight in `make test-families`."""

from __future__ import annotations

from typing import Any

from opd.doctor.families import PUSHES, TOLERANCES, judge


def test_every_part_is_pushed() -> None:
    assert PUSHES == {"llm": ["llm"], "llm+adapter": ["llm", "adapter"], "all": ["llm", "adapter", "tower"]}


def test_what_does_not_hold_is_named() -> None:
    good: dict[str, Any] = {
        "parity": 1e-6,
        "zero3": 0.0,
        "LoRA checkpoint": 1e-6,
        "checkpoint": 1e-5,
        "X-OPD": 1e-6,
        "push": {name: [3.0, 1e-6] for name in (*PUSHES, "LoRA")},
        "mixed": 0.5,
    }
    assert judge(good) == []
    for name in TOLERANCES:
        assert judge(good | {name: 2e-4}) == [f"{name}: 2.0e-04, at most 0.0001 expected"]
        assert judge(good | {name: float("nan")}) == [f"{name}: nan, at most 0.0001 expected"]
    assert judge(good | {"push": good["push"] | {"llm": [3.0, 0.5]}}) == [
        "push of llm: 5.0e-01 afterwards, at most 0.0001 expected"
    ]
    (fault,) = judge(good | {"push": good["push"] | {"llm": [1e-3, 1e-6]}})
    assert fault.startswith("push of llm: only 1.0e-03 when it is left out")
    assert judge({"error": "vLLM does not serve it"}) == ["vLLM does not serve it"]
    assert judge(good | {"mixed": float("nan")}) == ["ranks of speech only and text only: a loss of nan"]
    for name in good:
        (fault,) = judge({n: v for n, v in good.items() if n != name})
        assert fault.startswith("not measured: ") and name in fault
