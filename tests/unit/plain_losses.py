"""Every objective once more, in probabilities and one token at a time, for tests to compare with.

Ids that nobody may use are dropped before anything is computed, so that nothing here knows of EXCLUDED.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.config.objective import ObjectiveConfig
from opd.objectives.losses import TAIL


@dataclass
class Token:
    """A response token as the objectives see it."""

    logits: Tensor  # [V] of the student, with gradient
    usable: list[int]
    target: int
    teacher: Tensor | None = None  # [V] logits
    teacher_logp: float = 0.0
    sampler_logp: float = 0.0
    top: tuple[tuple[int, float], ...] = ()  # (id, the teacher's log-probability)
    importance: float = 1.0
    reference: Tensor | None = None  # [V] logits

    def probabilities(self, logits: Tensor, temperature: float = 1.0) -> dict[int, Tensor]:
        powers = {i: torch.exp(logits[i] / temperature) for i in self.usable}
        whole = torch.stack(list(powers.values())).sum()
        return {i: x / whole for i, x in powers.items()}


def kl(p: dict[int, Tensor], q: dict[int, Tensor]) -> Tensor:
    return torch.stack([p[i] * torch.log(p[i] / q[i]) for i in p]).sum()


def bucketed(p: dict[int, Tensor], ids: list[int]) -> dict[int, Tensor]:
    """The ids kept, and all others together under -1."""
    kept = {i: p[i] for i in ids}
    rest = 1.0 - torch.stack(list(kept.values())).sum()
    return kept | {-1: rest.clamp(min=TAIL)}


def jsd(p: dict[int, Tensor], q: dict[int, Tensor], beta: float) -> Tensor:
    """Of student p and teacher q; an id that q lacks has no mass there."""
    if beta == 0.0:
        return torch.stack([q[i] * torch.log(q[i] / p[i]) for i in q]).sum()
    if beta == 1.0:
        return kl(p, q)
    total = torch.zeros((), dtype=torch.float64)
    for i in p:
        m = (1.0 - beta) * p[i] + (beta * q[i] if i in q else 0.0)
        total = total + (1.0 - beta) * p[i] * torch.log(p[i] / m)
        if i in q:
            total = total + beta * q[i] * torch.log(q[i] / m)
    return total


def loss(t: Token, o: ObjectiveConfig, temperature: float = 1.0) -> Tensor:
    """The objective of one token, with its gradient."""
    p = t.probabilities(t.logits)
    q = t.probabilities(t.teacher) if t.teacher is not None else {}
    out = torch.zeros((), dtype=torch.float64)
    if o.name == "sft":
        out = -torch.log(p[t.target])
    elif o.name == "kd":
        out = -torch.log(p[t.target])
        if o.mu > 0:
            assert t.teacher is not None
            hot = t.probabilities(t.teacher, o.tau), t.probabilities(t.logits, o.tau)
            out = out + o.mu * o.tau**2 * kl(*hot)
    elif o.name == "xopd":
        logp = torch.log(t.probabilities(t.logits, temperature)[t.target])
        clip = o.advantage_clip or math.inf
        advantage = min(clip, max(-clip, t.teacher_logp - math.log(float(p[t.target].detach()))))
        ratio = math.exp(float(logp.detach()) - t.sampler_logp)
        if ratio > o.ratio_max:
            ratio = o.ratio_max if o.ratio_above == "truncate" else 0.0
        out = -ratio * advantage * (1.0 + logp - float(logp.detach()))
    elif o.name == "reverse_kl" and o.top_k:
        theirs = {i: torch.tensor(math.exp(lp), dtype=torch.float64) for i, lp in t.top}
        out = kl(bucketed(p, list(theirs)), bucketed(theirs, list(theirs)))
    elif o.name == "reverse_kl":
        out = kl(p, q)
    elif o.name in ("forward_kl", "jsd"):
        if o.top_k:
            whole = sum(math.exp(lp) for _, lp in t.top)
            q = {i: torch.tensor(math.exp(lp) / whole, dtype=torch.float64) for i, lp in t.top}
        out = jsd(p, q, o.beta if o.name == "jsd" else 0.0)
    elif o.name == "entropy_aware":
        unsure = -sum(float(x * torch.log(x)) for x in q.values()) > o.entropy_threshold
        out = kl(p, q) + (kl(q, p) if unsure else 0.0)
    elif o.name == "cord":
        out = t.importance * kl(p, q)
    elif o.name == "salad":
        out = -(1.0 - o.alpha) * torch.log(p[t.target])
        out = out + o.alpha * kl(q, p) if o.alpha else out
    else:
        raise AssertionError(o.name)
    if t.reference is not None:
        out = out + o.reference * kl(p, t.probabilities(t.reference))
    return out


def cord_importance(kls: list[float], o: ObjectiveConfig) -> list[float]:
    """Weights of the tokens of one response, from the KL of each."""
    count = max(1, round(o.cord_share * len(kls)))
    best = sorted(kls, reverse=True)[:count]
    raw = [o.cord_decay**i * (o.cord_importance if x >= best[-1] else 1.0) for i, x in enumerate(kls)]
    return [w * len(raw) / sum(raw) for w in raw]


def objective(o: ObjectiveConfig, responses: list[tuple[str, int, list[Tensor]]]) -> Tensor:
    """lambda text + (1 - lambda) speech over (view, responses that it stands for, a loss per token)."""
    total = torch.zeros((), dtype=torch.float64)
    for view, share in (("speech", 1.0 - o.lambda_), ("text", o.lambda_)):
        own = [(n, torch.stack(tokens)) for v, n, tokens in responses if v == view]
        if share == 0.0 or not own:
            continue
        if o.average == "response":
            mean = torch.stack([n * x.mean() for n, x in own]).sum() / sum(n for n, _ in own)
        else:
            mean = torch.stack([n * x.sum() for n, x in own]).sum() / sum(n * len(x) for n, x in own)
        total = total + share * mean
    return total
