"""Builds the parts of a run from its recipe, and runs it."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from opd.config.load import prepare_run, resolve_model, state_of_run
from opd.config.needs import asks_teacher, asks_teacher_servers, evaluates, teacher_servers
from opd.config.schema import Config
from opd.inference.client import Server
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family, family_of
from opd.prompts.clips import ClipLoader, ContextLimit, list_bad, listed
from opd.prompts.manifest import PromptStream, read_manifest
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import make_source
from opd.settings import UserError
from opd.storage.metrics import MetricsLog
from opd.teachers.base import Teacher
from opd.teachers.registry import make_start, make_teacher
from opd.teachers.server import ServerTeacher
from opd.train import checkpoint
from opd.train.batch import view_shares
from opd.train.evaluator import Evaluator
from opd.train.learner import Learner
from opd.train.loop import Parts, evaluate, judge, loop, push, sleep_servers, status


def build(config: Config, log: MetricsLog | None) -> Parts:
    """All parts of a run, from its recipe."""
    path = resolve_model(config.student.path, "student.path")
    t = config.teacher  # its runs replaced by the folders of their checkpoints
    each = {r: one.changed({"path": one.path and resolve_model(one.path, "teacher.path")}) for r, one in t.each.items()}
    config = config.changed({"teacher.routes": each} if t.about.routes else {"teacher": each[""]})
    family = family_of(path, config.student.family)
    prompts, bad = read_manifest(config.data.train)
    sampler, sync, limit = _student_servers(config, family, path)
    for key, url, model in teacher_servers(config):
        Server(url, config.rollout.timeout_s).check_model(key, model, model)
    learner = Learner(config, family, path)
    teacher, writer = _teachers(config, learner)
    if log is not None:
        known = listed(config)
        list_bad(config, [b for b in bad if b["place"] not in known])
    parts = Parts(
        config=config,
        learner=learner,
        teacher=teacher,
        stream=PromptStream(prompts, config.train.prompts_per_step, config.run.seed),
        clips=ClipLoader(config, family.sampling_rate, len(prompts) + len(bad), len(bad), limit),
        source=make_source(config, list(view_shares(config)), sampler, writer, family),
        log=log,
        sampler=sampler,
        sync=sync,
    )
    if evaluates(config):
        parts.evaluator = _evaluator(parts, writer, limit)
    return parts


def _student_servers(
    config: Config, family: Family, path: str
) -> tuple[VllmSampler | None, WeightSync | None, ContextLimit]:
    """What asks the student's servers, what gives them weights, and how long a prompt they take; they sleep after it,
    for what is built next needs the device."""
    urls, max_tokens = config.rollout.urls, config.rollout.max_tokens
    if not urls:
        return None, None, ContextLimit(family, max_tokens, None)
    rank = dist.get_rank()
    sampler = VllmSampler(config, family, urls, rank)
    taken = [s.check_model("rollout.urls", path, config.student.path) for s in sampler.servers]
    sync = WeightSync(sampler.servers, family, config, rank)
    sync.sleep()
    return sampler, sync, ContextLimit(family, max_tokens, min(taken))


def _teachers(config: Config, learner: Learner) -> tuple[Teacher | None, Teacher | None]:
    """The teacher that scores and the one that writes; gives the learner its reference, where it has one."""
    family, device = learner.family, learner.device
    start = make_start(config, family, device, (learner.model, learner.call))
    learner.reference = start if config.objective.reference > 0 else None
    teacher = make_teacher(config, family, device, start) if asks_teacher(config) else None
    if config.teacher.about.servers == "responses" and asks_teacher_servers(config):
        return teacher, ServerTeacher(config, family, device)
    return teacher, teacher


def _evaluator(parts: Parts, writer: Teacher | None, limit: ContextLimit) -> Evaluator:
    c, family = parts.config, parts.learner.family
    assert parts.teacher is not None and parts.sampler is not None
    test, retention = (read_manifest(p, c.eval.limit)[0] if p else [] for p in (c.eval.test, c.eval.retention))
    return Evaluator(
        config=c,
        family=family,
        learner=parts.learner,
        teacher=parts.teacher,
        sampler=parts.sampler,
        clips=ClipLoader(c, family.sampling_rate, len(test) + len(retention), 0, limit),
        test=test,
        retention=retention,
        say=lambda what: status(parts, "evaluating", 0, what),
        writer=writer,
    )


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
    verdict = state_of_run(config)
    dist.barrier()
    if verdict == "finished":
        if rank == 0:
            print(f"{config.run.dir}: this run is finished", flush=True)
        return
    check_urls(config)
    log = None
    if rank == 0:
        prepare_run(config)
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
