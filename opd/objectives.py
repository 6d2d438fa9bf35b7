"""Losses as plain functions of tensors. Shape legend in opd/types.py.

Each function returns a loss per token [B, T]; the batch's weights (opd/batch.py) carry the mask, the view's share
lambda and the global denominator, so that `(weights * loss).sum()` over all micro-batches and ranks is the objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXCLUDED = -1e9  # logit of an id that no distribution may use: finite, so that 0 * log 0 stays 0 and never NaN


@dataclass
class XopdTerms:
    """What `xopd` computes per token, all [B, T]; only `loss` carries a gradient."""

    loss: Tensor
    advantage: Tensor  # before clipping
    ratio: Tensor  # before truncation


def xopd(
    logp: Tensor,
    teacher_logp: Tensor,
    ratio_logp: Tensor,
    sampler_logp: Tensor,
    advantage_clip: float | None = None,
    ratio_max: float = 2.0,
) -> XopdTerms:
    """Sampled-token reverse KL (X-OPD, arXiv 2603.24596, J_cm and J_im): loss = -r * A.

    A = teacher_logp - logp, a constant; r = pi_theta / pi_old = exp(ratio_logp - sampler_logp), truncated at
    `ratio_max`: a truncated token keeps its gradient with the weight `ratio_max` (truncated importance sampling)
    instead of losing it, as clipping inside a PPO surrogate would have it.

    Args, all [B, T]: logp, of the student at temperature 1; teacher_logp, of the text teacher for the same tokens;
    ratio_logp, of the student at the sampling temperature, with gradient; sampler_logp, of the rollout engine.
    """
    advantage = (teacher_logp - logp).detach()
    clipped = advantage if advantage_clip is None else advantage.clamp(-advantage_clip, advantage_clip)
    ratio = (ratio_logp - sampler_logp).detach().exp()
    score = 1.0 + ratio_logp - ratio_logp.detach()  # value 1, gradient of log pi
    return XopdTerms(-ratio.clamp(max=ratio_max) * clipped * score, advantage, ratio)


@dataclass
class KdTerms:
    """What `kd` computes per token, all [B, T]."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


def kd(logits: Tensor, teacher_logits: Tensor, targets: Tensor, mu: float = 0.5, tau: float = 2.0) -> KdTerms:
    """Off-policy distillation (arXiv 2509.14930): CE(y) + mu * tau^2 * KL(teacher^tau || student^tau).

    Args: logits and teacher_logits [B, T, V], excluded ids at EXCLUDED in both; targets [B, T], the teacher's response.
    """
    logprobs = torch.log_softmax(logits, -1)
    ce = -logprobs.gather(-1, targets[..., None])[..., 0]
    student = torch.log_softmax(logits / tau, -1)
    teacher = torch.log_softmax(teacher_logits / tau, -1)
    kl = divergence(teacher, student)
    return KdTerms(ce + mu * tau**2 * kl, ce, kl)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probability rows: [..., V], [..., V] -> [...]."""
    return (p.exp() * (p - q)).sum(-1)
