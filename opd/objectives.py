"""Losses as plain functions of tensors. Shape legend in opd/types.py.

Each function returns a loss per token [B, T]; the batch's weights (opd/batch.py) carry the mask, the view's share
lambda and the global denominator, so that `(weights * loss).sum()` over all micro-batches and ranks is the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.config import ObjectiveConfig


@dataclass
class Tokens:
    """What an objective may read of a micro-batch: its response tokens as student, teacher and sampler see them."""

    logits: Tensor  # [B, T, V] of the student at temperature 1, with gradient
    targets: Tensor  # [B, T], the response
    teacher_logits: Tensor | None  # [B, T, V], for objectives that read rows (ObjectiveConfig.reads_rows)
    teacher_logp: Tensor  # [B, T], for the others
    sampler_logp: Tensor  # [B, T], 0 where no student sampled
    temperature: float  # of the sampler


@dataclass
class Terms:
    """What an objective gives back."""

    loss: Tensor  # [B, T], with gradient
    metrics: dict[str, Tensor]  # [B, T] each: the step's token means are logged under these names
    advantage: Tensor | None = None  # [B, T], of on-policy objectives: minus its mean is the reverse KL


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


def xopd_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """`xopd` under the recipe's settings: the ratio is of the sampler's temperature, the advantage of temperature 1."""
    from trl.trainer.utils import selective_log_softmax

    ratio_logp = selective_log_softmax(t.logits / t.temperature, t.targets)
    logp = ratio_logp if t.temperature == 1.0 else selective_log_softmax(t.logits, t.targets)
    out = xopd(logp, t.teacher_logp, ratio_logp, t.sampler_logp, o.advantage_clip, o.ratio_max)
    metrics = {
        "advantage/mean": out.advantage,
        "ratio/mean": out.ratio,
        "ratio/clipped": (out.ratio > o.ratio_max).float(),
        "mismatch/logprob": (ratio_logp.detach() - t.sampler_logp).abs(),
    }
    return Terms(out.loss, metrics, out.advantage)


def kd_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """`kd` under the recipe's settings; at mu = 0, sequence-level distillation, without the teacher's rows."""
    from trl.trainer.utils import selective_log_softmax

    if not o.reads_rows:
        ce = -selective_log_softmax(t.logits, t.targets)
        return Terms(ce, {"kd/ce": ce})
    assert t.teacher_logits is not None
    out = kd(t.logits, t.teacher_logits, t.targets, o.mu, o.tau)
    return Terms(out.loss, {"kd/ce": out.ce, "kd/kl": out.kl})


OBJECTIVES: dict[str, Callable[[Tokens, ObjectiveConfig], Terms]] = {"xopd": xopd_terms, "kd": kd_terms}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probability rows: [..., V], [..., V] -> [...]."""
    return (p.exp() * (p - q)).sum(-1)
