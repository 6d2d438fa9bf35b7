"""What the build scripts share: prompts as token ids, padded batches, log-probabilities, sampling.

Shape legend: B responses, T response tokens, L prompt and response tokens, V vocabulary, H hidden size, W width of the
tower, S audio embeddings (40 ms each) of all clips of a batch, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from build_tokenizer import AUDIO, AUDIO_BEGIN, AUDIO_END
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

LONGEST = 24  # tokens of a response, the end-of-turn token included


class Chat:
    """Renders questions as the chat template does, with the audio placeholder already repeated."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pad, self.end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.audio, self._begin, self._close = tokenizer.convert_tokens_to_ids([AUDIO, AUDIO_BEGIN, AUDIO_END])
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        self._before, self._after = (
            self.encode("<|im_start|>user\n"),
            self.encode("<|im_end|>\n<|im_start|>assistant\n"),
        )
        message = {"role": "user", "content": "sort three one\nrepeat"}
        rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        assert self.typed("sort three one", "\nrepeat") == rendered

    def typed(self, question: str, task: str = "") -> list[int]:
        """Prompt ids of a question that is read."""
        return self._before + self.encode(question) + self.encode(task) + self._after

    def spoken(self, frames: int, task: str = "") -> list[int]:
        """Prompt ids of a question that is heard, as `frames` audio embeddings."""
        clip = [self._begin, *[self.audio] * frames, self._close]
        return self._before + clip + self.encode(task) + self._after

    def response(self, text: str) -> list[int]:
        """Ids of a response with its end-of-turn token."""
        return [*self.encode(text), self.end]

    def text(self, ids: list[int]) -> str | None:
        """The text of sampled ids; None when no end-of-turn token closed them."""
        return self.tokenizer.decode(ids[:-1]) if ids and ids[-1] == self.end else None


@dataclass(frozen=True)
class Padded:
    """Prompts padded on the left and responses on the right, so that all responses start in one column."""

    ids: Tensor  # [B, L]
    mask: Tensor  # [B, L] 1 where a token is
    positions: Tensor  # [B, L]
    start: int  # the column in which responses start

    @property
    def targets(self) -> Tensor:  # [B, T]
        """[B, T], the ids to predict."""
        return self.ids[:, self.start :]

    @property
    def supervised(self) -> Tensor:  # [B, T] 1.0 where a response token is
        """[B, T], 1.0 where a response token is to be predicted."""
        return self.mask[:, self.start :].float()


def pad(prompts: list[list[int]], responses: list[list[int]], padding: int) -> Padded:
    """Pad B prompts and as many responses (empty ones before sampling)."""
    start, tail = max(map(len, prompts)), max(map(len, responses))
    ids, mask = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        left, right = start - len(prompt), tail - len(response)
        ids.append([padding] * left + prompt + response + [padding] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
    masks = torch.tensor(mask)
    return Padded(torch.tensor(ids), masks, (masks.cumsum(1) - 1).clamp(min=0), start)


def embed(model: PreTrainedModel, ids: Tensor, heard: Tensor | None, audio_id: int) -> Tensor:
    """Embeddings [B, L, H] of `ids`, the audio placeholders filled with the adapter's view of `heard` [S, W]."""
    embeddings = model.get_input_embeddings()(ids)
    if heard is None:
        return embeddings
    clips = model.model.multi_modal_projector(heard.float())
    return embeddings.masked_scatter((ids == audio_id)[..., None].expand_as(embeddings), clips.to(embeddings.dtype))


def response_logits(model: PreTrainedModel, batch: Padded, heard: Tensor | None, audio_id: int) -> Tensor:
    """Logits [B, T, V] of every response token given what precedes it."""
    hidden = _language_model(model)(
        inputs_embeds=embed(model, batch.ids, heard, audio_id),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, batch.start - 1 : -1])


@torch.no_grad()
def generate(
    model: PreTrainedModel, chat: Chat, prompts: list[list[int]], heard: Tensor | None = None, greedy: bool = True
) -> list[list[int]]:
    """A response of at most LONGEST tokens to each prompt: the likeliest tokens, or sampled at temperature 1."""
    batch = pad(prompts, [[] for _ in prompts], chat.pad)
    cache_ = DynamicCache(config=_language_model(model).config)
    inputs, mask, positions = embed(model, batch.ids, heard, chat.audio), batch.mask, batch.positions
    done, columns = torch.zeros(len(prompts), dtype=torch.bool), []
    for _ in range(LONGEST):
        hidden = _language_model(model)(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache_, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.lm_head(hidden)
        token = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]
        token = torch.where(done, chat.pad, token)
        columns.append(token)
        mask = torch.cat([mask, (~done).long()[:, None]], 1)
        done = done | (token == chat.end)
        if done.all():
            break
        inputs, positions = model.get_input_embeddings()(token[:, None]), positions[:, -1:] + 1
    rows = torch.stack(columns, 1).tolist()
    return [row[: row.index(chat.end) + 1] if chat.end in row else row for row in rows]


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a Qwen2 or a Qwen2-Audio model, without its head."""
    return getattr(model.model, "language_model", model.model)
