"""A family from end to end on a small random checkpoint, as `opd families --check` does it for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd.doctor.families import PUSHES, TOLERANCES, describe, judge, prove
from opd.models.registry import FAMILIES


@pytest.mark.integration
def test_a_family_agrees_with_vllm_before_and_after_pushes(tmp_path: Path) -> None:
    """The one least like the tiny pair's, Qwen2-Audio, which all other tests run; `make test-families` has the rest."""
    found = prove(FAMILIES["voxtral"], tmp_path)
    assert judge(found) == [], describe(found)
    assert found["prompts"] == 6 * 2 * 2  # in two views, two answers each


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
