"""The objectives by value and gradient: hand-worked cases, a float64 reference, exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from opd.divergences import EXCLUDED, divergence
from opd.objectives import kd, xopd

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


def test_teacher_equal_to_student_gives_zero() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3))
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    xopd(logp, logp.detach(), logp, logp.detach()).loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert kd(logits, logits.detach(), targets).kl.abs().max() == 0
    logits.grad = None
    kd(logits, logits.detach(), targets).kl.sum().backward()
    assert logits.grad.abs().max() < 1e-15


def test_expected_gradient_is_the_reverse_kl_gradient() -> None:
    """Over all sequences of two tokens of a three-token vocabulary, at per-token discount 0: exact enumeration."""
    torch.manual_seed(0)
    first = torch.randn(3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    t1, t2 = (
        torch.log_softmax(torch.randn(3, dtype=torch.float64), -1),
        torch.log_softmax(torch.randn(3, 3).double(), -1),
    )
    p1, p2 = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    expected = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            logp = torch.stack([p1[a], p2[a, b]])[None]
            teacher = torch.stack([t1[a], t2[a, b]])[None]
            probability = (p1[a] + p2[a, b]).exp().detach()
            expected = expected + probability * xopd(logp, teacher, logp, logp.detach()).loss.sum()
    got = torch.autograd.grad(expected, [first, second], retain_graph=True)
    # dense: KL at each position, the visiting probability of a prefix held constant (no return-to-go)
    dense = divergence(p1, t1) + (p1.exp().detach() * divergence(p2, t2)).sum()
    for g, d in zip(got, torch.autograd.grad(dense, [first, second]), strict=True):
        assert torch.allclose(g, d, atol=1e-12)


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


def test_kd_against_its_formula() -> None:
    torch.manual_seed(2)
    logits, teacher = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(2, 3, 5).double()
    targets = torch.randint(0, 5, (2, 3))
    out = kd(logits, teacher, targets, mu=0.7, tau=3.0)
    copy = logits.detach().clone().requires_grad_()
    want = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            p = torch.softmax(teacher[b, t] / 3, -1)
            q = torch.softmax(copy[b, t] / 3, -1)
            want = want - torch.log(torch.softmax(copy[b, t], -1)[targets[b, t]])
            want = want + 0.7 * 9 * (p * (p / q).log()).sum()
    assert float(out.loss.sum()) == pytest.approx(float(want))
    (a,), (b,) = torch.autograd.grad(out.loss.sum(), logits), torch.autograd.grad(want, copy)
    assert torch.allclose(a, b, atol=1e-12)


def test_excluded_ids_take_no_part() -> None:
    logits, teacher = torch.randn(1, 2, 6).requires_grad_(), torch.randn(1, 2, 6)
    banned = T([False, False, True, False, False, True])
    masked, masked_teacher = logits.masked_fill(banned, EXCLUDED), teacher.masked_fill(banned, EXCLUDED)
    loss = kd(masked, masked_teacher, T([[0, 1]])).loss
    small = kd(logits[..., ~banned], teacher[..., ~banned], T([[0, 1]])).loss
    assert torch.allclose(loss, small, atol=1e-6)
    loss.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[..., banned] == 0).all()
