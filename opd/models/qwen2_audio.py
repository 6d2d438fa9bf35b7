"""Qwen2-Audio: Whisper-style tower, linear projector, Qwen2 LLM (arXiv 2407.10759).

Text teacher: any Qwen2 chat LLM with the same tokenizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opd.config import UserError
from opd.models.base import Family, Part

TOWER, ADAPTER, LLM = "model.audio_tower.", "model.multi_modal_projector.", "model.language_model."


class Qwen2Audio(Family):
    """Inputs, parts and names of Qwen2-Audio."""

    def __init__(self, path: str) -> None:
        from transformers import AutoConfig, AutoProcessor, GenerationConfig

        self.path = path
        self.config = AutoConfig.from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        if self.processor.chat_template is None:
            raise UserError(f"student.path {path}: the processor has no chat template")
        self.sampling_rate = self.processor.feature_extractor.sampling_rate
        self.vocab_size = self.config.text_config.vocab_size
        self.audio_id = self.config.audio_token_id
        audio_only = [self.audio_id]
        for token in (self.processor.audio_bos_token, self.processor.audio_eos_token):
            audio_only.append(self.tokenizer.convert_tokens_to_ids(token))
        self.banned_ids = sorted({*audio_only, *range(len(self.tokenizer), self.vocab_size)})
        try:
            eos: Any = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:
            eos = None
        eos = eos if eos is not None else self.tokenizer.eos_token_id
        self.eos_ids = sorted(set(eos if isinstance(eos, list) else [eos]))

    def load(self, dtype: torch.dtype, attention: str) -> nn.Module:
        from transformers import Qwen2AudioForConditionalGeneration

        return Qwen2AudioForConditionalGeneration.from_pretrained(
            self.path, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )

    def part_of(self, name: str) -> Part:
        return "tower" if name.startswith(TOWER) else "adapter" if name.startswith(ADAPTER) else "llm"

    def to_vllm(self, name: str) -> str:
        if name.startswith(LLM):
            return "language_model.model." + name.removeprefix(LLM)
        if name.startswith("lm_head."):
            return "language_model." + name
        return name.removeprefix("model.")

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        extractor = self.processor.feature_extractor
        tail = 16 * extractor.hop_length  # silence behind the longest clip, as a full window would have
        longest = -(-max(len(c) for c in clips) // extractor.hop_length) * extractor.hop_length
        out = extractor(
            clips,
            sampling_rate=self.sampling_rate,
            return_attention_mask=True,
            padding="max_length",
            max_length=min(extractor.n_samples, longest + tail),
            return_tensors="pt",
        )
        return {"mel": out["input_features"], "frames": out["attention_mask"].sum(-1)}

    def audio_tokens(self, samples: int) -> int:
        hop = self.processor.feature_extractor.hop_length
        window = self.processor.feature_extractor.n_samples
        return _lengths(-(-min(samples, window) // hop))[1]

    def run_tower(self, hf: nn.Module, features: dict[str, Tensor]) -> list[Tensor]:
        return trimmed_tower(hf.model.audio_tower, features["mel"], features["frames"])  # type: ignore[union-attr]

    def run_adapter(self, hf: nn.Module, audio: Tensor) -> Tensor:
        return hf.model.multi_modal_projector(audio)  # type: ignore[union-attr, operator]

    def run_llm(self, hf: nn.Module, embeds: Tensor, position_ids: Tensor, bias: Tensor) -> Tensor:
        out = hf.model.language_model(  # type: ignore[union-attr, operator]
            inputs_embeds=embeds, position_ids=position_ids, attention_mask=bias, use_cache=False
        )
        return out.last_hidden_state

    def head(self, hf: nn.Module) -> nn.Module:
        return hf.lm_head  # type: ignore[return-value]


def trimmed_tower(tower: Any, mel: Tensor, frames: Tensor) -> list[Tensor]:
    """The encoder of Qwen2-Audio over no more frames than the longest clip needs: per clip [S, tower width].

    tower: transformers' Qwen2AudioEncoder, which vLLM runs too; mel [C, bins, F]; frames [C] heard of each clip.
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
    heard = steps[None] < _lengths(frames)[0][:, None]
    mask = torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    mask = mask.masked_fill(~heard[:, None, None], torch.finfo(x.dtype).min)
    for layer in tower.layers:
        x = layer(x, mask)
    x = tower.layer_norm(tower.avg_pooler(x.permute(0, 2, 1)).permute(0, 2, 1))
    return [row[: int(n)] for row, n in zip(x, _lengths(frames)[1], strict=True)]


def _lengths(frames: Any) -> Any:
    """Frames F -> (encoder positions, audio embeddings S) for ints or integer tensors."""
    positions = (frames - 1) // 2 + 1
    return positions, (positions - 2) // 2 + 1
