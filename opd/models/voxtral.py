"""Voxtral: Whisper tower over full windows of 30 s, two-layer projector, Mistral LLM (arXiv 2507.13264).

vLLM reads Mistral's own files (params.json, tekken.json, consolidated.safetensors); transformers reads Hugging Face's.
A checkpoint of ours holds both. Text teacher: a Mistral LLM with the same tekken.json.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers.tokenization_mistral_common import MistralCommonBackend

from opd.models.whisper import Merging
from opd.settings import UserError
from opd.types import Message, with_parts

MISTRAL = ("params.json", "tekken.json")
TOWER = "mm_whisper_embeddings.whisper_encoder."
BLOCK = TOWER + r"transformer.layers.\1."
RENAMED = [
    (r"model\.language_model\.(.*)", r"model.\1"),
    (r"model\.multi_modal_projector\.linear_1\.(.*)", r"mm_whisper_embeddings.audio_language_projection.0.\1"),
    (r"model\.multi_modal_projector\.linear_2\.(.*)", r"mm_whisper_embeddings.audio_language_projection.2.\1"),
    (r"model\.audio_tower\.conv1\.(.*)", TOWER + r"conv_layers.0.\1"),
    (r"model\.audio_tower\.conv2\.(.*)", TOWER + r"conv_layers.1.\1"),
    (r"model\.audio_tower\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.*)", BLOCK + r"attention.w\2.\3"),
    (r"model\.audio_tower\.layers\.(\d+)\.self_attn\.out_proj\.(.*)", BLOCK + r"attention.wo.\2"),
    (r"model\.audio_tower\.layers\.(\d+)\.self_attn_layer_norm\.(.*)", BLOCK + r"attention_norm.\2"),
    (r"model\.audio_tower\.layers\.(\d+)\.final_layer_norm\.(.*)", BLOCK + r"ffn_norm.\2"),
    (r"model\.audio_tower\.layers\.(\d+)\.fc([12])\.(.*)", BLOCK + r"feed_forward.w\2.\3"),
    (r"model\.audio_tower\.layer_norm\.(.*)", TOWER + r"transformer.norm.\1"),
]


class Voxtral(Merging):
    """Inputs, parts and names of Voxtral."""

    model_class = "VoxtralForConditionalGeneration"

    def marks(self) -> list[str]:
        return ["[BEGIN_AUDIO]"]

    def placeholder_id(self) -> int:
        return int(self.config.audio_token_id)

    def check(self) -> None:
        for name in MISTRAL:
            if Path(self.path).is_dir() and not Path(self.path, name).is_file():
                raise UserError(f"student.path {self.path}: expected Mistral's {name} beside config.json, found none")

    def text_tokenizer(self, path: str) -> Any:
        """Mistral's own, which the student has too, where the teacher brings it."""
        if Path(path).is_dir() and not Path(path, "tekken.json").is_file():
            return super().text_tokenizer(path)
        return MistralCommonBackend.from_pretrained(path)

    def text_ids(self, tokenizer: Any, messages: list[Message]) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))

    def to_vllm(self, name: str) -> str:
        """As Mistral names it, in part: vLLM takes the LLM's names from Hugging Face."""
        return next((re.sub(old, new, name) for old, new in RENAMED if re.fullmatch(old, name)), name)

    def save_extras(self, hf: Any, folder: Path) -> None:
        super().save_extras(hf, folder)
        for name in MISTRAL:
            if not (folder / name).exists():
                shutil.copyfile(Path(self.path, name), folder / name)

    def save_other_weights(self, state: dict[str, Tensor], folder: Path) -> None:
        """transformers reads its own names; vLLM the file that `consolidated` is."""
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        save_torch_state_dict(state, folder)
        mistral = {self.to_vllm(n): v.contiguous() for n, v in state.items() if "embed_positions" not in n}
        save_file(mistral, folder / "consolidated.safetensors", metadata={"format": "pt"})

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        size = self.extractor.n_samples
        mels, counts = [], []
        for clip in clips:  # one spectrogram over the clip filled up to whole windows, then cut
            filled = np.pad(clip, (0, -len(clip) % size))
            out = self.extractor(filled, sampling_rate=self.sampling_rate, truncation=False, return_tensors="pt")
            mels.append(torch.stack(out["input_features"][0].split(self.extractor.nb_max_frames, -1)))
            counts.append(len(mels[-1]))
        mel = torch.cat(mels)
        return {"mel": mel, "frames": torch.full((len(mel),), mel.shape[-1]), "windows": torch.tensor(counts)}

    def audio_tokens(self, samples: int) -> int:
        return -(-samples // self.extractor.n_samples) * self.extractor.nb_max_frames // (2 * self.merged)

    def chat_ids(self, messages: list[Message]) -> list[int]:
        rate, buffer = self.sampling_rate, io.BytesIO()
        soundfile.write(buffer, np.zeros(rate // 10, np.float32), rate, format="wav")
        silence = {"type": "audio", "base64": base64.b64encode(buffer.getvalue()).decode()}
        chat = with_parts(messages, lambda part: silence if part["type"] == "audio" else part)
        ids = self.processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0].tolist()
        return [i for token, run in groupby(ids) for i in ([token] if token == self.audio_id else run)]
