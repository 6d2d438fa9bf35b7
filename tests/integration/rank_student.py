"""One rank of two: is the student really sharded, is its loss the unsharded one, can mixed ranks hang?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.config.load import load_config
from opd.models.base import family_of
from opd.models.speech_lm import SpeechLM
from opd.objectives.losses import xopd
from opd.train.batch import collate, make_batch, make_samples
from opd.train.learner import Learner
from opd.types import Prompt, Rollout, Sample, ScoredRollout, View


def rollout(view: View, name: str, tokens: tuple[int, ...]) -> ScoredRollout:
    part = {"type": "audio", "path": name, "transcript": "what is one plus two plus three"}
    prompt = Prompt(name, ({"role": "user", "content": [part]},))
    logp = np.full(len(tokens), -1.0, np.float32)
    return ScoredRollout(Rollout(prompt, view, tokens, logp, 0, False), logp - 0.5)


def main(student: str, rank: int, out: Path) -> dict[str, Any]:
    small = ["train.prompts_per_step=2", f"student.path={student}", "train.gradient_checkpointing=true"]
    config = load_config("recipes/tiny/2_xopd.yaml", small)
    family = family_of(student)
    reference = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm"])
    learner = Learner(config, family, student)
    calls = [0]
    learner.model.hf.model.audio_tower.layer_norm.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    parameters = list(learner.model.hf.parameters())
    rng = np.random.default_rng(0)
    clips = {n: rng.normal(0, 0.1, 30000 + 5000 * i).astype(np.float32) for i, n in enumerate("ab")}

    # both ranks: one clip with four answers, one of them longer, and text
    own = "ab"[rank]
    answers = [(300 + i, 301, 2) for i in range(3)] + [(310, 311, 312, 313, 314, 2)]
    scored = [rollout("speech", own, a) for a in answers] + [rollout("text", own, (320, 2))]
    batch = make_batch(make_samples(scored, clips, family), clips, config)
    everything = [r for n in "ab" for r in [*(rollout("speech", n, a) for a in answers), rollout("text", n, (320, 2))]]
    expected = reference_loss(reference, make_samples(everything, clips, family), clips)
    loss = learner.step(batch, 0).metrics["loss"]
    tower_calls = calls[0]

    # rank 0 has speech, rank 1 none: every rank must still run the same modules
    view: View = "speech" if rank == 0 else "text"
    mixed = make_batch(make_samples([rollout(view, own, (300, 301, 2))] * 1, clips, family), clips, config)
    mixed_loss = learner.step(mixed, 1).metrics["loss"]
    return {
        "parameters": len(parameters),
        "sharded": sum(hasattr(p, "ds_tensor") and p.ds_tensor.numel() < p.ds_numel for p in parameters),
        "elements": sum(p.ds_tensor.numel() for p in parameters),
        "all_elements": sum(p.ds_numel for p in parameters),
        "loss": loss,
        "reference_loss": expected,
        "mixed_loss": mixed_loss,
        "tower_calls": tower_calls,
    }


@torch.no_grad()
def reference_loss(model: SpeechLM, samples: list[Sample], clips: dict[str, np.ndarray]) -> float:
    """The objective computed sample by sample without sharding, packing or micro-batches."""
    means: dict[str, list[float]] = {"speech": [], "text": []}
    for s in samples:
        mb = collate([s])
        audio = model.encode(model.family.features([clips[k] for k in s.clips])) if s.clips else None
        logits = model.response_logits(**mb.inputs, audio=audio)
        logp = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])[..., 0]
        terms = xopd(logp, mb.teacher_logp, logp, mb.sampler_logp, 5.0, 2.0)
        means[s.scored.rollout.view].append(float(terms.loss.mean()))
    return sum(0.5 * sum(v) / len(v) for v in means.values())
