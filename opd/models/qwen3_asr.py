"""Qwen3-ASR: the tower of Qwen3-Omni, two-layer projector, Qwen3 LLM (arXiv 2601.21337).

Text teacher: Qwen3 of the same size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from opd.models.base import Family
from opd.models.omni import convolved, pad_mels
from opd.settings import UserError


class Qwen3Asr(Family):
    """Inputs, parts and names of Qwen3-ASR."""

    model_class = "Qwen3ASRForConditionalGeneration"
    names: ClassVar[dict[str, str]] = {}

    def check(self) -> None:
        super().check()
        if not (self.config.get_text_config().tie_word_embeddings or self.config.tie_word_embeddings):
            raise UserError(
                f"student.path {self.path}: tie_word_embeddings is false: transformers and vLLM name an output layer "
                "of its own differently; published checkpoints share it with the embeddings"
            )

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        outs = [self._extract(c) for c in clips]
        mels = [out["input_features"][0, :, : int(out["attention_mask"].sum())] for out in outs]
        return pad_mels(mels, 2 * self.config.audio_config.n_window)

    def _extract(self, clip: np.ndarray) -> Any:
        return self.extractor(clip, sampling_rate=self.sampling_rate, return_attention_mask=True, return_tensors="pt")

    def audio_tokens(self, samples: int) -> int:
        frames = max(samples, self.extractor.min_length) // self.extractor.hop_length
        return convolved(frames, self.config.audio_config.n_window)

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        mel, frames = features["mel"], features["frames"]
        tower = hf.model.audio_tower
        mask = (torch.arange(mel.shape[-1], device=mel.device) < frames[:, None]).long()
        hidden = tower(mel.to(tower.conv2d1.weight.dtype), input_features_mask=mask).last_hidden_state
        window = self.config.audio_config.n_window
        return list(hidden.split([convolved(int(f), window) for f in frames]))
