"""Padded tensors of a few samples, which the losses read. Shape legend in opd/types.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.types import Sample


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

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def inputs(self) -> dict[str, Any]:
        """What `SpeechLM` takes of it beside the audio."""
        names = ("ids", "position_ids", "attends", "row", "positions")
        return {name: getattr(self, name) for name in names}

    @property
    def clips(self) -> list[str]:
        """Keys of the clips of all rows, in the order of the placeholders in `ids`."""
        first = {int(r): s for s, r in reversed(list(zip(self.samples, self.row.tolist(), strict=True)))}
        return [k for r in sorted(first) for k in first[r].clips]
