"""One measurement of the learner in a process of its own: loss, memory and speed of real steps under DeepSpeed.

python tests/gpu/learner_case.py CASES.json OUT.json     # a list of cases, run one after another

The same code runs on a GPU (tests/gpu) and, with small shapes, on the CPU (tests/integration/test_gpu_cases_on_cpu.py).
On a GPU the peak is the allocator's; on a CPU it is counted as tests/unit/live_memory.py does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_cases import Case
from torch.utils.flop_counter import FlopCounterMode

from opd.config.deepspeed import deepspeed_settings
from opd.config.load import load_config
from opd.config.schema import Config
from opd.inference.host import free_port
from opd.models.base import Family, family_of
from opd.models.speech_lm import SpeechLM
from opd.objectives.losses import xopd
from opd.plan.estimate import Machine, Plan, estimate
from opd.plan.learner_memory import Lengths
from opd.plan.step_time import learner_flops
from opd.storage.run_folder import package_versions
from opd.train import extensions
from opd.train.__main__ import _init_distributed
from opd.train.batch import collate, make_batch, make_samples
from opd.train.learner import Learner
from opd.types import VIEWS, Batch, Prompt, Rollout, Sample, ScoredRollout

# Dense bfloat16 TFLOPS on the makers' data sheets, by a part of the device's name; the first that fits.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181, "A10G": 70, "A10": 125}
VERSIONS = ("torch", "deepspeed", "transformers", "peft")
TRANSCRIPT = "what is"  # as many tokens as the marks around a clip: both views then have the same text
SAID = "three plus four? the answer is seven. "


def config_of(case: Case) -> Config:
    """The recipe with the learner alone: scores and samples are given, so no server and no teacher is there."""
    alone = ["teacher.kind=server", 'teacher.urls=["http://127.0.0.1:9"]', 'rollout.urls=["http://127.0.0.1:9"]']
    alone += ["rollout.sleep=false", "launch.placement=recipes/placements/1gpu_shared.yaml", "run.dir=unused"]
    own = [f"student.path={case.student}", f"rollout.max_tokens={case.response}"]
    return load_config(case.recipe, [*alone, *own, f"data.max_audio_seconds={case.seconds}", *case.overrides])


def make_scored(config: Config, family: Family, case: Case) -> tuple[list[ScoredRollout], dict[str, np.ndarray]]:
    """n responses of random ids to each view of each prompt, all of one length; log-probs are not filled in."""
    rng = np.random.default_rng(0)
    ids = np.setdiff1d(np.arange(len(family.tokenizer)), [*family.banned_ids, *family.eos_ids])
    said = family.tokenizer(SAID * case.text_tokens, add_special_tokens=False).input_ids
    filler = family.tokenizer.decode(said[: case.text_tokens])
    scored, clips = [], {}
    for i in range(config.train.prompts_per_step):
        clips[str(i)] = rng.normal(0, 0.1, round(case.seconds * family.sampling_rate)).astype(np.float32)
        parts = [
            {"type": "audio", "path": str(i), "transcript": TRANSCRIPT},
            {"type": "text", "text": f"{i:03d} {filler}"},  # prompts differ, else they would share a row
        ]
        prompt = Prompt(str(i), ({"role": "user", "content": parts},))
        for view in VIEWS:
            for _ in range(config.rollout.n):
                answer = (*map(int, rng.choice(ids, case.response - 1)), family.turn_end)
                scored.append(ScoredRollout(Rollout(prompt, view, answer, None, 0, False), None))
    return scored, clips


def with_logprobs(scored: list[ScoredRollout], logprobs: list[np.ndarray]) -> list[ScoredRollout]:
    """The sampler a little beside `logprobs`, the teacher a nat below on average: ratios near 1, a loss near 1."""
    rng = np.random.default_rng(1)

    def given(s: ScoredRollout, logp: np.ndarray) -> ScoredRollout:
        sampler = (logp + rng.normal(0, 0.02, len(logp))).astype(np.float32)
        teacher = (logp + rng.normal(-1, 0.5, len(logp))).astype(np.float32)
        r = s.rollout
        return ScoredRollout(Rollout(r.prompt, r.view, r.token_ids, sampler, r.version, False), teacher)

    return [given(s, logp) for s, logp in zip(scored, logprobs, strict=True)]


class Reference:
    """The student in float32 without DeepSpeed, packing or micro-batches: a sample at a time."""

    def __init__(self, config: Config, family: Family, device: str) -> None:
        torch.backends.fp32_precision = "ieee"  # no TF32
        self.device = torch.device(device)
        with self.device:  # not by way of the host
            hf = family.load(torch.float32, "sdpa")
        self.model = SpeechLM(hf, family, list(config.student.train), config.student.lora, config.run.seed)
        self.model.to(self.device).eval()
        self.family, self.config = family, config

    def logp(self, s: Sample, clips: dict[str, np.ndarray]) -> torch.Tensor:
        """Log-probs [1, T] of a sample's response, with gradient."""
        mb = collate([s]).to(self.device)
        inputs = mb.inputs
        if s.clips:
            features = self.family.features([clips[k] for k in s.clips])
            inputs["audio"] = self.model.encode({k: v.to(self.device) for k, v in features.items()})
        return torch.log_softmax(self.model.response_logits(**inputs), -1).gather(-1, mb.targets[..., None])[..., 0]

    @torch.no_grad()
    def logprobs(self, samples: list[Sample], clips: dict[str, np.ndarray]) -> list[np.ndarray]:
        """[T] float32 of each sample."""
        return [self.logp(s, clips)[0].cpu().numpy() for s in samples]

    def loss(self, batch: Batch, gradient: bool) -> tuple[float, float]:
        """(loss, norm of its gradient, 0 unless `gradient`) of a step, by the batch's weights."""
        o, total = self.config.objective, 0.0
        for s in batch.samples:
            with torch.set_grad_enabled(gradient):
                logp = self.logp(s, batch.clips)
                teacher, sampler = (
                    torch.from_numpy(np.asarray(x)).to(self.device)[None]
                    for x in (s.scored.teacher_logprobs, s.scored.rollout.logprobs)
                )
                loss = (xopd(logp, teacher, logp, sampler, o.advantage_clip, o.ratio_max).loss * s.weight).sum()
            if gradient:
                loss.backward()
            total += float(loss.detach())
        grads = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        return total, float(torch.stack(grads).norm()) if grads else 0.0


class Peak:
    """Bytes of tensors at their most, on the learner's device."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.live: Any = None
        if not self.on_gpu:
            from live_memory import LiveMemory

            self.live = LiveMemory()

    def counting(self) -> AbstractContextManager[Any]:
        """While tensors are made: a CPU's are counted by what torch is asked to do."""
        return nullcontext() if self.live is None else self.live

    def reset(self) -> None:
        """From now on."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.peak = self.live.now

    def add(self, learner: Learner) -> None:
        """Make a CPU's figure a GPU's: count parameters that safetensors mapped without asking torch, and let AdamW
        take all tensors at once, which needs one temporary less."""
        if self.live is not None:
            found = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in learner.model.parameters()}
            self.live.now += sum(size for key, size in found.items() if key not in self.live.seen)
            for group in learner.optimizer.param_groups:
                group["foreach"] = True

    @property
    def bytes(self) -> int:
        """Since `reset`."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else self.live.peak

    def now(self) -> int:
        """At this moment."""
        return torch.cuda.memory_allocated() if self.on_gpu else self.live.now


def run(case: Case) -> dict[str, Any]:
    """All figures of a case."""
    config = config_of(case)
    family = family_of(case.student)
    scored, clips = make_scored(config, family, case)
    plain = make_samples(scored, clips, family)
    out: dict[str, Any] = {"name": case.name, **case.about, **device_and_versions(case.device)}
    reference = None
    logprobs = [np.full(case.response, -np.log(family.vocab_size), np.float32) for _ in plain]
    if case.reference:
        of = family_of(case.reference_student) if case.reference_student else family
        reference = Reference(config, of, case.reference)
        logprobs = reference.logprobs(plain, clips)
    samples = make_samples(with_logprobs(scored, logprobs), clips, family)
    batch = make_batch(samples, clips, config)
    if reference is not None:
        out["reference_loss"], out["reference_grad_norm"] = reference.loss(batch, case.gradient)
        del reference
        if case.reference == "cuda":
            torch.cuda.empty_cache()
    plan, lengths = planned(config, samples, case)
    out |= {"planned": plan.learner.peak, "planned_resident": plan.learner.resident, "worst": plan.learner.worst}
    out["planned_parts"] = plan.learner.device | plan.learner.phases[plan.learner.worst]
    out["prompt_tokens"] = [lengths.speech, lengths.text]
    out["largest_micro_batch"] = max(collate(m).ids.numel() for m in batch.micro_batches)
    peak = Peak(case.device)
    with peak.counting():
        learner = Learner(config, family, case.student)
        peak.add(learner)
        counter = FlopCounterMode(display=False) if case.flops else nullcontext()
        with counter:
            first = learner.step(batch, 0).metrics
        peak.reset()  # counting holds tensors of its own
        timed = [timed_step(learner, batch, i) for i in range(1, case.steps + 1)]
        out |= {"peak": peak.bytes, "resident": peak.now()}
    for key in ("loss", "grad_norm", "mismatch/logprob"):
        out[key] = first[key]
    out["later_losses"] = [stats["loss"] for _, stats in timed]
    out |= {"zero_stage": learner.engine.zero_optimization_stage(), "steps": case.steps}
    flops = learner_flops(config, plan.student, lengths)
    needed = config.changed({"train.gradient_checkpointing": False})
    if isinstance(counter, FlopCounterMode):
        out["flops_counted"] = counter.get_total_flops()
    if timed:
        out |= speed(batch, [s for s, _ in timed], flops, learner_flops(needed, plan.student, lengths), out["device"])
    out["flops"] = flops
    return out


def timed_step(learner: Learner, batch: Batch, step: int) -> tuple[float, dict[str, float]]:
    """(seconds, metrics) of one step."""
    began = time.perf_counter()
    stats = learner.step(batch, step).metrics
    if learner.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, stats


def planned(config: Config, samples: list[Sample], case: Case) -> tuple[Plan, Lengths]:
    """What `opd plan` says of this very batch, and its lengths."""
    found = {v: {len(s.prompt_ids) for s in samples if s.scored.rollout.view == v} for v in VIEWS}
    (speech,), (text,) = found["speech"], found["text"]
    plan = estimate(config, Machine(text_tokens=text))
    assert plan.longest == Lengths(speech, text, case.response, case.seconds), (plan.longest, found)
    return plan, plan.longest


def speed(batch: Batch, seconds: list[float], flops: float, needed: float, device: str) -> dict[str, Any]:
    """Tokens per second and shares of the peak arithmetic, of the median step.

    tokens: what the LLM reads, a prompt once for all its responses. mfu counts what a step needs, hfu also what
    gradient checkpointing computes again (arXiv 2204.02311, appendix B; arXiv 2205.05198, section 6.3).
    """
    median = float(np.median(seconds))
    read = sum(tokens_read(m) for m in batch.micro_batches)
    peak = tflops_of(device)
    return {
        "seconds": seconds,
        "read": read,
        "tokens_per_s": read / median,
        "response_tokens_per_s": batch.tokens / median,
        "peak_tflops": peak,
        "mfu": needed / median / (peak * 1e12) if peak else None,
        "hfu": flops / median / (peak * 1e12) if peak else None,
    }


def tokens_read(samples: list[Sample]) -> int:
    """Tokens of a micro-batch without padding: the prompt of each row, and every response."""
    prompts = {int(r): len(s.prompt_ids) for r, s in zip(collate(samples).row, samples, strict=True)}
    return sum(prompts.values()) + sum(len(s.response_ids) for s in samples)


def tflops_of(device: str) -> float | None:
    """Dense bfloat16 TFLOPS of a device: $OPD_PEAK_TFLOPS, else by its name, else not known."""
    if word := os.environ.get("OPD_PEAK_TFLOPS"):
        return float(word)
    return next((float(v) for name, v in PEAK_TFLOPS.items() if name in device), None)


def device_and_versions(device: str) -> dict[str, Any]:
    """What a figure was taken on."""
    found = package_versions()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "cuda": torch.version.cuda, "versions": {v: found.get(v) for v in VERSIONS}}


def main(cases: str, out: str) -> None:
    """Run every case of a file."""
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    todo = [Case(**c) for c in json.loads(Path(cases).read_text())]
    results = []
    for i, case in enumerate(todo):
        if i == 0:
            _init_distributed(config_of(case))
        extensions.build(deepspeed_settings(config_of(case)))
        results.append(run(case))
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
