"""The teacher: a Qwen2 of 1.8 million parameters, taught in text from nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from chat import Chat, pad, response_logits
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from world import REPEAT_TASK, SPEAKER_TASK, SPEAKERS, draw

STEPS, BATCH = 800, 128
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
    optimizers = _optimizers(model)
    for step in range(STEPS):
        prompts, responses = zip(*(_example(chat, rng) for _ in range(BATCH)), strict=True)
        batch = pad(list(prompts), list(responses), chat.pad)
        with torch.autocast("cpu", torch.bfloat16):
            logits = response_logits(model, batch, None, chat.audio)
        losses = cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (losses * batch.supervised.flatten()).sum() / batch.supervised.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / 30, (STEPS - step) / (0.6 * STEPS))
            optimizer.step()
            optimizer.zero_grad()
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


def _optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, which it trains in about half the steps; AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
