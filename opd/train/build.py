"""Builds the parts of a run from its recipe, and runs it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from opd.config import resume
from opd.config.load import resolve_model
from opd.config.needs import asks_teacher_servers, evaluates, needs_teacher, teacher_servers
from opd.config.schema import Config
from opd.inference.client import Server, check_model
from opd.inference.weight_sync import WeightSync
from opd.models.context_limit import ContextLimit
from opd.models.load import family_of
from opd.prompts.clips import ClipLoader, list_bad, listed
from opd.prompts.manifest import read_manifest
from opd.prompts.stream import PromptStream
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import make_source
from opd.settings import UserError
from opd.storage.metrics import MetricsLog
from opd.teachers.registry import make_start, make_teacher
from opd.teachers.server import ServerTeacher
from opd.train import checkpoint
from opd.train.batch import view_shares
from opd.train.evaluator import Evaluator
from opd.train.learner import Learner
from opd.train.loop import evaluate, judge, loop, push, sleep_servers
from opd.train.parts import Parts, status
from opd.types import View


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
    limit = ContextLimit(family, config.rollout.max_tokens, None)
    if config.rollout.urls:
        sampler = VllmSampler(config, family, config.rollout.urls, rank)
        taken = [check_model(s, "rollout.urls", path, config.student.path) for s in sampler.servers]
        limit = ContextLimit(family, config.rollout.max_tokens, min(taken))
        sync = WeightSync(sampler.servers, family, config, rank)
        sync.sleep()  # before anything else needs the device
    for key, url, model in teacher_servers(config):
        check_model(Server(url, config.rollout.timeout_s), key, model, model)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    learner = Learner(config, family, path)
    start = make_start(config, family, device, (learner.model, learner.call))
    learner.reference = start if config.objective.reference > 0 else None
    teacher = make_teacher(config, family, device, start) if needs_teacher(config) else None
    writer = teacher
    if config.teacher.kind == "local" and asks_teacher_servers(config):  # they write, it grades
        writer = ServerTeacher(config, family, device)
    if rank == 0:
        known = listed(config)
        list_bad(config, [b for b in bad if b["place"] not in known])
    clips = ClipLoader(config, family.sampling_rate, len(prompts) + len(bad), len(bad), limit)
    source = make_source(config, views, sampler, writer, family)
    parts = Parts(config, learner, teacher, stream, clips, source, log, sampler, sync)
    if evaluates(config):
        assert teacher is not None
        assert sampler is not None
        held = [read_manifest(p, config.eval.limit)[0] if p else [] for p in (config.eval.test, config.eval.retention)]
        eval_clips = ClipLoader(config, family.sampling_rate, sum(map(len, held)), 0, limit)

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
    verdict = resume.check(config)
    dist.barrier()
    if verdict == "finished":
        if rank == 0:
            print(f"{config.run.dir}: this run is finished", flush=True)
        return
    check_urls(config)
    log = None
    if rank == 0:
        resume.prepare(config)
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
            sleep_servers(parts)
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
