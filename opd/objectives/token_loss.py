"""The objective of a micro-batch, computed in chunks of tokens straight from hidden states.

Logits [tokens, V] are the largest tensors of a learner, and an objective needs several of their size. Here the output
layer runs over a chunk of tokens at a time, and the loss's gradient with respect to the hidden states is taken at
once, chunk by chunk, while its logits are still there: nothing of size [tokens, V] ever exists.

N tokens of a micro-batch, one response after another, padding left out; H hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from opd.config import needs
from opd.config.objective import ObjectiveConfig
from opd.objectives.losses import Tokens, cord_weights, divergence, token_terms
from opd.types import Sample

Logits = Callable[[slice], Tensor]  # logits [n, V] of the tokens of a chunk, made when they are asked for
Aligned = Callable[[Tensor, int], Tensor]  # the student's logits [T, V] of a response, its number -> its loss


@dataclass(kw_only=True)
class MicroBatch:
    """Padded tensors of a few samples.

    Samples that share a prompt share a row: the prompt once, then their responses one after another, each seeing the
    prompt and itself. A spoken prompt is long, its answers short: n answers then cost little more than one.
    R rows, L their length.
    """

    samples: list[Sample]
    ids: Tensor  # [R, L]
    position_ids: Tensor  # [R, L], as if each response followed the prompt alone
    attends: Tensor  # [R, 1, L, L] bool: which token (last axis) each token may see
    row: Tensor  # [B], of each sample
    positions: Tensor  # [B, T], in the row: where the logits of each response token are read
    targets: Tensor  # [B, T], response ids
    mask: Tensor  # [B, T], 1 at response tokens
    weights: Tensor  # [B, T], of each token in the loss, 0 at padding
    teacher_logp: Tensor  # [B, T], 0 where the objective reads logits instead
    sampler_logp: Tensor  # [B, T], 0 where no student sampled
    sampled: Tensor  # [B] bool: a student did
    top_ids: Tensor | None = None  # [B, T, K], with objective.top_k; -1 where there is none
    top_logp: Tensor | None = None  # [B, T, K], the teacher's

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def inputs(self) -> dict[str, Any]:
        """What `SpeechLM` takes of it beside the audio."""
        return {name: getattr(self, name) for name in ("ids", "position_ids", "attends", "row", "positions")}

    @property
    def clips(self) -> list[str]:
        """Keys of the clips of all rows, in the order of the placeholders in `ids`."""
        first = {int(r): s for s, r in reversed(list(zip(self.samples, self.row.tolist(), strict=True)))}
        return [k for r in sorted(first) for k in first[r].clips]


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
        """`teacher`, `reference`: logits of the same tokens, without gradient; `aligned`: see `uld`.

        `previews`: whether the objective needs to see all tokens before it weighs the first (`preview`).
        """
        self.objective, self.temperature = objective, temperature
        self.teacher, self.reference, self.aligned = teacher, reference, aligned
        real = mb.mask.bool()
        self.weights, self.previews = mb.weights[real], objective.about.previews
        names = ("targets", "sampler_logp", "teacher_logp", "top_ids", "top_logp")
        given = {name: getattr(mb, name) for name in names} | {"sampled": mb.sampled[:, None].expand_as(real)}
        self.tokens: dict[str, Any] = {name: x[real] for name, x in given.items() if x is not None}  # of Tokens
        at = torch.arange(real.shape[1], device=real.device).expand_as(real)
        of = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
        self.position, self.response = at[real], of[real]
        self.metrics: dict[str, list[Tensor]] = {}

    def parts(self, vocab: int) -> list[slice]:
        """The chunks in which the tokens are to come: with `aligned` whole responses, else of about needs.ELEMENTS."""
        if self.aligned is None:
            return chunks(len(self.weights), vocab)
        ends = torch.unique_consecutive(self.response, return_counts=True)[1].cumsum(0).tolist()
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def preview(self, logits: Callable[[slice], Tensor], parts: list[slice]) -> None:
        """Weigh the tokens of whole responses, from logits without gradient."""
        assert self.teacher is not None
        kl = [divergence(torch.log_softmax(logits(p), -1), torch.log_softmax(self.teacher(p), -1)) for p in parts]
        self.tokens["importance"] = cord_weights(torch.cat(kl), self.response, self.position, self.objective)

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """The chunk's share of the loss: logits [n, V] of the tokens `part`, with gradient -> scalar."""
        tokens = Tokens(
            logits=logits,
            temperature=self.temperature,
            teacher_logits=self.teacher(part) if self.teacher else None,
            reference=self.reference(part) if self.reference else None,
            aligned=self.aligned(logits, int(self.response[part.start])) if self.aligned else None,
            **{name: x[part] for name, x in self.tokens.items()},
        )
        terms = token_terms(tokens, self.objective)
        for name, values in terms.metrics.items():
            self.metrics.setdefault(name, []).append(values.detach())
        return (terms.loss * self.weights[part]).sum()

    def found(self) -> dict[str, Tensor]:
        """Metrics [N] by name, once all chunks are through; NaN where one does not apply."""
        return {name: torch.cat(values) for name, values in self.metrics.items()}


def chunks(count: int, vocab: int, elements: int | None = None) -> list[slice]:
    """`count` tokens in parts whose logits have about `elements` elements, needs.ELEMENTS by default."""
    size = max(1, (elements or needs.ELEMENTS) // vocab)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def summed_loss(
    hidden: Tensor, head: torch.nn.Linear, loss_of: Callable[[Tensor, slice], Tensor], parts: list[slice]
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
