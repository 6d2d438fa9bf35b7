"""What counts as right, the drop below the teacher, and how ranks share the records."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd.evaluate import PAIRS, Evaluator, correct, decode, drop
from opd.models import family_of
from opd.types import Prompt


@pytest.mark.parametrize(
    ("match", "answer", "text", "truncated", "right"),
    [
        ("exact", "one two.", " one two. \n", False, True),
        ("exact", "one two.", "one two", False, False),
        ("exact", "one two.", "one two.", True, False),
        ("regex", r".*\beleven\.", "four times two is eight. three plus eight is eleven.", False, True),
        ("regex", r"\beleven\.", "is eleven.", False, False),  # all of the response must match
        ("regex", "a|b", "b", False, True),
        ("exact", None, "", False, False),
    ],
)
def test_correct(match, answer, text: str, truncated: bool, right: bool) -> None:
    assert correct(Prompt("p", (), answer=answer, match=match), text, truncated) is right


def test_drop_by_hand() -> None:
    # student 1 of 4, teacher 2 of 4: half of the teacher's. m = 1/2; residuals 1 - 1/2, 0 - 1/2, 0, 0;
    # sqrt(4/3 * 1/2) / 2
    found = drop([1, 0, 0, 0], [1, 1, 0, 0])
    assert found["mean"] == 50.0 and found["stderr"] == pytest.approx(100 * math.sqrt(2 / 3) / 2)
    assert drop([1, 1], [1, 1]) == {"mean": 0.0, "stderr": 0.0}
    assert drop([1, 0], [0, 0]) == {"mean": None, "stderr": None}
    assert drop([1, 1, 1], [1, 1, 0])["mean"] == pytest.approx(-50.0)  # better than the teacher


@pytest.mark.parametrize(("records", "world"), [(1, 2), (7, 2), (33, 2), (64, 3)])
def test_ranks_share_the_records_in_step(records: int, world: int) -> None:
    prompts = [Prompt(str(i), ()) for i in range(records)]
    chunks = []
    for rank in range(world):
        evaluator = SimpleNamespace(learner=SimpleNamespace(rank=rank, world=world))
        evaluator._mine = lambda p, size, e=evaluator: Evaluator._mine(e, p, size)
        mine = Evaluator._in_step(evaluator, prompts)
        assert all(0 < len(c) <= PAIRS for c in mine)
        chunks.append(mine)
    assert len({len(mine) for mine in chunks}) == 1  # a rank with fewer calls would leave the others waiting
    seen = [i for mine in chunks for chunk in mine for i, _ in chunk if i >= 0]
    assert sorted(seen) == list(range(records))


def test_decode_leaves_special_tokens_out() -> None:
    family = family_of(str(Path(__file__).parents[2] / "recipes/tiny/student"))
    ids = family.tokenizer("one two.", add_special_tokens=False).input_ids
    assert decode(family, (*ids, family.eos_ids[0])) == "one two."
