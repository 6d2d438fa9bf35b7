"""The thinkers of Qwen2.5-Omni (arXiv 2503.20215) and Qwen3-Omni (arXiv 2509.17765): audio and text in, text out.

The tower's last projections play the adapter's part. Vision stays as it is; talker and vocoder are left out of our
checkpoints, whose config is still the full Omni one, as vLLM expects. And Qwen3-ASR, with the tower of Qwen3-Omni.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from opd.models.base import Family
from opd.models.whisper import lengths, log_mel
from opd.settings import UserError


class Omni(Family):
    """What both thinkers share."""

    language_model = "model"
    parts = {"audio_tower.": "tower", "visual.": "fixed"}  # a thinker names its adapter before them
    names = {"": "thinker."}

    def model_config(self, config: Any) -> Any:
        return getattr(config, "thinker_config", config)

    def marks(self) -> list[str]:
        names = ("image", "video", "audio_bos", "audio_eos", "vision_bos", "vision_eos")
        return [getattr(self.processor, f"{name}_token") for name in names]

    def published_config(self) -> Any:
        config = copy.deepcopy(self.full_config)
        if not hasattr(config, "thinker_config"):  # vLLM knows the composite config alone
            config = AutoConfig.for_model(config.model_type.removesuffix("_thinker"), thinker_config=config.to_dict())
        for switch in ("enable_talker", "enable_audio_output"):
            if hasattr(config, switch):
                setattr(config, switch, False)
        return config

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        frames = features["frames"]
        valid = torch.arange(features["mel"].shape[-1], device=frames.device) < frames[:, None]
        packed = features["mel"].permute(0, 2, 1)[valid].permute(1, 0)  # [bins, frames of all clips]
        hidden = before(hf.get_submodule(self.projection), lambda: self.call_tower(hf.audio_tower, packed, frames))
        return list(hidden.split([int(self.embeddings(int(f))) for f in frames]))

    def call_tower(self, tower: Any, packed: Tensor, frames: Tensor) -> Any:
        """Run the tower on frames of all clips one behind the other [bins, sum of F]."""
        return tower(packed, feature_lens=frames)

    @abstractmethod
    def embeddings(self, frames: int) -> int:
        """Audio embeddings of so many frames."""

    def audio_tokens(self, samples: int) -> int:
        return self.embeddings(-(-samples // self.extractor.hop_length))


class Qwen25Omni(Omni):
    """The thinker of Qwen2.5-Omni; text teacher: Qwen2.5-Instruct."""

    model_class = "Qwen2_5OmniThinkerForConditionalGeneration"
    projection = "audio_tower.proj"
    parts = {"audio_tower.proj.": "adapter", **Omni.parts}

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        return log_mel(self.extractor, clips)

    def embeddings(self, frames: int) -> int:
        return int(lengths(frames)[1])

    def audio_tokens(self, samples: int) -> int:
        return super().audio_tokens(min(samples, self.extractor.n_samples))

    def call_tower(self, tower: Any, packed: Tensor, frames: Tensor) -> Any:
        return tower(packed, feature_lens=frames, aftercnn_lens=lengths(frames)[0])


class Qwen3OmniMoe(Omni):
    """The thinker of Qwen3-Omni, a mixture of experts; text teacher: Qwen3-30B-A3B-Instruct."""

    model_class = "Qwen3OmniMoeThinkerForConditionalGeneration"
    projection = "audio_tower.proj1"
    parts = {"audio_tower.proj1.": "adapter", "audio_tower.proj2.": "adapter", **Omni.parts}

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        options = {"sampling_rate": self.sampling_rate, "padding": True, "truncation": False, "return_tensors": "pt"}
        filled = [np.pad(clip, (0, -len(clip) % self.extractor.hop_length)) for clip in clips]  # no further, as in vLLM
        return pad_mels([self.extractor(clip, **options)["input_features"][0] for clip in filled])

    def embeddings(self, frames: int) -> int:
        return convolved(frames, self.config.audio_config.n_window)

    def adapter(self, hf: Any) -> Any:
        tower = hf.audio_tower
        return lambda x: tower.proj2(tower.act(tower.proj1(x)))

    def published(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Experts, fused in memory, one by one."""
        prefix, _, last = self.to_vllm(name).rpartition(".")
        if not prefix.endswith(".experts"):
            yield f"{prefix}.{last}", tensor
            return
        for e, expert in enumerate(tensor):
            if last == "gate_up_proj":
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    yield f"{prefix}.{e}.{part}.weight", half.clone()
            else:
                yield f"{prefix}.{e}.{last}.weight", expert.clone()


class Qwen3Asr(Family):
    """Qwen3-ASR: the tower of Qwen3-Omni, two-layer projector, Qwen3 LLM (arXiv 2601.21337).

    Text teacher: Qwen3 of the same size.
    """

    model_class = "Qwen3ASRForConditionalGeneration"
    names = {}

    def check(self) -> None:
        super().check()
        if not (self.config.get_text_config().tie_word_embeddings or self.config.tie_word_embeddings):
            told = "tie_word_embeddings is false: transformers and vLLM name an output layer of its own differently"
            raise UserError(f"student.path {self.path}: {told}; published checkpoints share it with the embeddings")

    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        options = {"sampling_rate": self.sampling_rate, "return_attention_mask": True, "return_tensors": "pt"}
        outs = [self.extractor(c, **options) for c in clips]
        mels = [out["input_features"][0, :, : int(out["attention_mask"].sum())] for out in outs]
        return pad_mels(mels, 2 * self.config.audio_config.n_window)

    def audio_tokens(self, samples: int) -> int:
        frames = max(samples, self.extractor.min_length) // self.extractor.hop_length
        return convolved(frames, self.config.audio_config.n_window)

    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        mel, frames, tower = features["mel"], features["frames"], hf.model.audio_tower
        mask = (torch.arange(mel.shape[-1], device=mel.device) < frames[:, None]).long()
        hidden = tower(mel.to(tower.conv2d1.weight.dtype), input_features_mask=mask).last_hidden_state
        return list(hidden.split([convolved(int(f), self.config.audio_config.n_window) for f in frames]))


def pad_mels(mels: list[Tensor], multiple: int = 1) -> dict[str, Tensor]:
    """`mel` [C, bins, F] padded to a multiple, and `frames` [C]."""
    frames = [m.shape[-1] for m in mels]
    longest = -(-max(frames) // multiple) * multiple
    mel = torch.stack([torch.nn.functional.pad(m, (0, longest - m.shape[-1])) for m in mels])
    return {"mel": mel, "frames": torch.tensor(frames)}


def convolved(frames: int, window: int) -> int:
    """Embeddings of so many frames after three convolutions of stride 2, in chunks of 2 * window frames."""
    whole, rest = divmod(frames, 2 * window)

    def thrice(f: int) -> int:
        for _ in range(3):
            f = (f - 1) // 2 + 1 if f else 0
        return f

    return whole * thrice(2 * window) + thrice(rest)


def before(module: Any, run: Callable[[], Any]) -> Tensor:
    """What `run` hands to `module`: the input of its only call in there."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    (tensor,) = seen
    return tensor
