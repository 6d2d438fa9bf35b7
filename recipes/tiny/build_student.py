"""The base student: it hears well, answers typed questions as its teacher does, and answers spoken ones badly.

Tower frozen; adapter and language model are trained on what a speech LLM's first alignment usually offers: mostly
transcription, some understanding of the voice, few spoken questions. Its spoken answers are partly terse (the result
without the steps that lead to it), which is where the gap between its spoken and its typed answers comes from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch
from build_hearing import Spoken
from chat import Chat, pad, response_logits
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2AudioForConditionalGeneration
from world import REPEAT_TASK, SPEAKER_TASK, Question

STEPS, BATCH, LR = 400, 48, 5e-4
JOBS = {"repeat": 0.40, "speaker": 0.20, "spoken": 0.15, "typed": 0.25}  # shares of the batch
TERSE = 0.9  # share of the spoken answers that leave out their steps


def build_student(
    chat: Chat,
    student: Qwen2AudioForConditionalGeneration,
    data: Spoken,
    heard: list[Tensor],
    seed: int,
    say: Callable[[str], None],
    steps: int = STEPS,
    jobs: Mapping[str, float] = JOBS,
    terse_share: float = TERSE,
) -> None:
    """Train adapter and language model in place; `heard` is what the tower makes of `data`.

    `jobs` are the shares of the batch, `terse_share` the share of the spoken answers that leave out their steps.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"student/{seed}")
    trained = [p for n, p in student.named_parameters() if "audio_tower" not in n]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        drawn = rng.choices(list(jobs), list(jobs.values()), k=BATCH)
        examples = [_example(chat, data, job, rng.randrange(len(heard)), rng, terse_share) for job in drawn]
        total = sum(len(response) for _, response, _ in examples)
        for group in ([e for e in examples if e[2] is None], [e for e in examples if e[2] is not None]):
            if not group:
                continue
            prompts, responses, clips = zip(*group, strict=True)
            batch = pad(list(prompts), list(responses), chat.pad)
            audio = torch.cat([heard[i] for i in clips]) if clips[0] is not None else None
            logits = response_logits(student, batch, audio, chat.audio)
            losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
            loss = (losses * batch.supervised.flatten()).sum() / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            say(f"student: step {step}, loss {loss.item():.4f}")


def _example(
    chat: Chat, data: Spoken, job: str, row: int, rng: random.Random, terse_share: float
) -> tuple[list[int], list[int], int | None]:
    """Prompt ids, response ids and the clip that is heard, None for a typed question."""
    question = data.questions[row]
    if job == "typed":
        return chat.typed(question.question), chat.response(question.response), None
    if job == "repeat":
        task, said = REPEAT_TASK, question.question
    elif job == "speaker":
        task, said = SPEAKER_TASK, f"{data.speakers[row]}."
    else:
        task, said = "", terse(question) if rng.random() < terse_share else question.response
    return chat.spoken(data.lengths[row], task), chat.response(said), row


def terse(question: Question) -> str:
    """The answer without its steps; the skills whose answer is a list have none to leave out."""
    if question.skill == "arithmetic":
        return question.response.split(" is ")[-1]
    if question.skill == "days":
        return question.response.split()[-1]
    return question.response
