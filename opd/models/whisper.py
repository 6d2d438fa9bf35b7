"""Families that take long audio in windows of 30 s, each through a Whisper-style tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.models.base import Family
from opd.models.qwen2_audio import lengths, log_mel, trimmed_tower


class Windowed(Family):
    """Splits clips into windows, and joins what the tower makes of them."""

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        """`mel` [windows, bins, F], `frames` [windows] and `windows` [C]."""
        size = self.extractor.n_samples
        windows = [[c[i : i + size] for i in range(0, len(c), size)] for c in clips]
        return self.mel([w for clip in windows for w in clip]) | {"windows": torch.tensor([len(w) for w in windows])}

    def mel(self, windows: list[np.ndarray]) -> dict[str, Tensor]:
        """`mel` and `frames` of windows."""
        return log_mel(self.extractor, windows)

    def audio_tokens(self, samples: int) -> int:
        return int(self.embeddings(-(-samples // self.extractor.hop_length)))

    def embeddings(self, frames: Any) -> Any:
        """Audio embeddings of so many frames."""
        return lengths(frames)[1]

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        windows = iter(self.run_windows(hf.model.audio_tower, features["mel"], features["frames"]))
        return [torch.cat([next(windows) for _ in range(int(n))]) for n in features["windows"]]

    def run_windows(self, tower: Any, mel: Tensor, frames: Tensor) -> list[Tensor]:
        """Tower output per window, each [S, width that the adapter takes]."""
        return trimmed_tower(tower, mel, frames)


class AudioFlamingo3(Windowed):
    """Audio-Flamingo-3: the tower of Qwen2-Audio over windows, two-layer projector, Qwen2 LLM (arXiv 2507.08128)."""

    model_class = "AudioFlamingo3ForConditionalGeneration"


class GlmAsr(Windowed):
    """GLM-ASR: a Whisper-style tower with rotary positions, four frames merged, Llama-style LLM.

    The tower does not mask the silence that fills a window, so it always runs over all of it.
    """

    model_class = "GlmAsrForConditionalGeneration"
    audio_marks = ("<|begin_of_audio|>", "<|end_of_audio|>")
    merged = 4

    def mel(self, windows: list[np.ndarray]) -> dict[str, Tensor]:
        out = self.extractor(
            windows,
            sampling_rate=self.sampling_rate,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        return {"mel": out["input_features"], "frames": out["attention_mask"].sum(-1)}

    def embeddings(self, frames: Any) -> Any:
        return ((frames - 1) // 2 + 1) // self.merged

    def run_windows(self, tower: Any, mel: Tensor, frames: Tensor) -> list[Tensor]:
        hidden = tower(mel.to(tower.conv1.weight.dtype)).last_hidden_state
        merged = hidden.reshape(len(mel), -1, self.merged * hidden.shape[-1])
        return [row[: int(n)] for row, n in zip(merged, self.embeddings(frames), strict=True)]
