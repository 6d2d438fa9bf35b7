"""The student's hearing: a small Whisper-style tower and its adapter, aligned with the teacher's token embeddings.

Every frame of the adapter's output is trained to point where the embedding of the word spoken then points, so the
language model can be taken over from the teacher as it is. Word times come from the synthesizer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import islice

import torch
from build_teacher import language_config
from chat import Chat
from speech import MAX_SECONDS, RATE, Synthesizer, speak
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2ForCausalLM,
    WhisperFeatureExtractor,
)
from world import Question, Split, questions

MEL_BINS, WIDTH, LAYERS, HEAD = 40, 128, 1, 32
POSITIONS = int(MAX_SECONDS * 50)  # frames of 20 ms that the tower attends over while it is trained
FRAME = 0.04  # seconds of one audio embedding: the tower halves its frames at the end
SHIPPED_POSITIONS = 1500  # 30 s: what vLLM's Qwen2-Audio insists on

STEPS, BATCH = 400, 64
MATRIX_LR, LR = 0.01, 2e-3
SHARPNESS = 15.0  # scale of the cosines before the softmax over the vocabulary
BLANK_WEIGHT = 0.4  # of frames between words
SPEAKER_WEIGHT = 0.3
SPAN = (0.20, 0.85)  # the part of a word's time in which its frames are told to be that word


@dataclass(frozen=True)
class Spoken:
    """Spoken questions as the tower reads them. N clips, F mel frames of 10 ms, P = POSITIONS."""

    questions: list[Question]
    speakers: list[str]
    word_starts: list[tuple[float, ...]]  # seconds
    mel: Tensor  # [N, MEL_BINS, F] float16, zero-padded
    frames: Tensor  # [N] frames of 20 ms that hold sound

    @property
    def lengths(self) -> list[int]:
        """Audio embeddings of each clip."""
        return ((self.frames - 2) // 2 + 1).tolist()

    def first(self, count: int) -> Spoken:
        """The first `count` clips."""
        return Spoken(*(getattr(self, field.name)[:count] for field in fields(self)))


def synthesize(split: Split, count: int, seed: int) -> Spoken:
    """Speak `count` questions of a split."""
    synthesizer, rng = Synthesizer(), random.Random(f"hearing/{split}/{seed}")
    asked = list(islice(questions(split, seed), count))
    clips = [speak(synthesizer, q.question, rng) for q in asked]
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=int(MAX_SECONDS))
    mel, frames = [], []
    for i in range(0, count, 250):
        waves = [clip.wave for clip in clips[i : i + 250]]
        features = extractor(
            waves, sampling_rate=RATE, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        mel.append(features.input_features.half())
        frames.append((features.attention_mask.sum(1) - 1) // 2 + 1)
    return Spoken(asked, [c.speaker for c in clips], [c.word_starts for c in clips], torch.cat(mel), torch.cat(frames))


def build_hearing(
    chat: Chat, teacher: Qwen2ForCausalLM, data: Spoken, seed: int, say: Callable[[str], None]
) -> Qwen2AudioForConditionalGeneration:
    """A student with the teacher's language model, and tower and adapter trained on `data`."""
    torch.manual_seed(seed)
    rng = random.Random(f"tower/{seed}")
    student = _untrained(chat, teacher)
    words = teacher.get_input_embeddings().weight.detach().clone()
    directions = normalize(words, dim=-1)
    # Silence points in a direction of its own; the padding row is free for it.
    directions[chat.pad] = normalize(torch.randn(words.shape[1]), dim=-1)
    labels = _labels(chat, data)
    spoken_ids = labels[labels != chat.pad].unique()
    usual_norm = words[spoken_ids].norm(dim=-1).mean()
    speaker_head = nn.Linear(words.shape[1], 1)
    is_woman = torch.tensor([float(s == "woman") for s in data.speakers])
    lengths, order = torch.tensor(data.lengths), []
    tower = student.model.audio_tower
    hearing = nn.ModuleList([tower, student.model.multi_modal_projector, speaker_head])
    optimizers = _optimizers(hearing, tower)
    for step in range(STEPS):
        if len(order) < BATCH:
            order = rng.sample(range(len(lengths)), len(lengths))
        rows, order = order[:BATCH], order[BATCH:]
        with torch.autocast("cpu", torch.bfloat16):
            heard = _run_tower(tower, data.mel[rows], data.frames[rows])
            adapted = student.model.multi_modal_projector(heard).float()  # [B, P/2, H]
        real = (torch.arange(adapted.shape[1]) < lengths[rows][:, None]).float()  # [B, P/2]
        logits = SHARPNESS * normalize(adapted, dim=-1) @ directions.T
        weight = torch.where(labels[rows] == chat.pad, BLANK_WEIGHT, 1.0) * real
        wrong = cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="none").view_as(weight)
        size = (adapted.norm(dim=-1) / usual_norm - 1).square()
        mean = (adapted * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        guess = speaker_head(5 * mean)[:, 0]
        loss = (wrong * weight).sum() / weight.sum() + (size * real).sum() / real.sum()
        loss = loss + SPEAKER_WEIGHT * binary_cross_entropy_with_logits(guess, is_woman[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(hearing.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / 40, (STEPS - step) / (0.6 * STEPS))
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            right = ((logits.argmax(-1) == labels[rows]).float() * weight).sum() / weight.sum()
            say(f"hearing: step {step}, loss {loss.item():.4f}, frames right {right.item():.3f}")
    return student.eval()


@torch.no_grad()
def hear(student: Qwen2AudioForConditionalGeneration, data: Spoken) -> list[Tensor]:
    """What the frozen tower makes of every clip: N tensors [embeddings of the clip, WIDTH]."""
    heard = []
    for i in range(0, len(data.frames), 100):
        chunk = _run_tower(student.model.audio_tower, data.mel[i : i + 100], data.frames[i : i + 100])
        heard += [row[:n].clone() for row, n in zip(chunk, data.lengths[i : i + 100], strict=True)]
    return heard


def set_window(student: Qwen2AudioForConditionalGeneration, positions: int) -> None:
    """Give the tower a window of `positions` frames of 20 ms. It hears the same: padded frames are masked."""
    tower = student.model.audio_tower
    for holder in (tower.config, student.config.audio_config, tower):
        holder.max_source_positions = positions
    tower.embed_positions = nn.Embedding.from_pretrained(_sinusoids(positions, WIDTH), freeze=True)


def _run_tower(tower: nn.Module, mel: Tensor, frames: Tensor) -> Tensor:
    """[B, P/2, WIDTH] of clips [B, MEL_BINS, F]; frames beyond a clip's end are masked, as they are when it serves."""
    mask = torch.arange(POSITIONS) < frames[:, None]
    return tower(mel.float(), attention_mask=mask[:, None, None, :].expand(-1, 1, POSITIONS, -1)).last_hidden_state


def _labels(chat: Chat, data: Spoken) -> Tensor:
    """[N, P/2] the token spoken in each frame, `chat.pad` between words."""
    labels = torch.full((len(data.questions), POSITIONS // 2), chat.pad)
    for row, (question, starts, length) in enumerate(zip(data.questions, data.word_starts, data.lengths, strict=True)):
        ends = [*starts[1:], length * FRAME - 0.06]
        for token, start, end in zip(chat.encode(question.question), starts, ends, strict=True):
            first, last = (int((start + share * (end - start)) / FRAME) for share in SPAN)
            labels[row, first : max(first + 1, last)] = token
    return labels


def _untrained(chat: Chat, teacher: Qwen2ForCausalLM) -> Qwen2AudioForConditionalGeneration:
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": MEL_BINS,
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "encoder_attention_heads": WIDTH // HEAD,
            "encoder_ffn_dim": 4 * WIDTH,
            "max_source_positions": POSITIONS,
        },
        text_config=language_config(chat).to_dict(),
        audio_token_index=chat.audio,
        eos_token_id=chat.end,
        pad_token_id=chat.pad,
    )
    student = Qwen2AudioForConditionalGeneration(config)
    student.model.language_model.load_state_dict(teacher.model.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    tower = student.model.audio_tower
    # Hugging Face initialises the convolutions too small to start from, and the positions at random.
    tower.conv1.reset_parameters()
    tower.conv2.reset_parameters()
    with torch.no_grad():
        tower.conv2.weight.mul_(2)
        tower.embed_positions.weight.copy_(_sinusoids(POSITIONS, WIDTH))
        for layer, offsets in zip(tower.layers, _OFFSETS, strict=False):
            _look_nearby(layer, offsets)
    return student


# Frames of 20 ms before or after, one per head, at which the heads of each layer start to look.
_OFFSETS = ((-8, -3, 3, 8), (-5, -1, 1, 5), (-10, -4, 4, 10), (-6, -2, 2, 6))


def _look_nearby(layer: nn.Module, offsets: tuple[int, ...]) -> None:
    """Start each head looking at one offset: queries are the sinusoids of a shifted position, keys those of their own.

    A word lasts about ten frames; from the usual start, which looks everywhere, training finds that out too slowly.
    """
    attention, half = layer.self_attn, WIDTH // 2
    frequencies = _frequencies(WIDTH)[:HEAD:2]
    query, key = 0.02 * torch.randn(WIDTH, WIDTH), 0.02 * torch.randn(WIDTH, WIDTH)
    for head in range(WIDTH // HEAD):
        for k, frequency in enumerate(frequencies.tolist()):
            row, sine, cosine = head * HEAD + 2 * k, 2 * k, half + 2 * k
            c, s = 1.7 * math.cos(frequency * offsets[head]), 1.7 * math.sin(frequency * offsets[head])
            query[row, sine] += c
            query[row, cosine] += s
            query[row + 1, cosine] += c
            query[row + 1, sine] -= s
            key[row, sine] += 1.7
            key[row + 1, cosine] += 1.7
    attention.q_proj.weight.copy_(query)
    attention.k_proj.weight.copy_(key)
    for module, gain in ((attention.v_proj, 1.0), (attention.out_proj, 0.5), (layer.fc1, 1.0), (layer.fc2, 0.5)):
        nn.init.xavier_uniform_(module.weight, gain)


def _frequencies(width: int) -> Tensor:
    half = width // 2
    return torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))


def _sinusoids(length: int, width: int) -> Tensor:
    """Whisper's positions [length, width]: sines in the first half, cosines in the second."""
    angles = torch.arange(length)[:, None] * _frequencies(width)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _optimizers(hearing: nn.ModuleList, tower: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in tower.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in hearing.parameters() if p.requires_grad and id(p) not in inside]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
