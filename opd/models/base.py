"""What the loop asks of a speech LLM family, and the module that the learner trains.

Shape legend in opd/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from opd.audio import BadAudio
from opd.config import LoraConfig, UserError
from opd.divergences import EXCLUDED
from opd.families import Entry
from opd.models.lora import adapters, inject
from opd.sharding import inside
from opd.token_loss import TokenLoss, summed_loss
from opd.types import Message

Part = Literal["tower", "adapter", "llm", "fixed"]  # fixed: never trained, such as a vision tower


class Family(ABC):
    """One speech LLM architecture: inputs, parts, special ids, and names as vLLM's loader knows them.

    The methods that are not abstract do what most families need; a family says the rest in class variables.
    """

    model_class: ClassVar[str]  # in transformers
    parts: ClassVar[dict[str, Part]]  # prefix of a parameter's name in memory -> part; any other belongs to the LLM
    names: ClassVar[dict[str, str]]  # prefix in memory -> prefix as vLLM loads it; the first that fits
    language_model: ClassVar[str] = "model.language_model"
    audio_marks: ClassVar[tuple[str, ...]] = ()  # further tokens that only a prompt may hold

    entry: Entry  # how it is known and served
    sampling_rate: int
    banned_ids: list[int]  # audio-only ids and padded vocabulary rows: never sampled, in no divergence
    audio_id: int  # placeholder id, one per audio embedding after expansion
    eos_ids: list[int]
    vocab_size: int  # rows of the output layer
    tokenizer: Any
    processor: Any

    def __init__(self, path: str) -> None:
        """Read config, tokenizer and processor of the checkpoint; no weights."""
        from transformers import AutoConfig, AutoProcessor

        self.path = path
        self.full_config = AutoConfig.from_pretrained(path)
        self.config = self.model_config(self.full_config)
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.extractor = self.feature_extractor()
        self.sampling_rate = self.extractor.sampling_rate
        self.vocab_size = self.config.get_text_config().vocab_size
        self.audio_id = self.placeholder_id()
        ids = [self.audio_id, *self.tokenizer.convert_tokens_to_ids(self.marks())]
        self.banned_ids = sorted({*ids, *range(len(self.tokenizer), self.vocab_size)})
        self.eos_ids = self.end_of_turn()
        self.check()

    # ---- what the checkpoint holds --------------------------------------------------------------------------------

    def model_config(self, config: Any) -> Any:
        """The part of the checkpoint's config that describes the speech LLM: all of it, but for composite models."""
        return config

    def feature_extractor(self) -> Any:
        """The processor's part that turns waveforms into features."""
        return self.processor.feature_extractor

    def placeholder_id(self) -> int:
        """Id of the token that stands for a clip."""
        return int(self.tokenizer.convert_tokens_to_ids(self.processor.audio_token))

    def marks(self) -> list[str]:
        """Tokens besides the placeholder that a response may not hold."""
        around = [getattr(self.processor, f"audio_{end}_token", None) for end in ("bos", "eos")]
        return [*self.audio_marks, *(token for token in around if token is not None)]

    def end_of_turn(self) -> list[int]:
        """Ids that end a response, from generation_config.json, else the tokenizer's."""
        from transformers import GenerationConfig

        try:
            eos: Any = GenerationConfig.from_pretrained(self.path).eos_token_id
        except OSError:
            eos = None
        eos = eos if eos is not None else self.tokenizer.eos_token_id
        return sorted(set(eos if isinstance(eos, list) else [eos]))

    @cached_property
    def turn_end(self) -> int:
        """The stop id that the chat template puts behind an answer; some models stop at others as well."""
        ask: Message = {"role": "user", "content": [{"type": "text", "text": "Is it?"}]}
        answered = self.prompt_ids([ask, {"role": "assistant", "content": "Yes."}, ask], [])
        behind = answered[len(self.prompt_ids([ask], [])) :]
        return next((i for i in behind if i in self.eos_ids), self.eos_ids[0])

    def check(self) -> None:
        """Raise UserError for a checkpoint that this family cannot train."""
        if self.processor.chat_template is None:
            raise UserError(f"student.path {self.path}: the processor has no chat template")

    def text_tokenizer(self, path: str) -> Any:
        """The tokenizer of a text teacher. Raises OSError or ValueError when there is none."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    def text_ids(self, tokenizer: Any, messages: list[Message]) -> list[int]:
        """Token ids of a chat of plain strings with the generation prompt, for a text teacher."""
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    def load(self, dtype: torch.dtype, attention: str) -> nn.Module:
        """The Hugging Face model of this checkpoint."""
        import transformers

        return getattr(transformers, self.model_class).from_pretrained(
            self.path, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )

    def outline(self) -> nn.Module:
        """The Hugging Face model without weights, on torch's meta device."""
        import transformers

        with torch.device("meta"):
            return getattr(transformers, self.model_class)(self.config)

    def save_extras(self, hf: Any, folder: Path) -> None:
        """Everything of a checkpoint but the weights: config, generation config, processor."""
        self.full_config.save_pretrained(folder)
        hf.generation_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def save_other_weights(self, state: dict[str, Tensor], folder: Path) -> None:  # noqa: B027 - most have none
        """Weights in a further format, for vLLM, where it does not read the one of transformers."""

    # ---- parts and names ------------------------------------------------------------------------------------------

    def part_of(self, name: str) -> Part:
        """Which part a parameter belongs to, by its Hugging Face name in memory."""
        return next((part for prefix, part in self.parts.items() if name.startswith(prefix)), "llm")

    def to_vllm(self, name: str) -> str:
        """A parameter's name as vLLM's `load_weights` wants it, which is also its name in published checkpoints."""
        for prefix, published in self.names.items():
            if name.startswith(prefix):
                return published + name.removeprefix(prefix)
        return name

    def published(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One parameter in memory as vLLM and published checkpoints hold it: (name, tensor), several if split there."""
        yield self.to_vllm(name), tensor

    # ---- inputs and forward ---------------------------------------------------------------------------------------

    @abstractmethod
    def features(self, clips: list[np.ndarray]) -> dict[str, Tensor]:
        """Model inputs of waveforms, such as `mel` [C, bins, F] and `frames` [C]."""

    @abstractmethod
    def audio_tokens(self, samples: int) -> int:
        """Audio embeddings S of a clip of so many samples."""

    @abstractmethod
    def run_tower(self, hf: Any, features: dict[str, Tensor]) -> list[Tensor]:
        """Tower output per clip, each [S, tower width] (or as this family's adapter takes it)."""

    def run_adapter(self, hf: Any, audio: list[Tensor]) -> list[Tensor]:
        """What `run_tower` gave, per clip -> embeddings per clip, each [S, H]."""
        return list(self.adapter(hf)(torch.cat(audio)).split([len(a) for a in audio]))

    def adapter(self, hf: Any) -> Any:
        """The module between tower and LLM, when it works on one embedding at a time."""
        return hf.model.multi_modal_projector

    def run_llm(self, hf: Any, embeds: Tensor, position_ids: Tensor, bias: Tensor) -> Tensor:
        """Embeddings [R, L, H], positions [R, L], additive attention bias [R, 1, L, L] -> last hidden states."""
        llm = hf.get_submodule(self.language_model)
        out = llm(inputs_embeds=embeds, position_ids=position_ids, attention_mask=bias, use_cache=False)
        return out.last_hidden_state

    def scaled(self, logits: Tensor) -> Tensor:
        """What the model does to the output layer's logits [..., V]: nothing, in most families."""
        return logits

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

    def train(self, mode: bool = True) -> SpeechLM:
        """As any module's, but what is frozen stays in evaluation mode: no dropout, no moving batch statistics."""
        super().train(mode)
        for name in self.frozen:
            self.hf.get_submodule(name).eval()
        for module in self.hf.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(
        self,
        features: dict[str, Tensor] | None = None,
        loss: TokenLoss | None = None,
        mask: Any = None,
        at: Tensor | None = None,
        generate: dict[str, Any] | None = None,
        run: Callable[[], Any] | None = None,
        **text: Any,
    ) -> Any:
        """`encode` without text; else `response_logits`, with `at` `states`, with `loss` and `mask` `response_loss`.

        `generate`: arguments of transformers' `generate`, whose tokens are given back. `run`: what it returns, called
        where the output layer is whole and `project` may be used.
        """
        if generate is not None:
            return self._generate(generate)
        if run is not None:
            return inside(self.hf.lm_head, run)
        if not text:
            return self.encode(features)
        if at is not None:
            return self.states(at, features=features, **text)
        if loss is None:
            return self.response_logits(features=features, **text)
        return self.response_loss(loss, mask, features=features, **text)

    def encode(self, features: dict[str, Tensor] | None) -> list[Tensor]:
        """What is frozen of the audio path, per clip: [S, H], or [S, tower width] when the adapter is trained."""
        assert features is not None
        with torch.no_grad():
            audio = self.family.run_tower(self.hf, features)
            return audio if self.adapter_trained else self.family.run_adapter(self.hf, audio)

    def response_logits(self, *, row: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        """Logits [B, T, V] of the response tokens in float32, banned ids at EXCLUDED.

        row [B], positions [B, T]: see opd.batch.MicroBatch; the others as in `hidden`.
        """
        hidden = self.hidden(**inputs)[row[:, None], positions]
        head: Any = self.hf.lm_head
        return self.finished(head(hidden))

    def states(self, at: Tensor, whole: bool = False, **inputs: Any) -> Tensor:
        """Hidden states [N, H] at the places `at` [N, 2] (row, position); `whole`: their logits [N, V], `finished`."""
        found = self.hidden(**inputs)[at[:, 0], at[:, 1]]
        head: Any = self.hf.lm_head
        return self.finished(head(found)) if whole else found

    def project(self, states: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H], `finished`; the output layer must be whole here."""
        head: Any = self.hf.lm_head
        return self.finished(linear(states, head.weight, head.bias))

    def response_loss(self, loss: TokenLoss, mask: Tensor, *, row: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        """`loss` of the response tokens where `mask` [B, T] is 1, a scalar, without their logits as a whole."""
        at = self.states(places(row, positions, mask), **inputs)
        head: Any = self.hf.lm_head
        parts = loss.parts(self.family.vocab_size)

        def run(at: Tensor) -> Tensor:
            if loss.previews:
                with torch.no_grad():
                    loss.preview(lambda p: self.project(at[p]), parts)
            return summed_loss(at, head, lambda raw, part: loss(self.finished(raw), part), parts)

        return inside(head, run, at)

    def _generate(self, arguments: dict[str, Any]) -> Tensor:
        from transformers import GenerationConfig

        hf: Any = self.hf
        own, hf.generation_config = hf.generation_config, GenerationConfig()  # it would fill in what is not said
        try:
            return hf.generate(**arguments)
        finally:
            hf.generation_config = own

    def finished(self, logits: Tensor) -> Tensor:
        """Output layer's logits [..., V] -> the model's own in float32, banned ids at EXCLUDED."""
        return self.family.scaled(logits).float().masked_fill(self.banned, EXCLUDED)  # type: ignore[arg-type]

    def hidden(
        self,
        ids: Tensor,
        position_ids: Tensor,
        attends: Tensor,
        audio: list[Tensor] | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states [R, L, H].

        ids, position_ids [R, L]; attends [R, 1, L, L]: see opd.batch.MicroBatch.
        audio: what `encode` gave for the clips of `ids` in the order of their placeholders; or, with a trained tower,
        `features` of the clips, `audio` None. In training a micro-batch without any clip passes a dummy one, so that
        every rank runs the same modules; it then counts for nothing.
        """
        embed: Any = self.hf.get_input_embeddings
        embeds = embed()(ids)
        if features is not None:
            audio = self.family.run_tower(self.hf, features)
        if (self.tower_trained or self.adapter_trained) and audio is not None:
            audio = self.family.run_adapter(self.hf, audio)
        if audio is not None:
            heard = torch.cat(audio).to(embeds.dtype)
            where = ids == self.family.audio_id
            count = int(where.sum())
            if count == 0:
                embeds = embeds + 0.0 * heard.sum()
            else:
                assert count == len(heard), f"{count} audio placeholders, {len(heard)} audio embeddings"
                embeds = embeds.masked_scatter(where[..., None], heard)
        bias = torch.zeros(attends.shape, dtype=embeds.dtype, device=embeds.device)
        bias = bias.masked_fill(~attends, torch.finfo(embeds.dtype).min)
        return self.family.run_llm(self.hf, embeds, position_ids, bias)


def at_responses(inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """What `SpeechLM.states` takes, of what `response_logits` does: `at` for row [B] and positions [B, T]."""
    given = dict(inputs)
    return given | {"at": places(given.pop("row"), given.pop("positions"), mask)}


def places(row: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Where the logits of a micro-batch's response tokens are read, one response after another: [N, 2].

    row [B], positions [B, T], mask [B, T]: see opd.batch.MicroBatch.
    """
    real = mask.bool()
    return torch.stack([row[:, None].expand_as(real)[real], positions[real]], 1)
