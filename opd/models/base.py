"""What the loop asks of a speech LLM family, and the module that the learner trains.

Shape legend in opd/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from opd.audio import BadAudio
from opd.objectives import EXCLUDED
from opd.types import Message

Part = Literal["tower", "adapter", "llm"]


class Family(ABC):
    """One speech LLM architecture: inputs, parts, special ids, and names as vLLM's loader knows them."""

    sampling_rate: int
    banned_ids: list[int]  # audio-only ids and padded vocabulary rows: never sampled, in no divergence
    audio_id: int  # placeholder id, one per audio embedding after expansion
    eos_ids: list[int]
    vocab_size: int  # rows of the output layer
    tokenizer: Any
    processor: Any

    @abstractmethod
    def __init__(self, path: str) -> None:
        """Read config, tokenizer and processor of the checkpoint; no weights."""

    @abstractmethod
    def load(self, dtype: torch.dtype, attention: str) -> nn.Module:
        """The Hugging Face model of this checkpoint."""

    @abstractmethod
    def part_of(self, name: str) -> Part:
        """Which part a parameter belongs to, by its Hugging Face name in memory."""

    @abstractmethod
    def to_vllm(self, name: str) -> str:
        """A parameter's name as vLLM's `load_weights` wants it."""

    @abstractmethod
    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        """Model inputs of waveforms: `mel` [C, bins, F] and `frames` [C]."""

    @abstractmethod
    def audio_tokens(self, samples: int) -> int:
        """Audio embeddings S of a clip of so many samples."""

    @abstractmethod
    def run_tower(self, hf: nn.Module, features: dict[str, Tensor]) -> list[Tensor]:
        """Tower output per clip, each [S, tower width]."""

    @abstractmethod
    def run_adapter(self, hf: nn.Module, audio: Tensor) -> Tensor:
        """[S, tower width] -> [S, H]."""

    @abstractmethod
    def run_llm(self, hf: nn.Module, embeds: Tensor, position_ids: Tensor, bias: Tensor) -> Tensor:
        """Embeddings [R, L, H], positions [R, L], additive attention bias [R, 1, L, L] -> last hidden states."""

    @abstractmethod
    def head(self, hf: nn.Module) -> nn.Module:
        """The output layer, H -> V."""

    def prompt_ids(self, messages: list[Message], clip_samples: list[int]) -> list[int]:
        """Token ids of a chat with the generation prompt, every audio placeholder expanded to its S ids.

        Raises BadAudio when a text of the chat spells the placeholder itself.
        """
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if ids.count(self.audio_id) > len(clip_samples):
            token = self.tokenizer.convert_ids_to_tokens(self.audio_id)
            raise BadAudio(f"its text or transcript contains {token}, which stands for a clip; take it out")
        lengths = iter([self.audio_tokens(n) for n in clip_samples])
        expanded: list[int] = []
        for i in ids:
            expanded += [i] * (next(lengths) if i == self.audio_id else 1)
        assert next(lengths, None) is None, "the chat template dropped an audio part"
        return expanded


class SpeechLM(nn.Module):
    """The trainable module: tower, adapter, LLM and head behind one `forward`, so that ZeRO sees every call.

    Whatever part of the audio path is frozen runs once per clip (`encode`) and is handed back in; the rest runs in
    the training pass.
    """

    def __init__(self, hf: nn.Module, family: Family, train: list[str]) -> None:
        super().__init__()
        self.hf, self.family = hf, family
        self.tower_trained, self.adapter_trained = "tower" in train, "adapter" in train
        for name, p in hf.named_parameters():
            p.requires_grad_(family.part_of(name) in train and "embed_positions" not in name)
        banned = torch.zeros(family.vocab_size, dtype=torch.bool)
        banned[family.banned_ids] = True
        self.register_buffer("banned", banned, persistent=False)

    def forward(self, features: dict[str, Tensor] | None = None, **text: Any) -> Any:
        return self.encode(features) if not text else self.response_logits(features=features, **text)

    def encode(self, features: dict[str, Tensor] | None) -> list[Tensor]:
        """What is frozen of the audio path, per clip: [S, H], or [S, tower width] when the adapter is trained."""
        assert features is not None
        with torch.no_grad():
            audio = self.family.run_tower(self.hf, features)
            return audio if self.adapter_trained else [self.family.run_adapter(self.hf, a) for a in audio]

    def response_logits(
        self,
        ids: Tensor,
        position_ids: Tensor,
        attends: Tensor,
        row: Tensor,
        positions: Tensor,
        audio: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits of the response tokens, banned ids at EXCLUDED.

        ids, position_ids [R, L]; attends [R, 1, L, L]; row [B]; positions [B, T]: see opd.batch.MicroBatch.
        audio [sum of S, ...]: `encode`d embeddings of all placeholders of `ids` in order; or, with a trained tower,
        `features` of the clips, `audio` None. A micro-batch without any placeholder passes a dummy (one clip, or one
        embedding) so that every rank runs the same modules; it then counts for nothing.
        Returns [B, T, V] in float32.
        """
        embed: Any = self.hf.get_input_embeddings
        embeds = embed()(ids)
        if self.tower_trained:
            assert features is not None
            audio = torch.cat(self.family.run_tower(self.hf, features))
        if (self.tower_trained or self.adapter_trained) and audio is not None:
            audio = self.family.run_adapter(self.hf, audio)
        where = ids == self.family.audio_id
        if audio is not None:
            count = int(where.sum())
            if count == 0:
                embeds = embeds + 0.0 * audio.sum().to(embeds.dtype)
            else:
                assert count == len(audio), f"{count} audio placeholders, {len(audio)} audio embeddings"
                embeds = embeds.masked_scatter(where[..., None], audio.to(embeds.dtype))
        bias = torch.zeros(attends.shape, dtype=embeds.dtype, device=embeds.device)
        bias = bias.masked_fill(~attends, torch.finfo(embeds.dtype).min)
        hidden = self.family.run_llm(self.hf, embeds, position_ids, bias)
        return self.family.head(self.hf)(hidden[row[:, None], positions]).float().masked_fill(self.banned, EXCLUDED)
