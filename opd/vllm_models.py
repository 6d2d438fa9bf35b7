"""vLLM's models with their audio tower cut to the clips: same embeddings, a fraction of the work for short clips.

vllm_plugin.py registers them in servers that the launcher starts (`rollout.server.trim_audio`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_audio import Qwen2AudioForConditionalGeneration

from opd.models.qwen2_audio import trimmed_tower


class TrimmedQwen2Audio(Qwen2AudioForConditionalGeneration):
    """vLLM's Qwen2-Audio, its tower run as the learner runs it."""

    def _process_audio_input(self, audio_input: Any) -> tuple[Tensor, ...]:
        """Per clip [S, H]."""
        if audio_input["type"] == "audio_embeds":
            return tuple(audio_input["audio_embeds"])
        frames = audio_input["feature_attention_mask"].sum(-1)
        audio = trimmed_tower(self.audio_tower, audio_input["input_features"], frames)
        return tuple(self.multi_modal_projector(a) for a in audio)
