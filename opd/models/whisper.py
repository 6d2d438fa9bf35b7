"""Families with a Whisper-style tower, over the clip or over windows of 30 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opd.models.base import Family


class Qwen2Audio(Family):
    """Qwen2-Audio: Whisper-style tower, linear projector, Qwen2 LLM (arXiv 2407.10759).

    Text teacher: any Qwen2 chat LLM with the same tokenizer.
    """

    model_class = "Qwen2AudioForConditionalGeneration"

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        return log_mel(self.extractor, clips)

    def audio_tokens(self, samples: int) -> int:
        return lengths(-(-min(samples, self.extractor.n_samples) // self.extractor.hop_length))[1]

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        return trimmed_tower(hf.model.audio_tower, features["mel"], features["frames"])


class Windowed(Family):
    """Splits clips into windows of 30 s, and joins what the tower makes of them."""

    whole = False  # whether the tower runs over the silence that fills a window, too

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        """`mel` [windows, bins, F], `frames` [windows] and `windows` [C]."""
        size = self.extractor.n_samples
        windows = [[c[i : i + size] for i in range(0, len(c), size)] for c in clips]
        mel = log_mel(self.extractor, [w for clip in windows for w in clip], self.whole)
        return mel | {"windows": torch.tensor([len(w) for w in windows])}

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


class Merging(Windowed):
    """Towers that do not mask the silence that fills a window; each four of their frames become one embedding."""

    whole = True
    merged = 4

    def embeddings(self, frames: Any) -> Any:
        return ((frames - 1) // 2 + 1) // self.merged

    def run_windows(self, tower: Any, mel: Tensor, frames: Tensor) -> list[Tensor]:
        hidden = tower(mel.to(tower.conv1.weight.dtype)).last_hidden_state
        merged = hidden.reshape(len(mel), -1, self.merged * hidden.shape[-1])
        return [row[: int(n)] for row, n in zip(merged, self.embeddings(frames), strict=True)]


class GlmAsr(Merging):
    """GLM-ASR: a Whisper-style tower with rotary positions, four frames merged, Llama-style LLM."""

    model_class = "GlmAsrForConditionalGeneration"
    audio_marks = ("<|begin_of_audio|>", "<|end_of_audio|>")


def log_mel(extractor: Any, clips: list[np.ndarray], whole: bool = False) -> dict[str, Tensor]:
    """Log-mel spectrograms as of Whisper, over the longest clip instead of the full 30 s window, unless `whole`.

    Returns `mel` [C, bins, F] and `frames` [C], the frames of each clip without padding.
    """
    tail = 16 * extractor.hop_length  # silence behind the longest clip, as a full window would have
    longest = -(-max(len(c) for c in clips) // extractor.hop_length) * extractor.hop_length
    size = extractor.n_samples if whole else min(extractor.n_samples, longest + tail)
    options = {"return_attention_mask": True, "padding": "max_length", "max_length": size, "return_tensors": "pt"}
    out = extractor(clips, sampling_rate=extractor.sampling_rate, **options)
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
