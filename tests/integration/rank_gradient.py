"""One rank of two: the gradient that ZeRO-3 steps with, of every kind of objective, against a whole plain model's."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import plain_losses

from opd.config import needs
from opd.config.load import load_config
from opd.config.schema import Config
from opd.models.base import Family, family_of
from opd.models.speech_lm import SpeechLM
from opd.models.tiny import build
from opd.objectives.losses import EXCLUDED
from opd.objectives.token_loss import Logits
from opd.train.batch import collate, make_batch, make_samples
from opd.train.learner import Learner
from opd.types import Prompt, Rollout, Sample, ScoredRollout, View

ON, MIXED = "rollout.source=student", ["rollout.source=mix", "train.prompts_per_step=4"]
CASES = {
    "xopd": ["objective.name=xopd", "objective.advantage_clip=1.5", "objective.ratio_max=1.2", ON],
    "xopd, by token, speech": ["objective.name=xopd", "objective.average=token", "objective.lambda=0", ON],
    "kd": ["objective.name=kd", "objective.mu=0.7", "rollout.source=teacher"],
    "reverse_kl of best": ["objective.name=reverse_kl", "objective.top_k=5", ON],
    "jsd, mixed": ["objective.name=jsd", "objective.beta=0.3", *MIXED],
    "cord": ["objective.name=cord", "objective.cord_decay=0.8", ON],
}
ANSWERS: list[tuple[int, str, View, tuple[int, ...]]] = [  # of both ranks: rank, clip, view, response
    *((0, "a", "speech", (100 + i, 101, 2)) for i in range(3)),
    (0, "a", "speech", (110, 111, 112, 113, 114, 2)),
    (0, "a", "text", (120, 2)),
    (1, "b", "text", (130, 131, 2)),
    (1, "b", "text", (132, 2)),
    (1, "c", "speech", (105, 2)),
]


def scored(config: Config, banned: list[int], vocab: int) -> list[tuple[int, ScoredRollout]]:
    """Rollouts of both ranks with log-probs of a sampler, a teacher, and ids of their best: all drawn by content."""
    found = []
    for rank, clip, view, tokens in ANSWERS:
        part = {"type": "audio", "path": clip, "transcript": f"what is {clip} one plus two"}
        prompt = Prompt(clip, ({"role": "user", "content": [part]},))
        rng = np.random.default_rng(zlib.crc32(repr((clip, view, tokens)).encode()))
        own = config.rollout.source == "student" or (config.rollout.source == "mix" and clip == "a")
        logp = rng.normal(-6.0, 1.0, len(tokens)).astype(np.float32)
        stands = config.rollout.n if config.rollout.source == "mix" and not own else 1
        rollout = Rollout(prompt, view, tokens, logp if own else None, 0, False, stands_for=stands)
        k = config.objective.top_k
        usable = np.setdiff1d(np.arange(vocab), banned)
        ids = np.stack([rng.choice(usable, k, replace=False) for _ in tokens]) if k else None
        top = rng.normal(-4.0, 0.5, (len(tokens), k)).astype(np.float32) if k else None
        found.append((rank, ScoredRollout(rollout, logp - rng.normal(0, 1, len(tokens)), ids, top)))
    return found


class Teacher:
    """Logits drawn by a response's content."""

    def __init__(self, family: Family) -> None:
        self.banned, self.vocab = family.banned_ids, family.vocab_size

    def of(self, s: Sample) -> Tensor:
        r = s.scored.rollout
        rng = torch.Generator().manual_seed(zlib.crc32(repr((r.prompt.id, r.token_ids)).encode()))
        logits = 2.0 * torch.randn(len(r.token_ids), self.vocab, generator=rng)
        logits[:, self.banned] = EXCLUDED
        return logits

    def logits(self, samples: list[Sample]) -> Logits:
        flat = torch.cat([self.of(s) for s in samples])
        return lambda part: flat[part]


def plain(model: SpeechLM, config: Config, samples: list[Sample], clips: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the responses of all ranks, one at a time, with whole logits and plain autograd."""
    o, family, teacher = config.objective, model.family, Teacher(model.family)
    usable = [i for i in range(family.vocab_size) if i not in set(family.banned_ids)]
    responses = []
    for s in samples:
        mb = collate([s])
        audio = model.encode(family.features([clips[k] for k in s.clips])) if s.clips else None
        logits = model.response_logits(**mb.inputs, audio=audio)[0].double()
        theirs = teacher.of(s).double()
        tokens = []
        for t, y in enumerate(s.response_ids):
            r = s.scored
            top = list(zip(r.top_ids[t].tolist(), r.top_logprobs[t].tolist(), strict=True)) if o.top_k else []
            sampler = 0.0 if r.rollout.logprobs is None else float(r.rollout.logprobs[t])
            tokens.append(
                plain_losses.Token(logits[t], usable, y, theirs[t], float(r.teacher_logprobs[t]), sampler, tuple(top))
            )
        if o.name == "cord":
            kls = [
                float(plain_losses.kl(k.probabilities(k.logits.detach()), k.probabilities(k.teacher))) for k in tokens
            ]
            for token, weight in zip(tokens, plain_losses.cord_importance(kls, o), strict=True):
                token.importance = weight
        losses = [plain_losses.loss(token, o) for token in tokens]
        responses.append((s.scored.rollout.view, s.scored.rollout.stands_for, losses))
    total = plain_losses.objective(o, responses)
    model.zero_grad()
    total.backward()
    return float(total), {n: p.grad.clone() for n, p in model.hf.named_parameters() if p.grad is not None}


def compare(student: str, rank: int, cases: list[str]) -> dict[str, Any]:
    """Of each case: the loss and its reference, the largest relative error of a parameter's gradient and its name, the
    error at the output layer and the largest entry there."""
    sizes = ["train.prompts_per_step=2", "train.gradient_checkpointing=true", "train.micro_batch_tokens=48"]
    sizes += [f"student.path={student}", "optim.lr=1e-30", "rollout.n=2", "teacher.kind=local"]
    family = family_of(student)
    clips = {n: np.random.default_rng(i).normal(0, 0.1, 20000).astype(np.float32) for i, n in enumerate("abc")}
    whole = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm"])
    learner = Learner(load_config("recipes/tiny/2_xopd.yaml", sizes), family, student)
    names = dict(learner.model.hf.named_parameters())
    caught: dict[str, Tensor] = {}
    step, boundary = learner.engine.step, [False]
    mark = learner.engine.set_gradient_accumulation_boundary

    def marked(is_boundary: bool) -> None:
        boundary[0] = is_boundary
        mark(is_boundary)

    def watched() -> None:
        if boundary[0]:
            caught.update({n: safe_get_full_grad(p) for n, p in names.items() if p.requires_grad})
        step()

    learner.engine.set_gradient_accumulation_boundary, learner.engine.step = marked, watched
    embedding: Any = whole.hf.get_input_embeddings().weight
    head = next(n for n, p in whole.hf.named_parameters() if p is whole.hf.lm_head.weight)
    out: dict[str, Any] = {"tied": embedding is whole.hf.lm_head.weight}
    for case in cases:
        config = load_config("recipes/tiny/2_xopd.yaml", [*sizes, *CASES[case]])
        learner.config = config
        both = [(r, s) for r, s in scored(config, family.banned_ids, family.vocab_size)]
        both = [(r, s) for r, s in both if s.rollout.view == "speech" or config.objective.lambda_ > 0]
        expected, want = plain(whole, config, make_samples([s for _, s in both], clips, family), clips)
        batch = make_batch(make_samples([s for r, s in both if r == rank], clips, family), clips, config)
        caught.clear()
        loss = learner.step(batch, 0, Teacher(family)).metrics["loss"]
        assert caught.keys() == want.keys() and len(batch.micro_batches) > 1
        errors = {n: float((caught[n] - g).abs().max() / g.abs().max()) for n, g in want.items()}
        worst = max(errors, key=lambda n: errors[n])
        out[case] = [loss, expected, errors[worst], worst, errors[head], float(want[head].abs().max())]
    return out


def main(student: str, rank: int, out: Path) -> dict[str, Any]:
    elements, needs.ELEMENTS = needs.ELEMENTS, 4 * 503  # few tokens: several chunks
    tied = out / "tied"
    if rank == 0:
        build("qwen3_asr", tied)
    dist.barrier()
    apart = compare(student, rank, list(CASES))
    found = {"apart": apart, "tied": compare(f"{tied}/student", rank, ["xopd", "jsd, mixed", "cord"])}
    needs.ELEMENTS = elements
    return found
