"""One rank of two: a sharded teacher against a whole one, with unequal work, beside a student that is sharded too; and
the student at the start, which is the learner without its adapters, or a sharded copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from opd.config.load import load_config
from opd.config.schema import Config
from opd.models.base import Family, family_of
from opd.models.speech_lm import SpeechLM
from opd.teachers.local import LocalTeacher
from opd.teachers.reference import ReferenceModel, SelfTeacher
from opd.teachers.registry import make_start
from opd.train.batch import collate, make_batch, make_samples
from opd.train.learner import Learner
from opd.types import Prompt, Rollout, Sample, ScoredRollout

ALL = slice(None)
TEXTS = [
    "sort nine two five one",
    "what is one plus two plus three",
    "reverse cat red dog fish",
    "what is nine minus four",
    "sort one four",
]


def rollouts(count: int) -> list[Rollout]:
    """Texts of several lengths with responses of several lengths."""
    found = []
    for i in range(count):
        prompt = Prompt(str(i), ({"role": "user", "content": TEXTS[i % len(TEXTS)]},))
        found.append(Rollout(prompt, "text", (*range(300, 301 + i), 2), None, 0, False))
    return found


def differences(sharded: LocalTeacher, whole: LocalTeacher, mine: list[Rollout], samples: list[Sample]) -> list[float]:
    """Greatest differences of log-probs and logits, and the number of responses that differ."""
    pairs = zip(sharded.score(mine), whole.score(mine), strict=True)
    scores = max((float(np.abs(a.teacher_logprobs - b.teacher_logprobs).max()) for a, b in pairs), default=0.0)
    logits = [float((sharded.logits([s])(ALL) - whole.logits([s])(ALL)).abs().max()) for s in samples[:2]]
    logits.append(float((sharded.logits(samples)(ALL) - whole.logits(samples)(ALL)).abs().max()) if samples else 0.0)
    asked = [r.prompt for r in mine]
    replies = zip(sharded.respond(asked, 12), whole.respond(asked, 12), strict=True)
    return [scores, max(logits), float(sum(a != b for a, b in replies))]


def teacher(config: Config, family: Family, json_name: str) -> LocalTeacher:
    config = config.changed({"train.deepspeed": f"deepspeed_configs/{json_name}.json", "teacher.shard": True})
    return LocalTeacher(config, family, torch.device("cpu"))


CLIP = {"a": np.random.default_rng(0).normal(0, 0.1, 20000).astype(np.float32)}


def answers(rank: int) -> list[ScoredRollout]:
    """What every rank answers: rank 0 a clip and a text, rank 1 texts alone."""
    part = {"type": "audio", "path": "a", "transcript": TEXTS[0]}
    spoken = Rollout(Prompt("s", ({"role": "user", "content": [part]},)), "speech", (310, 311, 2), None, 0, False)
    chosen = [spoken, rollouts(2)[1]] if rank == 0 else rollouts(4)[2:]
    return [ScoredRollout(replace(r, logprobs=np.full(len(r.token_ids), -1.0, np.float32)), None) for r in chosen]


@torch.no_grad()
def kl_now(learner: Learner, start: ReferenceModel) -> float | None:
    """On rank 0: mean KL(student || start) over the tokens of both ranks, of whole models and one answer at a time."""
    weights = {n: w for n, w in learner.gathered(trainable_only=False) if w is not None}
    if learner.rank > 0:
        return None
    family, kls = learner.family, []
    now = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm"]).eval()
    now.hf.load_state_dict(weights, strict=False)
    for sample in make_samples(answers(0) + answers(1), CLIP, family):
        mb = collate([sample])
        audio = now.encode(family.features([CLIP[k] for k in sample.clips])) if sample.clips else None
        p, q = (m("response_logits", audio=audio, **mb.inputs).log_softmax(-1) for m in (now, start))
        kls.append((p.exp() * (p - q)).sum(-1)[0])
    return float(torch.cat(kls).mean())


def at_the_start(student: str, rank: int, *more: str) -> dict[str, object]:
    """The student as its own teacher and as the reference, while it moves away."""
    itself = ["teacher.kind=self", "teacher.path=", "teacher.batch_tokens=64", "objective.name=reverse_kl"]
    moves = ["objective.reference=0.5", "optim.lr=1e-2", "optim.warmup_steps=0", "train.micro_batch_tokens=128"]
    small = ["train.prompts_per_step=2", f"student.path={student}", "train.gradient_checkpointing=true"]
    config = load_config("recipes/tiny/2_xopd.yaml", [*small, *itself, *moves, *more])
    family, cpu = family_of(student), torch.device("cpu")
    learner = Learner(config, family, student)
    start = make_start(config, family, cpu, (learner.model, learner.call))
    learner.reference = start
    assert start is not None
    teacher = SelfTeacher(config, family, start)
    plain = load_config("recipes/tiny/2_xopd.yaml", [*small, *itself])
    unsharded = ReferenceModel(plain, family, cpu, None)
    batch = make_batch(make_samples(answers(rank), CLIP, family), CLIP, config)
    steps, expected = [], []
    for step in range(3):
        expected.append(kl_now(learner, unsharded))
        steps.append(learner.step(batch, step, teacher).metrics)
    mine = rollouts((3, 0)[rank])
    samples = make_samples([ScoredRollout(r, None) for r in rollouts(2 + rank)], {}, family)
    whole = SelfTeacher(plain, family, unsharded)
    return {
        "sharded": start.sharded,
        "shares": start.model is learner.model,
        "micro_batches": len(batch.micro_batches),
        "found": [s["reference_kl"] for s in steps],
        "expected": expected,
        "text_loss": [s["reverse_kl/text"] for s in steps],
        "differences": differences(teacher, whole, mine, samples),
    }


def main(student: str, rank: int, out: Path) -> dict[str, object]:
    small = ["train.prompts_per_step=2", f"student.path={student}", "teacher.batch_tokens=64"]
    config = load_config("recipes/tiny/1_warmstart.yaml", small)
    family = family_of(student)
    config = config.changed({"student.dtype": "bfloat16"})
    whole = LocalTeacher(config, family, torch.device("cpu"))
    sharded = teacher(config, family, "zero3")
    learner = Learner(config, family, student)
    parameters = list(sharded.model.parameters())
    result: dict[str, object] = {
        "parameters": len(parameters),
        "sharded": sum(p.ds_tensor.numel() < p.ds_numel for p in parameters),
        "elements": sum(p.ds_tensor.numel() for p in parameters),
        "all_elements": sum(p.ds_numel for p in parameters),
        "student_sharded": all(p.ds_tensor.numel() < p.ds_numel for p in learner.model.parameters()),
        "state_left": is_deepspeed_zero3_enabled(),
    }
    # five on rank 0, two on rank 1; nothing on rank 1; nothing on rank 0
    for name, counts in {"uneven": (5, 2), "none on 1": (3, 0), "none on 0": (0, 2)}.items():
        mine = rollouts(counts[rank])
        samples = make_samples(whole.score(mine), {}, family)
        result[name] = differences(sharded, whole, mine, [] if 0 in counts else samples)
    for name in ("zero3_offload", "zero2"):
        mine = rollouts(3 - rank)
        samples = make_samples(whole.score(mine), {}, family)
        result[name] = differences(teacher(config, family, name), whole, mine, samples)
    config = config.changed({"teacher.dtype": "bfloat16"})
    mine = rollouts(3 - rank)
    whole = LocalTeacher(config, family, torch.device("cpu"))
    samples = make_samples(whole.score(mine), {}, family)
    result["bfloat16"] = differences(teacher(config, family, "zero3"), whole, mine, samples)
    buffers = dict(family.load(torch.bfloat16, "sdpa").named_buffers())
    result["student_buffers"] = len(buffers)
    same = [torch.equal(b, buffers[n]) and b.dtype == buffers[n].dtype for n, b in learner.model.hf.named_buffers()]
    result["same_buffers"] = sum(same)
    result["adapters off"] = at_the_start(student, rank, "student.lora={r: 4}")
    result["copy"] = at_the_start(student, rank, "teacher.shard=true")
    return result
