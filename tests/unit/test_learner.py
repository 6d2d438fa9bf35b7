"""A step of the learner against transformers, one answer at a time.

DeepSpeed's engine is the seam: `PlainEngine` stands there and adds gradients up. Real ZeRO-3 runs in
tests/integration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.batch import _dummy, make_batch, make_samples, view_shares
from opd.config import Config, load_config
from opd.divergences import EXCLUDED
from opd.learner import Learner, _groups, learning_rate
from opd.models import family_of
from opd.models.base import Family, SpeechLM
from opd.models.lora import Piece
from opd.token_loss import Rows
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

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

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
    it.config, it.family, it.advantages, it.rank, it.world = c, family, {}, 0, 1
    it.device = torch.device("cpu")
    it.model = SpeechLM(family.load(torch.float64, "sdpa"), family, list(c.student.train), c.student.lora).train()
    it.engine = PlainEngine(it.model)
    it.optimizer = torch.optim.SGD([p for p in it.model.parameters() if p.requires_grad], lr=1.0)
    it._silent_clip = family.features([np.zeros(8000, np.float32)])
    trained = set(c.student.train)
    it._silence = it.model(features=it._silent_clip) if "adapter" in trained and "tower" not in trained else None
    return it


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
        self.rows: list[Tensor] = []  # of a teacher's full distribution
        for name, view, answer in ANSWERS:
            inputs = _inputs(family, PROMPTS[name], view)
            ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer])], 1)
            inputs["attention_mask"] = torch.ones_like(ids)
            out = hf(input_ids=ids, **inputs).logits[0, -len(answer) - 1 : -1].masked_fill(banned, EXCLUDED)
            own = self.logp(out, answer).detach()
            self.logits.append(out)
            self.sampler.append(own + 0.5 * torch.randn(len(answer), generator=noise))
            self.teacher.append(own + 2.0 * torch.randn(len(answer), generator=noise))
            rows = out.detach() + torch.randn(out.shape, generator=noise)
            self.rows.append(rows.masked_fill(banned, EXCLUDED))

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
        p, q = torch.softmax(self.rows[i] / o.tau, -1), torch.softmax(self.logits[i] / o.tau, -1)
        allowed = p > 0
        kl = torch.stack([(a[k] * (a[k] / b[k]).log()).sum() for a, b, k in zip(p, q, allowed, strict=True)])
        return -self.logp(self.logits[i], ANSWERS[i][2]) + o.mu * o.tau**2 * kl


def _inputs(family: Family, prompt: Prompt, view: View) -> dict[str, Tensor]:
    """The Hugging Face processor's inputs of a view, written out by hand."""
    content = []
    for part in prompt.messages[0]["content"]:
        heard = part["type"] == "audio" and view == "speech"
        content.append({"type": "audio"} if heard else {"type": "text", "text": part.get("transcript", "\n")})
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


def one_step(family: Family, c: Config, samples: list[Sample], **more: Any) -> tuple[Learner, Batch, dict[str, float]]:
    learner = make_learner(family, c)
    batch = make_batch(samples, CLIPS, c)
    return learner, batch, learner.step(batch, 0, **more)


@pytest.mark.parametrize("lam", [0, 0.5, 1])
@pytest.mark.parametrize("average", ["response", "token"])
def test_gradient_is_the_objectives_however_it_is_split(
    family: Family, reference: Reference, average: str, lam: float
) -> None:
    c = config(f"objective.lambda={float(lam)}", f"objective.average={average}", *XOPD)
    loss, want = reference.objective(c, lambda i: reference.xopd(c, i))
    whole: dict[str, Tensor] = {}
    counts = []
    for budget in (WHOLE, 90, ONE):
        c.train.micro_batch_tokens = budget
        learner, batch, metrics = one_step(family, c, reference.samples(family, c))
        n = len(batch.micro_batches)
        counts.append(n)
        assert learner.engine.boundaries == [False] * (n - 1) + [True] and learner.engine.steps == n
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        got = gradient(learner)
        assert_same_gradient(got, want, 1e-5)
        whole = whole or got
        assert_same_gradient(got, whole, 1e-6)
    assert counts == [1, {0: 2, 0.5: 3, 1: 1}[lam], len(batch.samples)]


def test_gradient_at_another_sampling_temperature(family: Family, reference: Reference) -> None:
    c = config("rollout.temperature=0.7", *XOPD)
    loss, want = reference.objective(c, lambda i: reference.xopd(c, i))
    learner, _, metrics = one_step(family, c, reference.samples(family, c))
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert_same_gradient(gradient(learner), want, 1e-5)


@pytest.mark.parametrize(("budget", "mu"), [(WHOLE, 0.7), (90, 0.7), (90, 0.0)])
def test_gradient_of_the_warm_start(family: Family, reference: Reference, budget: int, mu: float) -> None:
    """At mu = 0 no teacher is asked for its rows."""
    kd = ["objective.name=kd", "rollout.source=dataset", f"objective.mu={mu}", "objective.tau=3.0"]
    c = config(*kd, f"train.micro_batch_tokens={budget}", "objective.lambda=0.25")
    rows = {(s, v, a): r for (s, v, a), r in zip(ANSWERS, reference.rows, strict=True)}

    class Teacher:
        def rows(self, samples: list[Sample]) -> Rows:
            rollouts = [s.scored.rollout for s in samples]
            flat = torch.cat([rows[r.prompt.id, r.view, r.token_ids] for r in rollouts])
            return lambda part: flat[part]

    loss, want = reference.objective(c, lambda i: reference.kd(c, i))
    asked = Teacher() if mu else None
    learner, _, metrics = one_step(family, c, reference.samples(family, c), teacher=asked)
    assert ("kd/kl" in metrics) == (mu > 0)
    ce = torch.cat([-reference.logp(out, a) for out, (_, _, a) in zip(reference.logits, ANSWERS, strict=True)])
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5) and metrics["kd/ce"] == pytest.approx(
        float(ce.detach().mean()), rel=1e-5
    )
    assert_same_gradient(gradient(learner), want, 1e-5)


@pytest.mark.parametrize("train", [["llm", "adapter"], ["llm", "adapter", "tower"], ["adapter"]])
def test_text_beside_speech_with_a_trained_audio_path(family: Family, reference: Reference, train: list[str]) -> None:
    """A micro-batch of text alone runs a dummy clip, which must count for nothing."""
    found = []
    for budget in (WHOLE, ONE):
        c = config(f"student.train={json.dumps(train)}", f"train.micro_batch_tokens={budget}", *XOPD)
        learner, batch, _ = one_step(family, c, reference.samples(family, c))
        found.append(gradient(learner))
    assert [m[0].clips for m in batch.micro_batches].count([]) == 3
    assert_same_gradient(found[1], found[0], 1e-6)
    assert {family.part_of(n) for n, g in found[0].items() if float(g.abs().max()) > 0} == set(train)


def test_metrics_are_means_over_tokens(family: Family, reference: Reference) -> None:
    c = config("train.micro_batch_tokens=90", *XOPD)
    samples = reference.samples(family, c)
    learner, _, metrics = one_step(family, c, samples)
    logp = [reference.logp(out, a).detach() for out, (_, _, a) in zip(reference.logits, ANSWERS, strict=True)]
    advantage = [t - lp for t, lp in zip(reference.teacher, logp, strict=True)]
    ratio = torch.cat([(lp - s).exp() for lp, s in zip(logp, reference.sampler, strict=True)])
    views = [v for _, v, _ in ANSWERS]
    p = torch.cat([torch.softmax(out.detach(), -1) for out in reference.logits])
    expected = {
        "advantage/mean": torch.cat(advantage).mean(),
        "reverse_kl/speech": -torch.cat([a for a, v in zip(advantage, views, strict=True) if v == "speech"]).mean(),
        "reverse_kl/text": -torch.cat([a for a, v in zip(advantage, views, strict=True) if v == "text"]).mean(),
        "ratio/mean": ratio.mean(),
        "ratio/clipped": (ratio > 1.3).float().mean(),
        "mismatch/logprob": ratio.log().abs().mean(),
        "entropy": -torch.special.xlogy(p, p).sum(-1).mean(),
        "lr": torch.tensor(learning_rate(c, 0)),
        "grad_norm": torch.cat([g.flatten() for g in gradient(learner).values()]).norm(),
    }
    assert 0 < expected["ratio/clipped"] < 1
    assert metrics.keys() == {*expected, "loss"}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=1e-5), name
    assert learner.optimizer.param_groups[0]["lr"] == learning_rate(c, 0) != c.optim.lr
    for s, a in zip(samples, advantage, strict=True):  # what samples.jsonl shows: unclipped, without padding
        assert learner.advantages[id(s)] == pytest.approx(a.tolist(), abs=1e-5)


def test_a_filling_micro_batch_counts_for_nothing(family: Family, reference: Reference) -> None:
    """A rank with fewer micro-batches repeats a sample with weight 0."""
    c = config(*XOPD)
    found = []
    for fill in (False, True):
        learner = make_learner(family, c)
        batch = make_batch(reference.samples(family, c), CLIPS, c)
        batch.micro_batches += [[_dummy(batch.samples[0])]] * fill
        found.append((learner.step(batch, 0), gradient(learner), len(learner.advantages)))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2] == len(ANSWERS)
    assert_same_gradient(found[1][1], found[0][1], 0)


def test_the_sum_over_ranks_is_what_zero_averages(family: Family, reference: Reference) -> None:
    """ZeRO divides by the ranks, so each rank's gradient is scaled up by their number; the metric is not."""
    c = config(*XOPD)
    found = []
    for world in (1, 3):
        learner = make_learner(family, c)
        learner.world = world
        loss = learner.step(make_batch(reference.samples(family, c), CLIPS, c), 0)["loss"]
        found.append((loss, gradient(learner)))
    assert found[0][0] == found[1][0]
    assert_same_gradient(found[1][1], {n: 3 * g for n, g in found[0][1].items()}, 1e-6)


@pytest.mark.parametrize("budget", [WHOLE, ONE])
def test_teacher_equal_to_student_is_a_step_of_zero(family: Family, reference: Reference, budget: int) -> None:
    c = config(f"train.micro_batch_tokens={budget}")
    learner, _, metrics = one_step(family, c, reference.samples(family, c, own=True))
    for name in ("loss", "advantage/mean", "reverse_kl/speech", "reverse_kl/text", "mismatch/logprob"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-5), name
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-5) and metrics["ratio/clipped"] == 0.0
    assert metrics["grad_norm"] < 1e-4
    other = one_step(family, c, reference.samples(family, c))[2]
    assert other["grad_norm"] > 1  # another teacher does move it


def test_evaluation_logits_carry_no_gradient_and_leave_training_mode(family: Family, reference: Reference) -> None:
    c = config()
    learner = make_learner(family, c)
    samples = reference.samples(family, c)
    mb, logits = learner.eval_logits(samples, CLIPS)
    assert learner.model.training and not logits.requires_grad
    for i, out in enumerate(reference.logits):
        n = len(ANSWERS[i][2])
        assert mb.targets[i, :n].tolist() == list(ANSWERS[i][2]) and mb.mask[i].sum() == n
        torch.testing.assert_close(logits[i, :n], out.detach().float(), atol=1e-5, rtol=1e-6)


def test_parameters_are_gathered_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.learner.GATHERED", 10)
    found = [Piece(str(i), torch.nn.Parameter(torch.zeros(n))) for i, n in enumerate((4, 6, 1, 30, 2, 2))]
    assert [[p.name for p in g] for g in _groups(found)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert _groups([]) == []
