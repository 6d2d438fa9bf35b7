"""vLLM's models with their audio tower run over the clips alone: no window around them, no other clip beside them.

plugin.py registers them in servers that the launcher starts (`rollout.server.trim_audio`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.granite_speech import GraniteSpeechForConditionalGeneration
from vllm.model_executor.models.qwen2_audio import Qwen2AudioForConditionalGeneration

from opd.models.whisper import trimmed_tower


class TrimmedQwen2Audio(Qwen2AudioForConditionalGeneration):
    """vLLM's Qwen2-Audio, its tower run as the learner runs it."""

    def _process_audio_input(self, audio_input: Any) -> tuple[Tensor, ...]:
        """Per clip [S, H]."""
        if audio_input["type"] == "audio_embeds":
            return tuple(audio_input["audio_embeds"])
        frames = audio_input["feature_attention_mask"].sum(-1)
        audio = trimmed_tower(self.audio_tower, audio_input["input_features"], frames)
        return tuple(self.multi_modal_projector(a) for a in audio)


class ClipwiseGraniteSpeech(GraniteSpeechForConditionalGeneration):
    """vLLM's Granite-Speech, whose tower masks no padding, one clip at a time: what else is served does not matter."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of every clip, each [S, H]."""
        sizes = kwargs.get("audio_embed_sizes")
        if sizes is None:
            return super().embed_multimodal(**kwargs)
        embeddings: list[Tensor] = []
        for features, size in zip(kwargs["input_features"], sizes, strict=True):
            clip = features[None] if features.ndim == 2 else features  # [1, F, bins]
            embeddings += super().embed_multimodal(input_features=clip, audio_embed_sizes=size.reshape(1))
        return tuple(embeddings)
