"""`xopd` by hand, by a float64 loop and by exact enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from opd.config.objective import ObjectiveConfig
from opd.objectives.losses import Tokens, reverse_kl_terms, xopd, xopd_terms

T = torch.tensor


def test_xopd_by_hand() -> None:
    logp = T([[math.log(0.5), math.log(0.25)]], dtype=torch.float64, requires_grad=True)
    teacher = T([[math.log(0.25), math.log(0.5)]], dtype=torch.float64)
    sampler = T([[math.log(0.5), math.log(0.125)]], dtype=torch.float64)
    out = xopd(logp, teacher, logp, sampler, advantage_clip=None, ratio_max=3.0)
    # A = log teacher - log student = -log 2, +log 2; r = 1, 2; loss = -r A
    assert out.loss.tolist()[0] == pytest.approx([math.log(2), -2 * math.log(2)])
    out.loss.sum().backward()
    assert logp.grad.tolist()[0] == pytest.approx([math.log(2), -2 * math.log(2)])  # d/dlogp (-r A) = -r A


def test_truncated_ratio_keeps_a_bounded_gradient() -> None:
    logp = T([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    out = xopd(logp, T([[1.0, 1.0]]), logp, T([[-3.0, 0.0]]), ratio_max=2.0)
    out.loss.sum().backward()
    assert out.ratio.tolist()[0] == pytest.approx([math.exp(3), 1.0])
    assert out.loss.tolist()[0] == pytest.approx([-2.0, -1.0])
    assert logp.grad.tolist()[0] == pytest.approx([-2.0, -1.0])


def test_advantage_is_clipped_and_constant() -> None:
    logp = T([[-9.0, -0.1]], dtype=torch.float64, requires_grad=True)
    out = xopd(logp, T([[0.0, -9.1]], dtype=torch.float64), logp, logp.detach(), advantage_clip=5.0)
    assert out.advantage.tolist()[0] == pytest.approx([9.0, -9.0]) and not out.advantage.requires_grad
    out.loss.sum().backward()
    assert logp.grad.tolist()[0] == pytest.approx([-5.0, 5.0])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("stale", [False, True])
def test_expected_gradient_is_the_reverse_kl_gradient(temperature: float, stale: bool) -> None:
    """Over all sequences of two tokens of a three-token vocabulary, at per-token discount 0: exact enumeration.

    Both objectives as the learner calls them. Stale: older weights sampled, and the ratio, unbounded here, makes up for
    it. At a sampling temperature the token is drawn, and its gradient taken, from the tempered student; the advantage
    is of temperature 1: what is descended is E_tempered[log student - log teacher], the bracket held constant.
    """
    torch.manual_seed(0)
    first, second = torch.randn(3).double().requires_grad_(), torch.randn(3, 3).double().requires_grad_()
    t1, t2 = torch.randn(3).double(), torch.randn(3, 3).double()
    old1, old2 = (x.detach() + (torch.randn_like(x) if stale else 0.0) for x in (first, second))

    def rows(one: Tensor, two: Tensor, a: int) -> Tensor:
        return torch.stack([one, two[a]])

    o = ObjectiveConfig(name="xopd", ratio_max=1e9)
    dense_of = ObjectiveConfig(name="reverse_kl")
    expected, dense = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        y = T([a, b])
        logits, theirs = rows(first, second, a), rows(t1, t2, a)
        sampler = torch.log_softmax(rows(old1, old2, a) / temperature, -1)[range(2), y]
        teacher_logp = torch.log_softmax(theirs, -1)[range(2), y]
        terms = xopd_terms(Tokens(logits, y, sampler, temperature, teacher_logp=teacher_logp), o)
        # with stale weights a later token is weighed by its own ratio alone: prefixes stay the sampler's
        expected = expected + sampler.sum().exp() * terms.loss.sum()
        if temperature == 1.0:
            terms = reverse_kl_terms(Tokens(logits, y, sampler, 1.0, teacher_logits=theirs), dense_of)
            dense = dense + sampler.sum().exp() * terms.loss.sum()  # each prefix as often as it is sampled
        else:
            ours = torch.log_softmax(logits, -1)
            tempered = torch.log_softmax(logits / temperature, -1)
            bracket = (ours - torch.log_softmax(theirs, -1)).detach()
            dense = dense + sampler.sum().exp() * (tempered.exp() * bracket).sum()
    found = torch.autograd.grad(expected, [first, second], retain_graph=True)
    for g, d in zip(found, torch.autograd.grad(dense, [first, second]), strict=True):
        assert torch.allclose(g, d, atol=1e-12) and float(d.abs().max()) > 0.01


def test_ragged_batch_against_a_float64_loop() -> None:
    torch.manual_seed(1)
    lengths, v = [3, 1, 4], 6
    logits = torch.randn(3, 4, v, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, v, (3, 4))
    teacher, sampler = torch.randn(3, 4).double() - 2, torch.randn(3, 4).double() * 0.3 - 2
    mask = T([[1.0] * n + [0.0] * (4 - n) for n in lengths], dtype=torch.float64)
    weights = mask / mask.sum(1, keepdim=True) / 3
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    loss = (weights * xopd(logp, teacher, logp, sampler, 5.0, 1.5).loss).sum()
    (got,) = torch.autograd.grad(loss, logits)
    reference = torch.zeros((), dtype=torch.float64)
    value = 0.0
    copy = logits.detach().clone().requires_grad_()
    for i, n in enumerate(lengths):
        for t in range(n):
            lp = copy[i, t, targets[i, t]] - torch.log(torch.exp(copy[i, t]).sum())
            a = min(5.0, max(-5.0, float(teacher[i, t] - lp)))
            r = min(1.5, math.exp(float(lp - sampler[i, t])))
            reference = reference - r * a * lp / n / 3
            value += -r * a / n / 3
    (want,) = torch.autograd.grad(reference, copy)
    assert torch.allclose(got, want, atol=1e-12) and float(loss) == pytest.approx(value, abs=1e-12)
