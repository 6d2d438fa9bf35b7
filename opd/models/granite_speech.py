"""Granite-Speech: Conformer tower, windowed Q-Former, Granite LLM (arXiv 2505.08699).

Text teacher: the Granite instruct LLM of the same generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.models.base import Family
from opd.models.omni import pad_mels
from opd.models.sharding import all_reduce
from opd.settings import UserError


class GraniteSpeech(Family):
    """Inputs, parts and names of Granite-Speech.

    The tower masks no padding: clips go through it one at a time. Its batch norms stay as they are.
    """

    model_class = "GraniteSpeechForConditionalGeneration"
    parts = {"model.encoder.": "tower", "model.projector.": "adapter"}

    def feature_extractor(self) -> Any:
        return self.processor.audio_processor

    def check(self) -> None:
        super().check()
        if self.config.has_lora_adapter:
            told = "has_lora_adapter is true: its LLM needs a LoRA adapter for audio and none for text"
            remedy = "merge the adapter into the weights and set has_lora_adapter to false"
            raise UserError(f"student.path {self.path}: {told}; {remedy}")

    def part_of(self, name: str) -> Any:
        return "fixed" if ".batch_norm." in name else super().part_of(name)

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        return pad_mels([self.extractor(clip)["input_features"][0].T for clip in clips])

    def audio_tokens(self, samples: int) -> int:
        return int(self.extractor._get_num_audio_features([samples])[0])

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        encoder = hf.model.encoder
        dtype = encoder.input_linear.weight.dtype
        frames = features["frames"].tolist()
        mels = [mel[:, :f].T[None].to(dtype) for mel, f in zip(features["mel"], frames, strict=True)]
        return one_by_one(encoder, mels, lambda mel: encoder(mel).last_hidden_state[0])

    def run_adapter(self, hf: Any, audio: list[Tensor]) -> list[Tensor]:
        """The Q-Former makes a few embeddings of each window of tower outputs."""
        return one_by_one(hf.model.projector, audio, lambda clip: hf.model.projector(clip[None])[0])

    def scaled(self, logits: Tensor) -> Tensor:
        return logits / self.config.text_config.logits_scaling


def one_by_one(module: Any, inputs: list[Tensor], run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`run` on each input, as often on every rank when ZeRO-3 shards `module`: its collectives wait for each other.

    What a rank runs besides its own counts for nothing.
    """
    most = len(inputs)
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        most = int(all_reduce(torch.tensor(float(most)), "max"))
    outputs = [run(x) for x in inputs]
    for _ in range(most - len(inputs)):
        outputs[0] = outputs[0] + 0.0 * run(inputs[0]).sum()
    return outputs
