"""A step of the learner against transformers, one answer at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from small_learner import (
    ANSWERS,
    CLIPS,
    ONE,
    WHOLE,
    XOPD,
    Reference,
    _at_root,
    assert_same_gradient,
    config,
    family,
    gradient,
    make_learner,
    one_step,
    reference,
)
from torch import Tensor

from opd.models.base import Family
from opd.models.lora import Piece
from opd.objectives.token_loss import Logits
from opd.train.batch import make_batch
from opd.train.learner import _groups, learning_rate
from opd.types import Sample

__all__ = ["_at_root", "family", "reference"]  # fixtures


@pytest.mark.parametrize("lam", [0, 0.5, 1])
@pytest.mark.parametrize("average", ["response", "token"])
def test_gradient_is_the_objectives_however_it_is_split(
    family: Family, reference: Reference, average: str, lam: float
) -> None:
    c = config(f"objective.lambda={float(lam)}", f"objective.average={average}", *XOPD)
    loss, want = reference.objective(c, lambda i: reference.xopd(c, i))
    whole: dict[str, Tensor] = {}
    counts = []
    for budget in (WHOLE, 90, ONE):
        c = c.changed({"train.micro_batch_tokens": budget})
        learner, batch, metrics = one_step(family, c, reference.samples(family, c))
        n = len(batch.micro_batches)
        counts.append(n)
        assert learner.engine.boundaries == [False] * (n - 1) + [True] and learner.engine.steps == n
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        got = gradient(learner)
        assert_same_gradient(got, want, 1e-5)
        whole = whole or got
        assert_same_gradient(got, whole, 1e-6)
    assert counts == [1, {0: 2, 0.5: 3, 1: 1}[lam], len(batch.samples)]


def test_gradient_at_another_sampling_temperature(family: Family, reference: Reference) -> None:
    c = config("rollout.temperature=0.7", *XOPD)
    loss, want = reference.objective(c, lambda i: reference.xopd(c, i))
    learner, _, metrics = one_step(family, c, reference.samples(family, c))
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert_same_gradient(gradient(learner), want, 1e-5)


@pytest.mark.parametrize(("budget", "mu"), [(WHOLE, 0.7), (90, 0.7), (90, 0.0)])
def test_gradient_of_the_warm_start(family: Family, reference: Reference, budget: int, mu: float) -> None:
    """At mu = 0 no teacher is asked for its logits."""
    kd = ["objective.name=kd", "rollout.source=dataset", f"objective.mu={mu}", "objective.tau=3.0"]
    c = config(*kd, f"train.micro_batch_tokens={budget}", "objective.lambda=0.25")
    made = {(s, v, a): r for (s, v, a), r in zip(ANSWERS, reference.teacher_logits, strict=True)}

    class Teacher:
        def logits(self, samples: list[Sample]) -> Logits:
            rollouts = [s.scored.rollout for s in samples]
            flat = torch.cat([made[r.prompt.id, r.view, r.token_ids] for r in rollouts])
            return lambda part: flat[part]

    loss, want = reference.objective(c, lambda i: reference.kd(c, i))
    asked = Teacher() if mu else None
    learner, _, metrics = one_step(family, c, reference.samples(family, c), teacher=asked)
    assert ("kd/kl" in metrics) == (mu > 0)
    ce = torch.cat([-reference.logp(out, a) for out, (_, _, a) in zip(reference.logits, ANSWERS, strict=True)])
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5) and metrics["kd/ce"] == pytest.approx(
        float(ce.detach().mean()), rel=1e-5
    )
    assert_same_gradient(gradient(learner), want, 1e-5)


@pytest.mark.parametrize("train", [["llm", "adapter"], ["llm", "adapter", "tower"], ["adapter"]])
def test_text_beside_speech_with_a_trained_audio_path(family: Family, reference: Reference, train: list[str]) -> None:
    """A micro-batch of text alone runs a dummy clip, which must count for nothing."""
    found = []
    for budget in (WHOLE, ONE):
        c = config(f"student.train={json.dumps(train)}", f"train.micro_batch_tokens={budget}", *XOPD)
        learner, batch, _ = one_step(family, c, reference.samples(family, c))
        found.append(gradient(learner))
    assert [m[0].clips for m in batch.micro_batches].count([]) == 3
    assert_same_gradient(found[1], found[0], 1e-6)
    assert {family.part_of(n) for n, g in found[0].items() if float(g.abs().max()) > 0} == set(train)


def test_metrics_are_means_over_tokens(family: Family, reference: Reference) -> None:
    c = config("train.micro_batch_tokens=90", *XOPD)
    samples = reference.samples(family, c)
    learner = make_learner(family, c)
    found = learner.step(make_batch(samples, CLIPS, c), 0)
    logp = [reference.logp(out, a).detach() for out, (_, _, a) in zip(reference.logits, ANSWERS, strict=True)]
    advantage = [t - lp for t, lp in zip(reference.teacher, logp, strict=True)]
    ratio = torch.cat([(lp - s).exp() for lp, s in zip(logp, reference.sampler, strict=True)])
    views = [v for _, v, _ in ANSWERS]
    p = torch.cat([torch.softmax(out.detach(), -1) for out in reference.logits])
    expected = {
        "advantage/mean": torch.cat(advantage).mean(),
        "reverse_kl/speech": -torch.cat([a for a, v in zip(advantage, views, strict=True) if v == "speech"]).mean(),
        "reverse_kl/text": -torch.cat([a for a, v in zip(advantage, views, strict=True) if v == "text"]).mean(),
        "ratio/mean": ratio.mean(),
        "ratio/clipped": (ratio > 1.3).float().mean(),
        "mismatch/logprob": ratio.log().abs().mean(),
        "entropy": -torch.special.xlogy(p, p).sum(-1).mean(),
        "lr": torch.tensor(learning_rate(c, 0)),
        "grad_norm": torch.cat([g.flatten() for g in gradient(learner).values()]).norm(),
    }
    assert 0 < expected["ratio/clipped"] < 1
    assert found.metrics.keys() == {*expected, "loss"}
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(float(value), abs=1e-5), name
    assert learner.optimizer.param_groups[0]["lr"] == learning_rate(c, 0) != c.optim.lr
    for ours, a in zip(found.advantages, advantage, strict=True):  # in samples.jsonl: unclipped, without padding
        assert ours == pytest.approx(a.tolist(), abs=1e-5)


def test_a_filling_micro_batch_counts_for_nothing(family: Family, reference: Reference) -> None:
    """A rank with fewer micro-batches repeats a sample with weight 0."""
    c = config(*XOPD)
    found = []
    for fill in (False, True):
        learner = make_learner(family, c)
        batch = make_batch(reference.samples(family, c), CLIPS, c)
        batch.micro_batches += [[replace(batch.samples[0], weight=0.0, place=-1)]] * fill
        found.append((learner.step(batch, 0), gradient(learner)))
    assert found[0][0] == found[1][0] and list(map(len, found[1][0].advantages)) == [len(a) for _, _, a in ANSWERS]
    assert_same_gradient(found[1][1], found[0][1], 0)


def test_the_sum_over_ranks_is_what_zero_averages(family: Family, reference: Reference) -> None:
    """ZeRO divides by the ranks, so each rank's gradient is scaled up by their number; the metric is not."""
    c = config(*XOPD)
    found = []
    for world in (1, 3):
        learner = make_learner(family, c)
        learner.world = world
        loss = learner.step(make_batch(reference.samples(family, c), CLIPS, c), 0).metrics["loss"]
        found.append((loss, gradient(learner)))
    assert found[0][0] == found[1][0]
    assert_same_gradient(found[1][1], {n: 3 * g for n, g in found[0][1].items()}, 1e-6)


@pytest.mark.parametrize("budget", [WHOLE, ONE])
def test_teacher_equal_to_student_is_a_step_of_zero(family: Family, reference: Reference, budget: int) -> None:
    c = config(f"train.micro_batch_tokens={budget}")
    learner, _, metrics = one_step(family, c, reference.samples(family, c, own=True))
    for name in ("loss", "advantage/mean", "reverse_kl/speech", "reverse_kl/text", "mismatch/logprob"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-5), name
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-5) and metrics["ratio/clipped"] == 0.0
    assert metrics["grad_norm"] < 1e-4
    other = one_step(family, c, reference.samples(family, c))[2]
    assert other["grad_norm"] > 1  # another teacher does move it


def test_evaluation_logits_carry_no_gradient_and_leave_training_mode(family: Family, reference: Reference) -> None:
    c = config()
    learner = make_learner(family, c)
    samples = reference.samples(family, c)
    mb, logits = learner.eval_logits(samples, CLIPS)
    assert learner.model.training and not logits.requires_grad
    for i, out in enumerate(reference.logits):
        n = len(ANSWERS[i][2])
        assert mb.targets[i, :n].tolist() == list(ANSWERS[i][2]) and mb.mask[i].sum() == n
        torch.testing.assert_close(logits[i, :n], out.detach().float(), atol=1e-5, rtol=1e-6)


def test_parameters_are_gathered_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.train.learner.GATHERED", 10)
    found = [Piece(str(i), torch.nn.Parameter(torch.zeros(n))) for i, n in enumerate((4, 6, 1, 30, 2, 2))]
    assert [[p.name for p in g] for g in _groups(found)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert _groups([]) == []
