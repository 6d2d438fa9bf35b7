"""Qwen2-Audio: Whisper-style tower, linear projector, Qwen2 LLM (arXiv 2407.10759).

Text teacher: any Qwen2 chat LLM with the same tokenizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opd.models.base import Family


class Qwen2Audio(Family):
    """Inputs, parts and names of Qwen2-Audio."""

    model_class = "Qwen2AudioForConditionalGeneration"

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        return log_mel(self.extractor, clips)

    def audio_tokens(self, samples: int) -> int:
        return lengths(-(-min(samples, self.extractor.n_samples) // self.extractor.hop_length))[1]

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        return trimmed_tower(hf.model.audio_tower, features["mel"], features["frames"])


def log_mel(extractor: Any, clips: list[np.ndarray]) -> dict[str, Tensor]:
    """Log-mel spectrograms as of Whisper, over the longest clip instead of the full 30 s window.

    Returns `mel` [C, bins, F] and `frames` [C], the frames of each clip without padding.
    """
    tail = 16 * extractor.hop_length  # silence behind the longest clip, as a full window would have
    longest = -(-max(len(c) for c in clips) // extractor.hop_length) * extractor.hop_length
    out = extractor(
        clips,
        sampling_rate=extractor.sampling_rate,
        return_attention_mask=True,
        padding="max_length",
        max_length=min(extractor.n_samples, longest + tail),
        return_tensors="pt",
    )
    return {"mel": out["input_features"], "frames": out["attention_mask"].sum(-1)}


def trimmed_tower(tower: Any, mel: Tensor, frames: Tensor) -> list[Tensor]:
    """The encoder of Qwen2-Audio over no more frames than the longest clip needs: per clip [S, tower width].

    tower: transformers' Qwen2AudioEncoder, which vLLM runs too; mel [C, bins, F]; frames [C] without padding.
    transformers and vLLM always run the full 30 s window and mask what lies beyond a clip; frames past the mask touch
    nothing but the convolutions' edge, so cutting the window there gives the same embeddings.
    """
    longest = int(frames.max())
    window = min(mel.shape[-1], longest + longest % 4 + 8)  # even after both strides, edges inside
    mel = mel[..., : window - window % 4].to(tower.conv1.weight.dtype)
    x = nn.functional.gelu(tower.conv1(mel))
    x = nn.functional.gelu(tower.conv2(x)).permute(0, 2, 1)
    steps = torch.arange(x.shape[1], device=x.device)
    x = x + tower.embed_positions(steps)
    valid = steps[None] < lengths(frames)[0][:, None]
    mask = torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    mask = mask.masked_fill(~valid[:, None, None], torch.finfo(x.dtype).min)
    for layer in tower.layers:
        x = layer(x, mask)
    x = tower.layer_norm(tower.avg_pooler(x.permute(0, 2, 1)).permute(0, 2, 1))
    return [row[: int(n)] for row, n in zip(x, lengths(frames)[1], strict=True)]


def lengths(frames: Any) -> Any:
    """Frames F -> (encoder positions, audio embeddings S) for ints or integer tensors."""
    positions = (frames - 1) // 2 + 1
    return positions, (positions - 2) // 2 + 1
