"""A family from end to end on a small random checkpoint, as `opd families --check` does it for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.families import FAMILIES
from opd.family_check import PUSHES, TOLERANCES, describe, judge, prove


@pytest.mark.integration
def test_voxtral_agrees_with_vllm_before_and_after_pushes(tmp_path: Path) -> None:
    found = prove(FAMILIES["voxtral"], tmp_path)
    assert judge(found) == [], describe(found)
    assert TOLERANCES.keys() <= found.keys() and found["push"].keys() == {*PUSHES, "LoRA"}  # nothing was left out
    assert found["mixed"] == found["mixed"] and found["prompts"] == 20


def test_what_does_not_hold_is_named() -> None:
    good = {
        "parity": 1e-6,
        "zero3": 0.0,
        "LoRA checkpoint": 1e-6,
        "checkpoint": 1e-5,
        "X-OPD": 1e-6,
        "push": {"llm": [3.0, 1e-6]},
    }
    assert judge(good) == []
    for name in TOLERANCES:
        assert judge(good | {name: 2e-4}) == [f"{name}: 2.0e-04, at most 0.0001 expected"]
        assert judge(good | {name: float("nan")}) == [f"{name}: nan, at most 0.0001 expected"]
    assert judge(good | {"push": {"llm": [3.0, 0.5]}}) == ["push of llm: 5.0e-01 afterwards, at most 0.0001 expected"]
    (fault,) = judge(good | {"push": {"llm": [1e-3, 1e-6]}})
    assert fault.startswith("push of llm: only 1.0e-03 when it is left out")
    assert judge({"error": "vLLM does not serve it"}) == ["vLLM does not serve it"]
