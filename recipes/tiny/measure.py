"""What the build reports: accuracies with standard errors, word error rate, and the divergences of the method."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from build_hearing import Spoken
from chat import Chat, generate, pad, response_logits
from torch import Tensor
from transformers import PreTrainedModel
from world import REPEAT_TASK, SPEAKER_TASK, Question

CHUNK = 100
Number = dict[str, float]  # {"value", "stderr", "n"}


def accuracy(
    model: PreTrainedModel,
    chat: Chat,
    asked: list[Question],
    data: Spoken | None = None,
    heard: list[Tensor] | None = None,
) -> dict[str, Number]:
    """Share of right greedy answers, overall and by skill; the questions are typed, or heard when `heard` is given."""
    right: dict[str, list[float]] = defaultdict(list)
    for rows, answers in _answers(model, chat, asked, data, heard, ""):
        for row, answer in zip(rows, answers, strict=True):
            ok = float(answer is not None and asked[row].accepts(answer))
            right["all"].append(ok)
            right[asked[row].skill].append(ok)
    return {skill: share(values) for skill, values in right.items()}


def speaker_accuracy(model: PreTrainedModel, chat: Chat, data: Spoken, heard: list[Tensor]) -> Number:
    """Share of clips whose speaker is named rightly."""
    right = []
    for rows, answers in _answers(model, chat, data.questions, data, heard, SPEAKER_TASK):
        right += [float(a == f"{data.speakers[row]}.") for row, a in zip(rows, answers, strict=True)]
    return share(right)


def word_errors(model: PreTrainedModel, chat: Chat, data: Spoken, heard: list[Tensor]) -> Number:
    """Word error rate of repeating what was said; the standard error is over clips."""
    errors, words = [], []
    for rows, answers in _answers(model, chat, data.questions, data, heard, REPEAT_TASK):
        for row, answer in zip(rows, answers, strict=True):
            expected = data.questions[row].question.split()
            errors.append(edit_distance((answer or "").split(), expected))
            words.append(len(expected))
    rate = sum(errors) / sum(words)
    variance = sum((e - rate * w) ** 2 for e, w in zip(errors, words, strict=True))
    return {"value": rate, "stderr": math.sqrt(variance) / sum(words), "n": len(words)}


@torch.no_grad()
def divergences(
    student: PreTrainedModel, teacher: PreTrainedModel, chat: Chat, data: Spoken, heard: list[Tensor]
) -> dict[str, float]:
    """Misalignment and forgetting per gold token, and the reverse KL to the teacher per token the student samples."""
    sums: dict[str, float] = defaultdict(float)
    tokens: dict[str, float] = defaultdict(float)

    def add(name: str, p: Tensor, q: Tensor, mask: Tensor) -> None:
        sums[name] += ((p.exp() * (p - q)).sum(-1) * mask).sum().item()
        tokens[name] += mask.sum().item()

    for start in range(0, len(heard), CHUNK):
        asked = data.questions[start : start + CHUNK]
        audio = torch.cat(heard[start : start + CHUNK])
        spoken = [chat.spoken(n) for n in data.lengths[start : start + CHUNK]]
        typed = [chat.typed(q.question) for q in asked]

        def rows(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], clips: Tensor | None):
            batch = pad(prompts, responses, chat.pad)
            return response_logits(model, batch, clips, chat.audio).log_softmax(-1), batch.supervised

        gold = [chat.response(q.response) for q in asked]
        by_ear, mask = rows(student, spoken, gold, audio)
        by_eye, _ = rows(student, typed, gold, None)
        taught, _ = rows(teacher, typed, gold, None)
        add("misalignment", by_eye, by_ear, mask)
        add("forgetting", taught, by_eye, mask)
        for name, prompts, clips in (("reverse_kl/speech", spoken, audio), ("reverse_kl/text", typed, None)):
            sampled = generate(student, chat, prompts, clips, greedy=False)
            own, mask = rows(student, prompts, sampled, clips)
            taught, _ = rows(teacher, typed, sampled, None)
            add(name, own, taught, mask)
    return {name: total / tokens[name] for name, total in sums.items()}


def share(values: list[float]) -> Number:
    """Mean of zeros and ones with its standard error."""
    mean = sum(values) / len(values)
    return {"value": mean, "stderr": math.sqrt(mean * (1 - mean) / len(values)), "n": len(values)}


def edit_distance(said: list[str], expected: list[str]) -> int:
    """Insertions, deletions and substitutions between two lists of words."""
    row = list(range(len(expected) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(expected, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def _answers(
    model: PreTrainedModel,
    chat: Chat,
    asked: list[Question],
    data: Spoken | None,
    heard: list[Tensor] | None,
    task: str,
) -> list[tuple[range, list[str | None]]]:
    """Greedy answers by chunk of rows; None for one that did not end."""
    found = []
    for start in range(0, len(asked), CHUNK):
        rows = range(start, min(start + CHUNK, len(asked)))
        if heard is None or data is None:
            responses = generate(model, chat, [chat.typed(asked[i].question, task) for i in rows])
        else:
            prompts = [chat.spoken(data.lengths[i], task) for i in rows]
            responses = generate(model, chat, prompts, torch.cat([heard[i] for i in rows]))
        found.append((rows, [chat.text(r) for r in responses]))
    return found
