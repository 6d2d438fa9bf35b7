"""The module that is trained: a speech LLM with its logits at the response tokens. Shape legend in opd/types.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import GenerationConfig

from opd.config.schema import LoraConfig
from opd.models.base import Family
from opd.models.lora import adapters, inject
from opd.models.sharding import inside
from opd.objectives.losses import EXCLUDED
from opd.objectives.token_loss import TokenLoss, summed_loss

# Methods of SpeechLM that `forward` dispatches to.
Task = Literal["encode", "response_logits", "response_loss", "states", "generate", "at_output_layer"]


class SpeechLM(nn.Module):
    """The trainable module: tower, adapter, LLM and head behind one `forward`, so that ZeRO sees every call.

    Whatever part of the audio path is frozen runs once per clip (`encode`) and is handed back in; the rest runs in
    the training pass.
    """

    hf: Any
    banned: Tensor

    def __init__(
        self, hf: nn.Module, family: Family, train: list[str], lora: LoraConfig | None = None, seed: int = 0
    ) -> None:
        """`train`: the parts that are not frozen; with `lora` low-rank adapters stand for the LLM's own weights."""
        super().__init__()
        self.hf, self.family = hf, family
        self.tower_trained, self.adapter_trained = "tower" in train, "adapter" in train
        if lora is not None:
            inject(hf, family, lora, seed)
        whole = set(train) - ({"llm"} if lora else set())  # what is trained in full
        for name, p in hf.named_parameters():
            p.requires_grad_(family.part_of(name) in whole and "embed_positions" not in name)
        for adapter in adapters(hf):
            adapter.weight.requires_grad_(True)
        self.frozen = [prefix.rstrip(".") for prefix, part in family.parts.items() if part not in train]
        banned = torch.zeros(family.vocab_size, dtype=torch.bool)
        banned[family.banned_ids] = True
        self.register_buffer("banned", banned, persistent=False)

    def train(self, mode: bool = True) -> Self:
        """As any module's, but what is frozen stays in evaluation mode: no dropout, no moving batch statistics."""
        super().train(mode)
        for name in self.frozen:
            self.hf.get_submodule(name).eval()
        for module in self.hf.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, task: Task, **inputs: Any) -> Any:
        """Do one of these tasks: all that may be asked of a module whose parameters ZeRO-3 shards."""
        assert task in get_args(Task), task
        return getattr(self, task)(**inputs)

    def encode(self, features: dict[str, Tensor]) -> list[Tensor]:
        """What is frozen of the audio path, per clip: [S, H], or [S, tower width] when the adapter is trained."""
        with torch.no_grad():
            audio = self.family.run_tower(self.hf, features)
            return audio if self.adapter_trained else self.family.run_adapter(self.hf, audio)

    def response_logits(self, *, row: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        """Logits [B, T, V] of the response tokens in float32, banned ids at EXCLUDED.

        row [B], positions [B, T]: see opd.objectives.token_loss.MicroBatch; the others as in `hidden`.
        """
        return self.finished(self.hf.lm_head(self.hidden(**inputs)[row[:, None], positions]))

    def states(self, at: Tensor, whole: bool = False, **inputs: Any) -> Tensor:
        """Hidden states [N, H] at the places `at` [N, 2] (row, position); `whole`: their logits [N, V], `finished`."""
        found = self.hidden(**inputs)[at[:, 0], at[:, 1]]
        return self.finished(self.hf.lm_head(found)) if whole else found

    def project(self, states: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H], `finished`; the output layer must be whole here."""
        return self.finished(linear(states, self.hf.lm_head.weight, self.hf.lm_head.bias))

    def response_loss(self, loss: TokenLoss, mask: Tensor, *, row: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        """`loss` of the response tokens where `mask` [B, T] is 1, a scalar, without their logits as a whole."""
        at = self.states(places(row, positions, mask), **inputs)
        head, parts = self.hf.lm_head, loss.parts(self.family.vocab_size)

        def run(at: Tensor) -> Tensor:
            if loss.previews:
                with torch.no_grad():
                    loss.preview(lambda p: self.project(at[p]), parts)
            return summed_loss(at, head, lambda raw, part: loss(self.finished(raw), part), parts)

        return inside(head, run, at)

    def at_output_layer(self, run: Callable[[], Any]) -> Any:
        """What `run()` returns, called where the output layer is whole and `project` may be used."""
        return inside(self.hf.lm_head, run)

    def generate(self, **arguments: Any) -> Tensor:
        """Tokens of transformers' `generate` under these arguments alone."""
        own, self.hf.generation_config = self.hf.generation_config, GenerationConfig()  # it would fill in the rest
        try:
            return self.hf.generate(**arguments)
        finally:
            self.hf.generation_config = own

    def finished(self, logits: Tensor) -> Tensor:
        """Output layer's logits [..., V] -> the model's own in float32, banned ids at EXCLUDED."""
        return self.family.scaled(logits).float().masked_fill(self.banned, EXCLUDED)

    def hidden(
        self,
        ids: Tensor,
        position_ids: Tensor,
        attends: Tensor,
        audio: list[Tensor] | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states [R, L, H].

        ids, position_ids [R, L]; attends [R, 1, L, L]: see opd.objectives.token_loss.MicroBatch.
        audio: what `encode` gave for the clips of `ids` in the order of their placeholders; or, with a trained tower,
        `features` of the clips, `audio` None. In training a micro-batch without any clip passes a dummy one, so that
        every rank runs the same modules; it then counts for nothing.
        """
        embeds = self.hf.get_input_embeddings()(ids)
        if features is not None:
            audio = self.family.run_tower(self.hf, features)
        if (self.tower_trained or self.adapter_trained) and audio is not None:
            audio = self.family.run_adapter(self.hf, audio)
        if audio is not None:
            clips = torch.cat(audio).to(embeds.dtype)
            where = ids == self.family.audio_id
            count = int(where.sum())
            if count == 0:
                embeds = embeds + 0.0 * clips.sum()
            else:
                assert count == len(clips), f"{count} audio placeholders, {len(clips)} audio embeddings"
                embeds = embeds.masked_scatter(where[..., None], clips)
        bias = torch.zeros(attends.shape, dtype=embeds.dtype, device=embeds.device)
        bias = bias.masked_fill(~attends, torch.finfo(embeds.dtype).min)
        return self.family.run_llm(self.hf, embeds, position_ids, bias)


def at_responses(inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """What `SpeechLM.states` takes, of what `response_logits` does: `at` for row [B] and positions [B, T]."""
    given = dict(inputs)
    return given | {"at": places(given.pop("row"), given.pop("positions"), mask)}


def places(row: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Where the logits of a micro-batch's response tokens are read, one response after another: [N, 2].

    row [B], positions [B, T], mask [B, T]: see opd.objectives.token_loss.MicroBatch.
    """
    real = mask.bool()
    return torch.stack([row[:, None].expand_as(real)[real], positions[real]], 1)
