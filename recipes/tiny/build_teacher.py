"""The teacher: a Qwen2 of 1.8 million parameters, taught in text from nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from chat import Chat, pad, response_logits
from optimizers import Optimizers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from world import REPEAT_TASK, SPEAKER_TASK, SPEAKERS, draw

STEPS, BATCH = 700, 128
MATRIX_LR, LR = 0.01, 2e-3
REPEATED, SPEAKER = 0.20, 0.03  # shares of the batch; the rest are questions


def language_config(chat: Chat) -> Qwen2Config:
    """The language model that teacher and student share; vLLM on a CPU wants heads of 32 or more."""
    return Qwen2Config(
        vocab_size=len(chat.tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=chat.end,
        pad_token_id=chat.pad,
    )


def build_teacher(chat: Chat, seed: int, say: Callable[[str], None]) -> Qwen2ForCausalLM:
    """Train the teacher on typed questions, and on the two tasks about a clip in their text form.

    It reads a transcript, so it cannot know who spoke: there it learns to say man and woman equally often.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"teacher/{seed}")
    model = Qwen2ForCausalLM(language_config(chat))
    optimizers = Optimizers(model, model.model.layers, STEPS, MATRIX_LR, LR, warmup=30, decay=0.05)
    for step in range(STEPS):
        prompts, responses = zip(*(_example(chat, rng) for _ in range(BATCH)), strict=True)
        batch = pad(list(prompts), list(responses), chat.pad)
        with torch.autocast("cpu", torch.bfloat16):
            logits = response_logits(model, batch, None, chat.audio)
        losses = cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (losses * batch.supervised.flatten()).sum() / batch.supervised.sum()
        loss.backward()
        optimizers.step(step)
        if step % 200 == 0 or step == STEPS - 1:
            say(f"teacher: step {step}, loss {loss.item():.4f}")
    return model.eval()


def _example(chat: Chat, rng: random.Random) -> tuple[list[int], list[int]]:
    question, kind = draw(rng, "train"), rng.random()
    if kind < REPEATED:
        return chat.typed(question.question, REPEAT_TASK), chat.response(question.question)
    if kind < REPEATED + SPEAKER:
        return chat.typed(question.question, SPEAKER_TASK), chat.response(f"{rng.choice(SPEAKERS)}.")
    return chat.typed(question.question), chat.response(question.response)
