"""Every objective, as the learner calls it, against the plain float64 losses: value and gradient, however chunked."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain_losses
import pytest
import torch
from torch import Tensor, nn

from opd.config.objective import ObjectiveConfig
from opd.objectives.losses import (
    EXCLUDED,
    LOSSES,
    Tokens,
    cord_weights,
    divergence,
    generalized_jsd,
    jsd_on_teacher_top,
    reverse_kl_with_tail,
    token_terms,
)
from opd.objectives.token_loss import MicroBatch, TokenLoss, chunks, summed_loss

V, H, BANNED, LENGTHS = 9, 5, [2, 7, 8], [3, 1, 4]
N = sum(LENGTHS)
USABLE = [i for i in range(V) if i not in BANNED]
CASES: list[dict[str, Any]] = [
    {"name": "sft"},
    {"name": "kd", "mu": 0.7, "tau": 3.0},
    {"name": "kd", "mu": 0.0},
    {"name": "xopd"},
    {"name": "xopd", "advantage_clip": 0.8, "ratio_max": 1.1},
    {"name": "xopd", "ratio_max": 1.1, "ratio_above": "mask"},
    {"name": "xopd", "ratio_max": 1.1, "temperature": 0.7},
    {"name": "reverse_kl"},
    {"name": "reverse_kl", "top_k": 3},
    {"name": "forward_kl"},
    {"name": "forward_kl", "top_k": 3},
    *({"name": "jsd", "beta": beta} for beta in (0.0, 0.3, 1.0)),
    *({"name": "jsd", "beta": beta, "top_k": 3} for beta in (0.0, 0.3)),
    {"name": "entropy_aware", "entropy_threshold": 1.3},
    {"name": "cord", "cord_share": 0.4, "cord_importance": 3.0, "cord_decay": 0.8},
    {"name": "salad", "alpha": 0.3},
    {"name": "salad", "alpha": 0.0},
    {"name": "xopd", "reference": 0.2},
    {"name": "reverse_kl", "top_k": 3, "reference": 0.2},
]


def label(case: dict[str, Any]) -> str:
    return " ".join(f"{v}" if k == "name" else f"{k}={v}" for k, v in case.items())


def settings(case: dict[str, Any]) -> tuple[ObjectiveConfig, float]:
    rest = {k: v for k, v in case.items() if k != "temperature"}
    return ObjectiveConfig(**rest), case.get("temperature", 1.0)


class World:
    """A ragged micro-batch over a vocabulary with banned ids, hidden states, an output layer, a teacher."""

    def __init__(self, same: bool = False, dtype: torch.dtype = torch.float64) -> None:
        """same: the teacher, the sampler (at temperature 1) and the student at the start are the student itself."""
        rng = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.hidden = draw(N, H).to(dtype).requires_grad_()
        self.head = nn.Linear(H, V, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(draw(V, H))
            self.head.bias.copy_(draw(V))
        raw = self.logits(slice(None)).detach().double()
        other, start = draw(N, V), draw(N, V)
        self.teacher = raw if same else self.masked(raw + other)
        self.reference = raw if same else self.masked(raw + 0.5 * start)
        self.targets = torch.tensor(USABLE)[torch.randint(len(USABLE), (N,), generator=rng)]
        at = range(N), self.targets
        self.teacher_logp = torch.log_softmax(self.teacher, -1)[at]
        self.sampler_logp = torch.log_softmax(raw, -1)[at] + (0.0 if same else 0.3 * draw(N))
        self.top_ids = torch.stack([torch.tensor(USABLE)[torch.randperm(len(USABLE))[:3]] for _ in range(N)])
        self.top_ids[4, 2] = -1  # one that a server did not tell of
        self.top_logp = torch.log_softmax(self.teacher, -1).gather(-1, self.top_ids.clamp(min=0))

    @staticmethod
    def masked(logits: Tensor) -> Tensor:
        """As SpeechLM.finished, which never leaves less than float32; here float64 stays."""
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return logits.index_fill(-1, torch.tensor(BANNED), EXCLUDED)

    def logits(self, part: slice) -> Tensor:
        return self.masked(self.head(self.hidden[part]))

    def micro_batch(self) -> MicroBatch:
        """[B, T] tensors with rubbish where there is padding."""
        mask = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in LENGTHS])
        real = mask.bool()

        def padded(x: Tensor, rubbish: float) -> Tensor:
            out = torch.full((*real.shape, *x.shape[1:]), rubbish, dtype=x.dtype)
            out[real] = x
            return out

        weights = mask / mask.sum(1, keepdim=True) / 3 * torch.tensor([[1.0], [0.5], [2.0]])
        return MicroBatch(
            samples=[],
            **dict.fromkeys(("ids", "position_ids", "attends", "row", "positions"), torch.zeros(0)),
            targets=padded(self.targets, 6),
            mask=mask,
            weights=weights.double(),
            teacher_logp=padded(self.teacher_logp, 1e3),
            sampler_logp=padded(self.sampler_logp, -1e3),
            sampled=torch.tensor([True, False, True]),
            top_ids=padded(self.top_ids, 4),
            top_logp=padded(self.top_logp, 7.0),
        )

    def chunked(self, o: ObjectiveConfig, temperature: float, size: int) -> tuple[Tensor, TokenLoss]:
        """The loss as SpeechLM.response_loss computes it."""
        mb, reads = self.micro_batch(), o.reads == "logits"
        teacher = (lambda p: self.teacher[p]) if reads else None
        loss = TokenLoss(mb, o, temperature, teacher, (lambda p: self.reference[p]) if o.reference else None)
        parts = chunks(N, V, size * V)
        assert len(parts) == -(-N // size)
        if loss.previews:
            with torch.no_grad():
                loss.preview(self.logits, parts)
        return summed_loss(self.hidden, self.head, lambda raw, p: loss(self.masked(raw), p), parts), loss

    def plain(self, o: ObjectiveConfig, temperature: float) -> Tensor:
        """The same with whole logits, token by token, in probabilities."""
        logits = self.head(self.hidden).double()
        mb = self.micro_batch()
        weights, total, at = mb.weights[mb.mask.bool()], torch.zeros((), dtype=torch.float64), 0
        for length in LENGTHS:
            tokens = []
            for t in range(at, at + length):
                top = zip(self.top_ids[t].tolist(), self.top_logp[t].tolist(), strict=True)
                own = tuple((i, lp) for i, lp in top if i >= 0)
                known = float(self.teacher_logp[t]), float(self.sampler_logp[t]), own
                start = self.reference[t] if o.reference else None
                tokens.append(
                    plain_losses.Token(
                        logits[t], USABLE, int(self.targets[t]), self.teacher[t], *known, reference=start
                    )
                )
            if o.name == "cord":
                kls = [
                    float(plain_losses.kl(k.probabilities(k.logits.detach()), k.probabilities(self.teacher[at + i])))
                    for i, k in enumerate(tokens)
                ]
                for token, weight in zip(tokens, plain_losses.cord_importance(kls, o), strict=True):
                    token.importance = weight
            losses = torch.stack([plain_losses.loss(token, o, temperature) for token in tokens])
            total = total + (weights[at : at + length] * losses).sum()
            at += length
        return total

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.head.weight, self.head.bias]))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_value_and_gradient_whatever_the_chunks(case: dict[str, Any]) -> None:
    o, temperature = settings(case)
    world = World()
    want = world.plain(o, temperature)
    gradients = world.gradients(want)
    assert all(float(g.abs().max()) > 1e-3 for g in gradients)
    metrics: dict[str, Tensor] = {}
    for size in (N, 3, 1):
        got, loss = world.chunked(o, temperature, size)
        assert float(got.detach()) == pytest.approx(float(want.detach()), abs=1e-12)
        for g, w in zip(world.gradients(2.5 * got), gradients, strict=True):
            assert float((g - 2.5 * w).abs().max()) < 1e-12
        found = loss.found()
        assert all(x.shape == (N,) for x in found.values())
        metrics = metrics or found
        for name, x in found.items():
            assert torch.allclose(x, metrics[name], atol=1e-12, equal_nan=True), name
    own = torch.log_softmax(world.logits(slice(None)).detach() / temperature, -1)[range(N), world.targets]
    off = (own - world.sampler_logp).abs()
    off[3] = torch.nan  # no student sampled it
    assert torch.allclose(metrics["mismatch/logprob"], off, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bfloat16_weights(case: dict[str, Any]) -> None:
    """Chunks add up in float32: one token a chunk is as good as all at once, and both as plain autograd."""
    o, temperature = settings(case)
    world = World(dtype=torch.bfloat16)
    gradients = world.gradients(world.plain(o, temperature))
    for size in (N, 1):
        got, _ = world.chunked(o, temperature, size)
        for g, w in zip(world.gradients(got), gradients, strict=True):
            assert g.dtype == torch.bfloat16
            assert float((g - w).float().abs().max()) <= 0.02 * float(w.float().abs().max())


# all that the teacher's agreement brings to an end
ENDING = [c for c in CASES if c["name"] not in ("sft", "salad") and "temperature" not in c and c.get("mu") != 0]


@pytest.mark.parametrize("case", ENDING, ids=label)
def test_teacher_equal_to_student_gives_zero(case: dict[str, Any]) -> None:
    o, temperature = settings(case)
    if o.name == "entropy_aware":
        o = o.changed({"entropy_threshold": 0.0})
    world = World(same=True)
    loss, _ = world.chunked(o, temperature, 3)
    if o.name == "kd":  # what is left is the cross-entropy
        rest = world.chunked(ObjectiveConfig(name="sft"), 1.0, 3)[0]
        loss = loss - rest
    if o.top_k and o.name != "reverse_kl":  # the teacher is renormalised on its best: only with all of them is it equal
        world.top_ids = torch.tensor(USABLE).expand(N, -1)
        world.top_logp = torch.log_softmax(world.teacher, -1)[:, USABLE]
        loss, _ = world.chunked(o, temperature, 3)
    assert abs(float(loss.detach())) < 1e-12
    assert max(float(g.abs().max()) for g in world.gradients(loss)) < 1e-12


def test_objectives_are_all_here() -> None:
    assert {case["name"] for case in CASES} == set(LOSSES) - {"uld"}  # test_uld.py has that


def rows(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2.0 * torch.randn(*shape, generator=rng, dtype=torch.float64), -1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_trls(beta: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = rows(4, 6, 50, seed=1).requires_grad_(), rows(4, 6, 50, seed=2)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    ours = generalized_jsd(torch.log_softmax(student, -1), teacher, beta).sum()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    (a,), (b,) = torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student)
    assert torch.allclose(a, b, atol=1e-5)


def test_all_ids_kept_is_the_full_divergence() -> None:
    student, teacher = rows(20, 7, seed=1), rows(20, 7, seed=2)
    assert torch.allclose(reverse_kl_with_tail(student, teacher), divergence(student, teacher), atol=1e-12)
    assert torch.allclose(
        reverse_kl_with_tail(student.float(), teacher.float()), divergence(student, teacher).float(), atol=1e-5
    )
    for beta in (0.0, 0.4):
        whole = student.exp().sum(-1)
        assert torch.allclose(
            jsd_on_teacher_top(student, whole, teacher, beta), generalized_jsd(student, teacher, beta), atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 8.0, 20.0])
def test_a_tail_only_lowers_the_reverse_kl(dtype: torch.dtype, spread: float) -> None:
    """Also where the tail has less mass than float32 tells from none."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.log_softmax(spread * torch.randn(3000, 12, generator=rng, dtype=torch.float64), -1) for _ in range(2)
    )
    full = divergence(student, teacher)
    lower = torch.full_like(full, -torch.inf)
    for k in (1, 4, 9, 12):
        ids = student.topk(k).indices
        found = reverse_kl_with_tail(student.gather(-1, ids).to(dtype), teacher.gather(-1, ids).to(dtype)).double()
        assert (found <= full + 2e-5).all() and (found >= -2e-5).all()
        assert (found >= lower - 2e-4).all()  # more ids, a closer bound
        lower = found


def test_mass_outside_the_best_costs_the_student() -> None:
    """Without the bucket, moving all mass out of the kept ids would lower the loss."""
    teacher = torch.log(torch.tensor([[0.6, 0.3]]).double())
    near = torch.log(torch.tensor([[0.6, 0.3]]).double())
    away = torch.log(torch.tensor([[0.06, 0.03]]).double())
    assert float(reverse_kl_with_tail(near, teacher)) == pytest.approx(0.0, abs=1e-12)
    assert float(reverse_kl_with_tail(away, teacher)) > 1.0 > 0.0 > float(divergence(away, teacher))


@pytest.mark.parametrize(("beta", "value"), [(0.0, 0.0), (0.4, -0.6 * np.log(0.6))])
def test_a_teacher_of_which_nothing_is_kept_teaches_nothing(beta: float, value: float) -> None:
    """Every id that a server told of may be one that the student must not use."""
    student = torch.full((1, 2), EXCLUDED, requires_grad=True)
    loss = jsd_on_teacher_top(student, student.exp().sum(-1), torch.full((1, 2), EXCLUDED), beta)
    (g,) = torch.autograd.grad(loss.sum(), student)
    assert loss.tolist() == pytest.approx([value]) and float(g.abs().max()) == 0.0


def test_cord_weights_by_hand() -> None:
    o = ObjectiveConfig(name="cord", cord_share=0.5, cord_importance=3.0, cord_decay=0.5)
    kl = torch.tensor([0.1, 0.9, 0.2, 0.3, 5.0])
    got = cord_weights(kl, torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 3, 0]), o)
    # half of four tokens, 0.9 and 0.3, count three times: 1, 3/2, 1/4, 3/8 of mean 25/32; a lone token weighs 1
    want = [x / (25 / 32) for x in (1.0, 1.5, 0.25, 0.375)]
    assert got.tolist() == pytest.approx([*want, 1.0]) and float(got[:4].mean()) == pytest.approx(1.0)


def test_reference_penalty_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5]]).double()).requires_grad_()
    start = torch.log(torch.tensor([[0.25, 0.75]]).double())
    o = ObjectiveConfig(name="xopd", reference=0.4)
    logp = torch.log(torch.tensor([0.5]).double())
    terms = token_terms(Tokens(logits, torch.tensor([0]), logp, 1.0, teacher_logp=logp, reference=start), o)
    kl = 0.5 * np.log(2.0) + 0.5 * np.log(2 / 3)
    assert terms.metrics["reference_kl"].tolist() == pytest.approx([kl])
    assert terms.loss.tolist() == pytest.approx([0.4 * kl])
    (g,) = torch.autograd.grad(terms.loss.sum(), logits)
    # d KL / d logit_i = p_i (log p_i / q_i - KL)
    assert g[0].tolist() == pytest.approx([0.4 * 0.5 * (np.log(2.0) - kl), 0.4 * 0.5 * (np.log(2 / 3) - kl)])


def test_a_ratio_beyond_what_exp_holds_is_masked() -> None:
    o = ObjectiveConfig(name="xopd", ratio_above="mask")
    logits = torch.zeros(1, 4, requires_grad=True)
    t = Tokens(logits, torch.tensor([1]), torch.tensor([-200.0]), 1.0, teacher_logp=torch.tensor([-1.0]))
    loss = token_terms(t, o).loss
    (g,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.tolist() == [0.0] and g.abs().max() == 0
