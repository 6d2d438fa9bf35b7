"""The gradient of a step is the same on one rank with one micro-batch and on two ranks with a micro-batch a sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_learner import ANSWERS, ROOT, STUDENT, WHOLE, Reference, config, make_learner
from two_ranks import CASES, one_gradient, rank_of_two, samples_of

from opd.models.base import family_of

pytestmark = pytest.mark.processes


def test_two_ranks_with_a_micro_batch_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    family = family_of(STUDENT)
    reference = Reference(family)
    logits = dict(zip(ANSWERS, reference.teacher_logits, strict=True))
    learner = make_learner(family, config())
    cases = []
    for case in CASES:
        samples = samples_of(reference, family, config(*case))
        cases.append((case, samples, *one_gradient(learner, case, WHOLE, samples, logits)))
    torch.save({"logits": logits, "cases": cases}, tmp_path / "work.pt")
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), 2)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for case, (metrics, want, error, largest) in zip(CASES, found, strict=True):
            assert largest > 1e-3 and error < 1e-6, case
            assert metrics.keys() == want.keys()
            for name in metrics.keys() - {"grad_norm"}:  # of a rank alone: DeepSpeed's is of all
                assert metrics[name] == pytest.approx(want[name], abs=1e-6), (case, name)
