"""What the loop asks of a speech LLM family, and the module that the learner trains. Shape legend in opd/types.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from opd.models.registry import Entry, family_entry
from opd.settings import UserError
from opd.types import BadAudio, Message, joined, with_parts

Part = Literal["tower", "adapter", "llm", "fixed"]  # fixed: never trained, such as a vision tower


class Family(ABC):
    """One speech LLM architecture: inputs, parts, special ids, and names as vLLM's loader knows them.

    The methods that are not abstract do what most families need; a family says the rest in class variables.
    """

    model_class: ClassVar[str]  # in transformers
    # prefix of a parameter's name in memory -> part; any other belongs to the LLM
    parts: ClassVar[dict[str, Part]] = {"model.audio_tower.": "tower", "model.multi_modal_projector.": "adapter"}
    # prefix in memory -> prefix as vLLM loads it; the first that fits
    names: ClassVar[dict[str, str]] = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    }
    language_model: ClassVar[str] = "model.language_model"
    projection: ClassVar[str] = "model.multi_modal_projector"  # where the adapter begins
    audio_marks: ClassVar[tuple[str, ...]] = ()  # further tokens that only a prompt may hold

    entry: Entry  # how it is known and served
    sampling_rate: int
    banned_ids: list[int]  # audio-only ids and padded vocabulary rows: never sampled, in no divergence
    audio_id: int  # placeholder id, one per audio embedding after expansion
    eos_ids: list[int]
    vocab_size: int  # rows of the output layer
    readers: list[tuple[Any, set[int]]]  # tokenizers that texts of records are given to, and their control ids
    tokenizer: Any
    processor: Any

    def __init__(self, path: str) -> None:
        """Read config, tokenizer and processor of the checkpoint; no weights."""
        self.path = path
        self.full_config = transformers.AutoConfig.from_pretrained(path)
        self.config = self.model_config(self.full_config)
        self.processor = transformers.AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.extractor = self.feature_extractor()
        self.sampling_rate = self.extractor.sampling_rate
        self.vocab_size = self.config.get_text_config().vocab_size
        self.audio_id = self.placeholder_id()
        ids = [self.audio_id, *self.tokenizer.convert_tokens_to_ids(self.marks())]
        self.banned_ids = sorted({*ids, *range(len(self.tokenizer), self.vocab_size)})
        self.readers = [(self.tokenizer, control_ids(self.tokenizer) | {*ids})]
        self.eos_ids = self.end_of_turn()
        self.check()

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
        try:
            eos: Any = transformers.GenerationConfig.from_pretrained(self.path).eos_token_id
        except OSError:
            eos = None
        eos = self.tokenizer.eos_token_id if eos is None else eos
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
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    def text_ids(self, tokenizer: Any, messages: list[Message]) -> list[int]:
        """Token ids of a chat of plain strings with the generation prompt, for a text teacher."""
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    def load(self, dtype: torch.dtype, attention: str) -> nn.Module:
        """The Hugging Face model of this checkpoint."""
        return getattr(transformers, self.model_class).from_pretrained(
            self.path, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )

    def outline(self) -> nn.Module:
        """The Hugging Face model without weights, on torch's meta device."""
        with torch.device("meta"):
            return getattr(transformers, self.model_class)(self.config)

    def published_config(self) -> Any:
        """The config of our checkpoints: that of the one which was read, in most families."""
        return self.full_config

    def save(self, hf: Any, parameters: dict[str, Tensor], folder: Path) -> None:
        """Write a model as files: `parameters` by their names in memory, without adapters, and the buffers of `hf`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_extras(hf, folder)
        own = {name for name, _ in hf.named_parameters(remove_duplicate=False)}  # others: such as of batch norms
        state = parameters | {n: b.detach().cpu() for n, b in hf.state_dict().items() if n not in own}
        save_torch_state_dict({n: v for name, x in state.items() for n, v in self.published(name, x)}, folder)
        self.save_other_weights(state, folder)

    def save_extras(self, hf: Any, folder: Path) -> None:
        """Everything of a checkpoint but the weights: config, generation config, processor."""
        self.published_config().save_pretrained(folder)
        hf.generation_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def save_other_weights(self, state: dict[str, Tensor], folder: Path) -> None:  # noqa: B027 - most have none
        """Weights in a further format, for vLLM, where it does not read the one of transformers."""

    def part_of(self, name: str) -> Part:
        """Which part a parameter belongs to, by its Hugging Face name in memory."""
        return next((part for prefix, part in self.parts.items() if name.startswith(prefix)), "llm")

    def to_vllm(self, name: str) -> str:
        """A parameter's name as vLLM's `load_weights` wants it, which is also its name in published checkpoints."""
        prefix = next((p for p in self.names if name.startswith(p)), "")
        return self.names.get(prefix, "") + name.removeprefix(prefix)

    def published(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One parameter in memory as vLLM and published checkpoints hold it: (name, tensor), several if split there."""
        yield self.to_vllm(name), tensor

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
        return hf.get_submodule(self.projection)

    def run_llm(self, hf: Any, embeds: Tensor, position_ids: Tensor, bias: Tensor) -> Tensor:
        """Embeddings [R, L, H], positions [R, L], additive attention bias [R, 1, L, L] -> last hidden states."""
        llm = hf.get_submodule(self.language_model)
        out = llm(inputs_embeds=embeds, position_ids=position_ids, attention_mask=bias, use_cache=False)
        return out.last_hidden_state

    def scaled(self, logits: Tensor) -> Tensor:
        """What the model does to the output layer's logits [..., V]: nothing, in most families."""
        return logits

    def chat_ids(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat with the generation prompt, one audio placeholder per clip."""
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def refuse_control(self, text: str) -> None:
        """Raise BadAudio when a tokenizer of student or teacher makes a control token of what a text spells."""
        for tokenizer, control in self.readers:
            found = next((i for i in tokenizer(text, add_special_tokens=False).input_ids if i in control), None)
            if found is not None:
                token = tokenizer.convert_ids_to_tokens(found)
                raise BadAudio(f"its text, transcript or response contains {token}, a control token; take it out")

    def prompt_ids(self, messages: list[Message], clip_samples: list[int]) -> list[int]:
        """Token ids of a chat with the generation prompt, every audio placeholder expanded to its S ids.

        Raises BadAudio when a text of the chat spells a control token, such as the placeholder itself.
        """
        for message in with_parts(messages, lambda part: part | {"text": part.get("text", "")}):
            self.refuse_control(joined(message)["content"])
        ids = self.chat_ids(messages)
        assert ids.count(self.audio_id) == len(clip_samples), "the chat template dropped an audio part"
        lengths = map(self.audio_tokens, clip_samples)
        return [i for token in ids for i in [token] * (next(lengths) if token == self.audio_id else 1)]


def control_ids(tokenizer: Any) -> set[int]:
    """Ids that steer a model, such as ends of turns: no text of a record may have them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} if isinstance(added, dict) else set()
    return (special | {*tokenizer.all_special_ids}) - {tokenizer.unk_token_id}


def family_of(path: str, name: str | None = None) -> Family:
    """The family of a checkpoint, by its name, else by the `model_type` of its config.

    Raises UserError when it is not one of ours.
    """
    entry = family_entry(path, name)
    try:
        family: Family = entry.load_class()(path)
    except (OSError, ValueError) as e:
        raise UserError(f"student.path {path}: not a loadable {entry.name} checkpoint: {str(e).splitlines()[0]}") from e
    family.entry = entry
    return family
