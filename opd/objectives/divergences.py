"""Distances between next-token distributions, as plain functions of tensors.

N tokens, V vocabulary, K kept ids. Distributions are log-probabilities or logits [N, V] in which ids that nobody may
use stand at EXCLUDED; every function returns [N], in nats, with gradient for whatever carries one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXCLUDED = -1e9  # logit of an id that no distribution may use: finite, so that 0 * log 0 stays 0 and never NaN
TAIL = 1e-6  # least mass of a tail: float32 log-probabilities do not tell it from none


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities: [..., V], [..., V] -> [...]."""
    return (p.exp() * (p - q)).sum(-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy of log-probabilities: [..., V] -> [...]."""
    return -(p.exp() * p).sum(-1)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of log-probabilities (GKD, arXiv 2306.13649, eq. 1).

    beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student. At the ends, where it
    vanishes, its limits take its place: beta = 0 KL(teacher || student), forward; beta = 1 KL(student || teacher).
    """
    if beta == 0.0:
        return divergence(teacher, student)
    if beta == 1.0:
        return divergence(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * divergence(teacher, mixture) + (1.0 - beta) * divergence(student, mixture)


def reverse_kl_with_tail(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) over K ids and one bucket for all others.

    Args: student, teacher [N, K], log-probabilities of the same ids under the full distributions. The tail's mass is
    what the K ids leave over. Merging ids into a bucket can only lower a KL, and with K = V nothing is merged. Without
    the bucket the student could lower its loss by moving mass out of the K ids.
    """
    s, t = log_tail(student), log_tail(teacher)
    return divergence(student, teacher) + s.exp() * (s - t)


def log_tail(kept: Tensor) -> Tensor:
    """log(1 - sum of probabilities): [N, K] log-probabilities -> [N]; at least log(TAIL)."""
    return torch.log((1.0 - kept.exp().sum(-1)).clamp(min=TAIL))


def jsd_on_teacher_top(student: Tensor, kept: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised JSD to a teacher of which only the K best ids are known, renormalised to 1 on them.

    Args: student [N, K], log-probabilities of the kept ids under the student's full distribution; kept [N], the sum
    of their probabilities; teacher [N, K], log-probabilities as the teacher gave them; beta in [0, 1).
    Ids that are not kept have no teacher mass: there the mixture is (1 - beta) student, and their part of
    KL(student || m) is -log(1 - beta) times their mass. beta = 1, the reverse KL, would be infinite. Where none is
    kept, all ids at EXCLUDED, nothing is known of the teacher, and the gradient is 0; the loss too at beta = 0.
    """
    teacher = teacher - teacher.logsumexp(-1, keepdim=True).clamp(min=EXCLUDED / 2)
    if beta == 0.0:
        return divergence(teacher, student)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    outside = -(1.0 - kept) * math.log1p(-beta)
    return beta * divergence(teacher, mixture) + (1.0 - beta) * (divergence(student, mixture) + outside)
