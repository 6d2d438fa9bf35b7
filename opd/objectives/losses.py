"""Distances between next-token distributions and the losses made of them, as plain functions of tensors.

Distributions are log-probabilities or logits [N, V] in which ids that nobody may use stand at EXCLUDED. Distances and
losses are [N], one a token, in nats, with gradient for whatever carries one. The batch's weights (train/batch.py) carry
the mask, the view's share lambda and the global denominator, so that `(weights * loss).sum()` over all micro-batches
and ranks is the objective. The in-modal and the cross-modal part of every objective therefore come from lambda alone.
Their names: LOSSES.

N tokens of responses (a chunk of them: opd/objectives/token_loss.py), V vocabulary, K kept ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd.config.objective import ObjectiveConfig

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


@dataclass
class Tokens:
    """What an objective may read: response tokens as student, teacher and sampler see them."""

    logits: Tensor  # [N, V] of the student at temperature 1, with gradient
    targets: Tensor  # [N], the response
    sampler_logp: Tensor  # [N], 0 where no student sampled
    temperature: float  # of the sampler
    teacher_logits: Tensor | None = None  # [N, V], for objectives that read them (ObjectiveConfig.reads)
    teacher_logp: Tensor | None = None  # [N] of the targets, for the others
    top_ids: Tensor | None = None  # [N, K], with objective.top_k: ids that the teacher was asked for; -1: none
    top_logp: Tensor | None = None  # [N, K], the teacher's
    reference: Tensor | None = None  # [N, V] logits of the student at the start, with objective.reference
    importance: Tensor | None = None  # [N], of `cord`: weights from its preview
    sampled: Tensor | None = None  # [N] bool: the student sampled it; none: all
    aligned: Tensor | None = None  # scalar, of `uld`: the loss of the response that these tokens are
    made: dict[float, Tensor] = field(default_factory=dict, repr=False)  # what `student` gave, by temperature

    def student(self, temperature: float = 1.0) -> Tensor:
        """[N, V] log-probabilities of the student."""
        if temperature not in self.made:
            logits = self.logits / temperature if temperature != 1.0 else self.logits
            self.made[temperature] = torch.log_softmax(logits, -1)
        return self.made[temperature]

    def teacher(self, temperature: float = 1.0) -> Tensor:
        """[N, V] log-probabilities of the teacher."""
        assert self.teacher_logits is not None, "this objective reads the teacher's logits"
        return torch.log_softmax(self.teacher_logits / temperature if temperature != 1.0 else self.teacher_logits, -1)

    def pick(self, values: Tensor) -> Tensor:
        """[N, V] -> [N]: at the targets."""
        return values.gather(-1, self.targets[:, None])[:, 0]

    def kept(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, K] of student and teacher at the ids asked for, EXCLUDED where there is none."""
        assert self.top_ids is not None and self.top_logp is not None, "this objective reads the best ids"
        there = self.top_ids >= 0
        ours = student.gather(-1, self.top_ids.clamp(min=0))
        return ours.masked_fill(~there, EXCLUDED), self.top_logp.masked_fill(~there, EXCLUDED)


@dataclass
class Terms:
    """What an objective gives back."""

    loss: Tensor  # [N], with gradient
    # [N] each: the step's token means are logged under these names; `reverse_kl`, of on-policy objectives KL(student ||
    # teacher) or its sample, by view; `advantage`, log-ratio teacher / student of the targets, with the samples
    metrics: dict[str, Tensor]


@dataclass
class XopdTerms:
    """What `xopd` computes per token, all of the inputs' shape; only `loss` carries a gradient."""

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
    ratio_above: str = "truncate",
) -> XopdTerms:
    """Sampled-token reverse KL (X-OPD, arXiv 2603.24596, J_cm and J_im): loss = -r * A.

    A = teacher_logp - logp, a constant; r = pi_theta / pi_old = exp(ratio_logp - sampler_logp). Above `ratio_max` a
    token keeps its gradient with the weight `ratio_max` (ratio_above truncate: truncated importance sampling), or
    loses it (mask); clipping inside a PPO surrogate would do the second on one side of A only.

    Args, all of one shape: logp, of the student at temperature 1; teacher_logp, of the text teacher for the same
    tokens; ratio_logp, of the student at the sampling temperature, with gradient; sampler_logp, of the rollout engine.
    """
    advantage = (teacher_logp - logp).detach()
    clipped = advantage if advantage_clip is None else advantage.clamp(-advantage_clip, advantage_clip)
    ratio = (ratio_logp - sampler_logp).detach().exp()
    weight = ratio.clamp(max=ratio_max) if ratio_above == "truncate" else ratio.where(ratio <= ratio_max, 0.0)
    score = 1.0 + ratio_logp - ratio_logp.detach()  # value 1, gradient of log pi
    return XopdTerms(-weight * clipped * score, advantage, ratio)


def sft_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Supervised fine-tuning: cross-entropy, loss = -log pi_theta(y_t)."""
    ce = -t.pick(t.student())
    return Terms(ce, {"sft/ce": ce})


def kd_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Off-policy distillation (arXiv 2509.14930): CE(y) + mu tau^2 KL(teacher^tau || student^tau).

    y is the teacher's response. At mu = 0 it is sequence-level distillation, without the teacher's logits.
    """
    ce = -t.pick(t.student())
    if o.reads != "logits":
        return Terms(ce, {"kd/ce": ce})
    kl = divergence(t.teacher(o.tau), t.student(o.tau))
    return Terms(ce + o.mu * o.tau**2 * kl, {"kd/ce": ce, "kd/kl": kl})


def xopd_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """`xopd` under the recipe's settings: the ratio is of the sampler's temperature, the advantage of temperature 1."""
    assert t.teacher_logp is not None
    ratio_logp = t.pick(t.student(t.temperature))
    logp = ratio_logp if t.temperature == 1.0 else t.pick(t.student())
    out = xopd(logp, t.teacher_logp, ratio_logp, t.sampler_logp, o.advantage_clip, o.ratio_max, o.ratio_above)
    metrics = {"reverse_kl": -out.advantage, "advantage": out.advantage, "advantage/mean": out.advantage}
    return Terms(out.loss, metrics | {"ratio/mean": out.ratio, "ratio/clipped": (out.ratio > o.ratio_max).float()})


def reverse_kl_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Dense reverse KL at every token that the student sampled: loss = KL(student || teacher).

    The expectation of `xopd`'s gradient over the next token, without its variance. Over the full vocabulary, or with
    objective.top_k over the student's K best ids and a bucket for the rest (`reverse_kl_with_tail`).
    """
    student = t.student()
    kl = divergence(student, t.teacher()) if o.top_k is None else reverse_kl_with_tail(*t.kept(student))
    return Terms(kl, {"reverse_kl": kl})


def forward_kl_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Forward KL(teacher || student), the end beta = 0 of the generalised JSD."""
    return jsd_terms(t, o.changed({"beta": 0.0}))


def jsd_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Generalised JSD with objective.beta (GKD, arXiv 2306.13649, eq. 1), on whatever responses the source gives.

    With objective.top_k the teacher is known on its K best ids, renormalised there (`jsd_on_teacher_top`).
    """
    student = t.student()
    if o.top_k is None:
        return Terms(generalized_jsd(student, t.teacher(), o.beta), {})
    ours, theirs = t.kept(student)
    return Terms(jsd_on_teacher_top(ours, ours.exp().sum(-1), theirs, o.beta), {})


def entropy_aware_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Entropy-aware on-policy distillation (arXiv 2603.07079): KL(student || teacher) + [H > h] KL(teacher || student).

    H is the teacher's entropy at the token, h objective.entropy_threshold (nats): forward KL comes in where the teacher
    is unsure, so that a student keeps what it would also have said.
    """
    student, teacher = t.student(), t.teacher()
    reverse, unsure = divergence(student, teacher), (entropy(teacher) > o.entropy_threshold).to(student.dtype)
    loss = reverse + unsure * divergence(teacher, student)
    return Terms(loss, {"reverse_kl": reverse, "entropy_aware/unsure": unsure})


def cord_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Reverse KL weighted by token importance and position (the token level of CORD, arXiv 2601.16547).

    loss = w_t KL(student || teacher), w as `cord_weights` has it from a preview of the same KL, a constant. CORD's
    second level, a judged reward for whole responses by GRPO, is left out: nothing here is rewarded.
    """
    assert t.importance is not None
    kl = divergence(t.student(), t.teacher())
    return Terms(t.importance * kl, {"reverse_kl": kl, "cord/weight": t.importance})


def cord_weights(kl: Tensor, response: Tensor, position: Tensor, o: ObjectiveConfig) -> Tensor:
    """Weights of the tokens of whole responses: [N] each -> [N], of mean 1 within a response.

    w_t is proportional to imp_t * pos_t: imp_t = objective.cord_importance for the objective.cord_share of a
    response's tokens whose KL is largest, 1 for the others; pos_t = objective.cord_decay ** t, early tokens first.
    The paper says that these two count; the numbers and the normalisation, which keeps the learning rate's meaning,
    are ours.

    Args: kl, of each token; response, its number, from 0; position, t from 0 within the response.
    """
    weights = torch.as_tensor(o.cord_decay, dtype=kl.dtype, device=kl.device) ** position.to(kl.dtype)
    for r in response.unique():
        of = response == r
        count = max(1, round(o.cord_share * int(of.sum())))
        bound = kl[of].topk(count).values[-1]
        factor = torch.where(kl[of] >= bound, o.cord_importance, 1.0).to(kl.dtype)
        w = weights[of] * factor
        weights[of] = w / w.mean()
    return weights


def salad_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """SALAD's stage of natural speech (arXiv 2510.13632): alpha KL(teacher || student) + (1 - alpha) NLL of what
    follows in the transcript, the record's response."""
    student = t.student()
    nll = -t.pick(student)
    if o.reads != "logits":
        return Terms(nll, {"salad/nll": nll})
    kl = divergence(t.teacher(), student)
    return Terms(o.alpha * kl + (1.0 - o.alpha) * nll, {"salad/kl": kl, "salad/nll": nll})


def uld_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """Universal logit distillation from a teacher with another tokenizer (arXiv 2402.12030).

    One number for a whole response, as teachers/cross_tokenizer.py aligns it. All of its tokens carry it.
    """
    assert t.aligned is not None
    loss = t.aligned.expand(len(t.targets))
    return Terms(loss, {"uld": loss})


# The loss of each of opd.config.objective.OBJECTIVES, under its name.
OF_KL = (kd_terms, reverse_kl_terms, forward_kl_terms, jsd_terms, entropy_aware_terms, cord_terms, salad_terms)
LOSSES = {loss.__name__.removesuffix("_terms"): loss for loss in (sft_terms, xopd_terms, *OF_KL, uld_terms)}


def token_terms(t: Tokens, o: ObjectiveConfig) -> Terms:
    """The recipe's objective, with what every objective shares: the reference penalty and common metrics.

    objective.reference adds c KL(student || student at the start) in the response's own view.
    """
    terms = LOSSES[o.name](t, o)
    if t.reference is not None:
        kl = divergence(t.student(), torch.log_softmax(t.reference, -1))
        terms.metrics["reference_kl"] = kl
        terms.loss = terms.loss + o.reference * kl
    with torch.no_grad():
        terms.metrics["entropy"] = entropy(t.student())
        off = (t.pick(t.student(t.temperature)) - t.sampler_logp).abs()
        # under this name in every chunk and on every rank, also where no student sampled
        terms.metrics["mismatch/logprob"] = off if t.sampled is None else off.where(t.sampled, torch.nan)
    return terms
