"""The objective of a micro-batch, computed in chunks of tokens straight from hidden states.

Logits [tokens, V] are the largest tensors of a learner, and an objective needs several of their size. Here the output
layer runs over a chunk of tokens at a time, and the loss's gradient with respect to the hidden states is taken at
once, chunk by chunk, while its logits are still there: nothing of size [tokens, V] ever exists.

N tokens of a micro-batch, one response after another, padding left out; H hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd.config import limits
from opd.config.objective import ObjectiveConfig
from opd.objectives.divergences import divergence
from opd.objectives.losses import Tokens, cord_weights, token_terms
from opd.objectives.micro_batch import MicroBatch

Logits = Callable[[slice], Tensor]  # logits [n, V] of the tokens of a chunk, made when they are asked for
Aligned = Callable[[Tensor, int], Tensor]  # the student's logits [T, V] of a response, its number -> its loss


class TokenLoss:
    """What one micro-batch adds to the loss; called once for each chunk of its tokens, in order."""

    def __init__(
        self,
        mb: MicroBatch,
        objective: ObjectiveConfig,
        temperature: float,
        teacher: Logits | None = None,
        reference: Logits | None = None,
        aligned: Aligned | None = None,
    ) -> None:
        """`teacher`, `reference`: logits of the same tokens, without gradient; `aligned`: see `uld`."""
        self.objective, self.temperature = objective, temperature
        self.teacher, self.reference, self.aligned = teacher, reference, aligned
        real = mb.mask.bool()
        self.targets, self.weights = mb.targets[real], mb.weights[real]
        self.teacher_logp, self.sampler_logp = mb.teacher_logp[real], mb.sampler_logp[real]
        self.sampled = mb.sampled[:, None].expand_as(real)[real]
        self.top_ids = None if mb.top_ids is None else mb.top_ids[real]
        self.top_logp = None if mb.top_logp is None else mb.top_logp[real]
        at = torch.arange(real.shape[1], device=real.device).expand_as(real)
        of = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
        self.position, self.response = at[real], of[real]
        self.importance: Tensor | None = None
        self.metrics: dict[str, list[Tensor]] = {}

    def parts(self, vocab: int) -> list[slice]:
        """The chunks in which the tokens are to come: with `aligned` whole responses, else of about limits.ELEMENTS."""
        if self.aligned is None:
            return chunks(len(self.targets), vocab)
        ends = torch.unique_consecutive(self.response, return_counts=True)[1].cumsum(0).tolist()
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def previews(self) -> bool:
        """Whether the objective needs to see all tokens before it weighs the first (`preview`)."""
        return self.objective.about.previews

    def preview(self, logits: Callable[[slice], Tensor], parts: list[slice]) -> None:
        """Weigh the tokens of whole responses, from logits without gradient."""
        assert self.teacher is not None
        kl = [divergence(torch.log_softmax(logits(p), -1), torch.log_softmax(self.teacher(p), -1)) for p in parts]
        self.importance = cord_weights(torch.cat(kl), self.response, self.position, self.objective)

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """The chunk's share of the loss: logits [n, V] of the tokens `part`, with gradient -> scalar."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[part]

        tokens = Tokens(
            logits,
            self.targets[part],
            self.sampler_logp[part],
            self.temperature,
            teacher_logits=self.teacher(part) if self.teacher else None,
            teacher_logp=self.teacher_logp[part],
            top_ids=cut(self.top_ids),
            top_logp=cut(self.top_logp),
            reference=self.reference(part) if self.reference else None,
            importance=cut(self.importance),
            sampled=self.sampled[part],
            aligned=self.aligned(logits, int(self.response[part.start])) if self.aligned else None,
        )
        terms = token_terms(tokens, self.objective)
        for name, values in terms.metrics.items():
            self.metrics.setdefault(name, []).append(values.detach())
        return (terms.loss * self.weights[part]).sum()

    def found(self) -> dict[str, Tensor]:
        """Metrics [N] by name, once all chunks are through; NaN where one does not apply."""
        return {name: torch.cat(values) for name, values in self.metrics.items()}


def chunks(count: int, vocab: int, elements: int | None = None) -> list[slice]:
    """`count` tokens in parts whose logits have about `elements` elements, limits.ELEMENTS by default."""
    size = max(1, (elements or limits.ELEMENTS) // vocab)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def summed_loss(
    hidden: Tensor,
    head: torch.nn.Linear,
    loss_of: Callable[[Tensor, slice], Tensor],
    parts: list[slice],
) -> Tensor:
    """The sum of `loss_of(head(hidden[part]), part)`, with gradients for `hidden` [N, H] and the output layer.

    `loss_of` must depend on nothing else that has a gradient.
    """
    return _SummedLoss.apply(hidden, head.weight, head.bias, loss_of, parts)


class _SummedLoss(torch.autograd.Function):
    """Gradients are taken in the forward pass: the loss is a scalar, so backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss_of: Any, parts: list[slice]
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # chunks add up in float32: a bfloat16 sum would lose the later ones
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        for part in parts:
            h = hidden[part]
            logits = functional.linear(h, weight, bias).requires_grad_()
            with torch.enable_grad():
                loss = loss_of(logits, part)
            total = total + loss.detach()
            (g,) = torch.autograd.grad(loss, logits)
            del logits, loss
            if of_hidden is not None:
                of_hidden[part] = g @ weight
            if of_weight is not None:
                if of_weight.dtype == g.dtype:
                    of_weight.addmm_(g.T, h)
                else:
                    of_weight += g.T @ h
            if of_bias is not None:
                of_bias += g.sum(0)
            del g  # before the next chunk's logits
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (scale,) = grads
        found = [None if g is None else g.mul_(scale) for g in ctx.saved_tensors]  # nothing reads them again
        types = (ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1])
        return *(None if g is None else g.to(d) for g, d in zip(found, types, strict=True)), None, None
