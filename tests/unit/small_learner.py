"""A Learner on a plain engine, and what it must give: transformers, one answer at a time.

DeepSpeed's engine is the seam: `PlainEngine` stands there and adds gradients up. Real ZeRO-3 runs in
tests/integration.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.config.load import load_config
from opd.config.schema import Config
from opd.models.base import Family, family_of
from opd.models.lora import adapters
from opd.models.speech_lm import SpeechLM, Task
from opd.objectives.losses import EXCLUDED
from opd.teachers.reference import Running
from opd.train.batch import make_batch, make_samples, view_shares
from opd.train.learner import Learner
from opd.types import Batch, Prompt, Rollout, Sample, ScoredRollout, View

ROOT = Path(__file__).parents[2]
STUDENT = str(ROOT / "recipes/tiny/student")
CLIPS = {k: np.random.default_rng(n).standard_normal(n).astype(np.float32) / 10 for k, n in (("a", 12037), ("b", 9000))}
ONE, WHOLE = 1, 10**6  # micro_batch_tokens: a sample each, everything at once


@pytest.fixture(autouse=True)
def _at_root() -> None:
    os.chdir(ROOT)


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of(STUDENT)


def config(*overrides: str) -> Config:
    return load_config("recipes/tiny/2_xopd.yaml", [f"student.path={STUDENT}", "train.prompts_per_step=2", *overrides])


class PlainEngine:
    """Where DeepSpeed's engine stands: one rank, gradients added up in `.grad`."""

    def __init__(self, module: SpeechLM) -> None:
        self.module = module
        self.boundaries: list[bool] = []
        self.steps = 0

    def __call__(self, task: Task, **inputs: Any) -> Any:
        return self.module(task, **inputs)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas  # else DeepSpeed would divide the sum by the number of micro-batches
        loss.backward()

    def step(self) -> None:
        self.steps += 1

    def get_global_grad_norm(self) -> float:
        return float(torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None]).norm())


def make_learner(family: Family, c: Config) -> Learner:
    """A Learner whose engine is plain, with fresh weights, in float64: only the logits are rounded."""
    it: Any = object.__new__(Learner)
    it.config, it.family, it.rank, it.world = c, family, 0, 1
    it.device = torch.device("cpu")
    it.model = SpeechLM(family.load(torch.float64, "sdpa"), family, list(c.student.train), c.student.lora).train()
    it.engine = PlainEngine(it.model)
    it.optimizer = torch.optim.SGD([p for p in it.model.parameters() if p.requires_grad], lr=1.0)
    it._silent_clip = family.features([np.zeros(8000, np.float32)])
    trained = set(c.student.train)
    it._silence = it.model.encode(it._silent_clip) if "adapter" in trained and "tower" not in trained else None
    return it


def running(learner: Learner) -> Running:
    """What a reference takes of a learner."""
    return learner.model, learner.call


def gradient(learner: Learner) -> dict[str, Tensor]:
    return {n: p.grad for n, p in learner.model.hf.named_parameters() if p.grad is not None}


def assert_same_gradient(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` times the largest entry of each parameter's gradient."""
    assert got.keys() == want.keys() and max(float(g.abs().max()) for g in want.values()) > 0.01
    for name, g in want.items():
        assert float((got[name] - g).abs().max()) <= tolerance * float(g.abs().max()), name


# ---- the reference: transformers, one answer at a time -------------------------------------------------------------

PARTS = {k: {"type": "audio", "path": k, "transcript": t} for k, t in (("a", "what is one plus two"), ("b", "three"))}
PROMPTS = {
    "a": Prompt("a", ({"role": "user", "content": [PARTS["a"]]},)),
    "ba": Prompt("ba", ({"role": "user", "content": [PARTS["b"], {"type": "text", "text": "\n"}, PARTS["a"]]},)),
}
ANSWERS: list[tuple[str, View, tuple[int, ...]]] = [
    ("a", "speech", (300, 301, 302, 2)),
    ("a", "speech", (310, 2)),
    ("ba", "speech", (320, 321, 322, 323, 324, 2)),
    ("a", "text", (300, 2)),
    ("ba", "text", (330, 331, 332)),
    ("a", "text", (311, 312, 313, 2)),
]


class Reference:
    """Logits of every answer from transformers' own forward, with their graph, and what sampler and teacher say."""

    def __init__(self, family: Family) -> None:
        hf: Any = family.load(torch.float64, "sdpa")
        for name, p in hf.named_parameters():
            p.requires_grad_(family.part_of(name) == "llm")
        self.params = {n: p for n, p in hf.named_parameters() if p.requires_grad}
        banned = torch.zeros(family.vocab_size, dtype=torch.bool)
        banned[family.banned_ids] = True
        noise = torch.Generator().manual_seed(0)
        self.logits: list[Tensor] = []
        self.sampler: list[Tensor] = []
        self.teacher: list[Tensor] = []
        self.teacher_logits: list[Tensor] = []
        for name, view, answer in ANSWERS:
            inputs = _inputs(family, PROMPTS[name], view)
            ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer])], 1)
            inputs["attention_mask"] = torch.ones_like(ids)
            out = hf(input_ids=ids, **inputs).logits[0, -len(answer) - 1 : -1].masked_fill(banned, EXCLUDED)
            own = self.logp(out, answer).detach()
            self.logits.append(out)
            self.sampler.append(own + 0.5 * torch.randn(len(answer), generator=noise))
            self.teacher.append(own + 2.0 * torch.randn(len(answer), generator=noise))
            theirs = out.detach() + torch.randn(out.shape, generator=noise)
            self.teacher_logits.append(theirs.masked_fill(banned, EXCLUDED))

    @staticmethod
    def logp(logits: Tensor, answer: tuple[int, ...], temperature: float = 1.0) -> Tensor:
        return torch.log_softmax(logits / temperature, -1)[range(len(answer)), list(answer)]

    def samples(self, family: Family, c: Config, own: bool = False) -> list[Sample]:
        """The answers as the rollout and the teacher hand them on; own: both agree with the student."""
        scored = []
        for (name, view, answer), out, sampler, teacher in zip(
            ANSWERS, self.logits, self.sampler, self.teacher, strict=True
        ):
            if own:
                sampler = teacher = self.logp(out, answer).detach()
            rollout = Rollout(PROMPTS[name], view, answer, sampler.numpy(), 0, False)
            scored.append(ScoredRollout(rollout, teacher.numpy()))
        return make_samples([s for s in scored if s.rollout.view in view_shares(c)], CLIPS, family)

    def objective(self, c: Config, token_loss: Callable[[int], Tensor]) -> tuple[float, dict[str, Tensor]]:
        """lambda * mean(text) + (1 - lambda) * mean(speech) of a loss per token [T], and its gradient."""
        total = torch.zeros(())
        for view, share in (("speech", 1 - c.objective.lambda_), ("text", c.objective.lambda_)):
            losses = [token_loss(i) for i, (_, v, _) in enumerate(ANSWERS) if v == view]
            per_response = torch.stack([x.mean() for x in losses]).mean()
            total = total + share * (per_response if c.objective.average == "response" else torch.cat(losses).mean())
        grads = torch.autograd.grad(total, list(self.params.values()), retain_graph=True)
        return float(total.detach()), dict(zip(self.params, grads, strict=True))

    def xopd(self, c: Config, i: int) -> Tensor:
        """-r A log pi with r and A as plain numbers; its value is -r A."""
        answer, temperature = ANSWERS[i][2], c.rollout.temperature
        terms = []
        logp = self.logp(self.logits[i], answer, temperature)
        at_one = self.logp(self.logits[i], answer).tolist()
        for t, lp in enumerate(logp):
            ratio = min(c.objective.ratio_max, float(np.exp(lp.item() - self.sampler[i][t].item())))
            clip = c.objective.advantage_clip or np.inf
            advantage = float(np.clip(self.teacher[i][t].item() - at_one[t], -clip, clip))
            terms.append(-ratio * advantage * (1 + lp - lp.item()))
        return torch.stack(terms)

    def kd(self, c: Config, i: int) -> Tensor:
        o = c.objective
        p, q = torch.softmax(self.teacher_logits[i] / o.tau, -1), torch.softmax(self.logits[i] / o.tau, -1)
        allowed = p > 0
        kl = torch.stack([(a[k] * (a[k] / b[k]).log()).sum() for a, b, k in zip(p, q, allowed, strict=True)])
        return -self.logp(self.logits[i], ANSWERS[i][2]) + o.mu * o.tau**2 * kl


def _inputs(family: Family, prompt: Prompt, view: View) -> dict[str, Tensor]:
    """The Hugging Face processor's inputs of a view, written out by hand."""
    content = []
    for part in prompt.messages[0]["content"]:
        spoken = part["type"] == "audio" and view == "speech"
        content.append({"type": "audio"} if spoken else {"type": "text", "text": part.get("transcript", "\n")})
    text = family.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    keys = [p["path"] for p in prompt.messages[0]["content"] if p["type"] == "audio"]
    audio = {"audio": [CLIPS[k] for k in keys], "sampling_rate": 16000} if view == "speech" else {}
    return dict(family.processor(text=text, return_tensors="pt", **audio))


@pytest.fixture(scope="module")
def reference(family: Family) -> Reference:
    return Reference(family)


# ---- one step ------------------------------------------------------------------------------------------------------

XOPD = ["objective.advantage_clip=2.5", "objective.ratio_max=1.3"]


def perturb(model: SpeechLM) -> None:
    with torch.no_grad():
        for i, adapter in enumerate(adapters(model.hf)):
            adapter.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))


def one_step(family: Family, c: Config, samples: list[Sample], **more: Any) -> tuple[Learner, Batch, dict[str, float]]:
    learner = make_learner(family, c)
    batch = make_batch(samples, CLIPS, c)
    return learner, batch, learner.step(batch, 0, **more).metrics
