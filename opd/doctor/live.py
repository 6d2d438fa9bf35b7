"""The checks of `opd doctor` that need a live vLLM server: the student on both sides, then the teacher."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.config.needs import asks_teacher, starts_student
from opd.config.placement import node_of, placement_of
from opd.config.schema import Config
from opd.doctor.checks import Check, Facts, Skip, Warned, each_teacher
from opd.doctor.families import AGREE, DIFFER
from opd.doctor.probe import Mismatch, PlainStudent
from opd.inference.host import LOOPBACK, free_port
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family
from opd.processes.commands import Command, student_server, teacher_server
from opd.processes.guard import serving
from opd.processes.layout import Kind, Place
from opd.processes.supervise import cause
from opd.rollout.sources import gold_ids
from opd.settings import UserError
from opd.teachers.base import Teacher
from opd.teachers.reference import ReferenceModel
from opd.teachers.registry import make_teacher
from opd.types import VIEWS, Prompt, Rollout

MAX_TOKENS = 64  # of a response here: enough to compare
# Greatest mean and greatest single |learner - vLLM| log-prob, in nats (docs/LOG.md, docs/families.md).
LIMITS = {"float32": (AGREE, AGREE), "bfloat16": (0.05, 1.0)}
STALE_TIMES = 3.0  # a push that is left out must cost this many times what is left after it
PAIRS, MOST = 32, 0.75  # responses that the teacher compares, and how often it has to be right
FORWARD = 1.25  # times a model's bytes: what it takes with its forward pass


def server(facts: Facts) -> str:
    """A live server with the student: the recipe's own, else one on the placement's first rollout devices."""
    config = facts.config
    config = facts.asked = config.changed({"rollout.max_tokens": min(MAX_TOKENS, config.rollout.max_tokens)})
    if not facts.records:
        raise UserError("no training record is good enough to be asked")
    if config.rollout.urls:
        return f"running at {', '.join(config.rollout.urls)}"
    if not starts_student(config):
        raise Skip("this recipe asks no student server")
    place = place_of("student", config)
    if device(config) == "cpu":
        config = config.changed({"rollout.transport": "file"})  # the others take weights from a GPU
    began = time.monotonic()
    facts.asked = config.changed({"rollout.urls": [start(facts, student_server(config, place))]})
    where = f"GPU {', '.join(map(str, place.devices))}" if place.devices else "the CPU"
    return f"vLLM on {where}, ready in {time.monotonic() - began:.0f} s"


def place_of(kind: Kind, config: Config) -> Place:
    """On this machine, at a free port: the devices that the placement gives the first server of this node."""
    groups = placement_of(config).rollout if kind == "student" else placement_of(config).teacher
    group = next((g for g in groups if g.node == node_of(config)), groups[0])
    return Place(kind, kind, 0, LOOPBACK, free_port(), group.parts()[0], group.memory)


def start(facts: Facts, command: Command) -> str:
    """URL of a server that is stopped with the doctor. Raises UserError with the cause when it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="opd-doctor-"))
    log = folder / f"{command.name}.log"
    try:
        url = facts.stack.enter_context(serving(command, log, facts.config.launch.health_timeout_s))
    except ChildProcessError as e:
        raise UserError(f"{e}: {cause(log, 1)}") from e
    facts.stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return url


def prompt_ids(facts: Facts) -> str:
    """vLLM reads the same prompt ids as the learner; the sampler compares each request."""
    facts.probe = probe = PlainStudent(facts.asked, facts.family, facts.records, facts.clips)
    on = device(facts.asked)
    size = sum(p.numel() * p.element_size() for p in probe.model.parameters())
    if on != "cpu" and torch.cuda.mem_get_info(on)[0] > FORWARD * size:
        probe.to(torch.device(on))
    facts.rollouts = probe.sample()
    return f"equal in both views of {len(facts.records)} records; the learner's side is on {probe.device}"


def device(config: Config) -> str:
    """Where this process computes: the first GPU that the placement gives the learner here, else the CPU."""
    node = node_of(config)
    devices = next((g.devices for g in placement_of(config).learner if g.node == node), None)
    return f"cuda:{devices[0]}" if devices and devices[0] < torch.cuda.device_count() else "cpu"


def log_probs(facts: Facts) -> str:
    """The student here and the student in vLLM agree on what was sampled."""
    found = {v: facts.probe.mismatch([r for r in facts.rollouts if r.view == v]) for v in VIEWS}
    shown = "; ".join(f"{v} {m}" for v, m in found.items()) + f" nats ({expected(facts.config)})"
    if not all(agrees(m, facts.config) for m in found.values()):
        raise UserError(shown)
    return shown


def agrees(found: Mismatch, config: Config) -> bool:
    """Whether a mismatch is no more than rounding; NaN is more."""
    mean, greatest = LIMITS[config.student.dtype]
    return found.mean <= mean and found.greatest <= greatest


def expected(config: Config) -> str:
    """The limits in words."""
    mean, greatest = LIMITS[config.student.dtype]
    return f"{config.student.dtype}: at most {mean:g} and {greatest:g}"


def samples(facts: Facts) -> str:
    """Sampled responses hold no banned id and end with a stop id, or were cut at the limit."""
    return sampled(facts.rollouts, facts.family, facts.asked.rollout.max_tokens)


def sampled(rollouts: list[Rollout], family: Family, limit: int) -> str:
    """What is to be said of responses of at most `limit` tokens. Raises UserError for one that should not be."""
    banned, eos = set(family.banned_ids), set(family.eos_ids)
    for r in rollouts:
        said, ids = f"a response to {r.prompt.id} ({r.view} view)", r.token_ids
        if bad := sorted(banned & set(ids)):
            raise UserError(f"{said} holds the banned id {bad[0]}")
        if eos & set(ids[:-1]):
            raise UserError(f"{said} goes on after a stop id: {ids[-8:]}")
        if r.truncated != (ids[-1] not in eos):
            raise UserError(f"{said} ends wrongly flagged: {ids[-8:]}")
        if r.truncated and len(ids) < limit:
            found = f"{len(ids)} of {limit} tokens with {ids[-1]}, which is no stop id ({sorted(eos)})"
            raise UserError(f"{said} ends after {found}")
    cut = sum(r.truncated for r in rollouts)
    told = f"{len(rollouts)} responses without banned ids; {cut} were cut after {limit} tokens, the others ended"
    return Warned(told) if cut == len(rollouts) else told


def weight_push(facts: Facts) -> str:
    """New weights reach the server: perturbed ones differ until they are pushed, then agree; so do the originals."""
    with closing(WeightSync(facts.probe.sampler.servers, facts.family, facts.asked, 0)) as sync:
        return judge_push(*facts.probe.push_and_restore(sync, 1), facts.asked)


def judge_push(stale: Mismatch, fresh: Mismatch, restored: Mismatch, config: Config) -> str:
    """The three mismatches in words. Raises UserError when the push did not do what it must."""
    shown = f"left out: {stale}; done: {fresh}; originals pushed again: {restored} nats"
    if not (agrees(fresh, config) and agrees(restored, config)):
        raise UserError(f"{shown} ({expected(config)})")
    if not (stale.mean > STALE_TIMES * fresh.mean and stale.greatest > DIFFER):
        raise UserError(f"{shown}: perturbed weights should cost more than {DIFFER:g} while they are not pushed")
    return shown


def teacher_reads(facts: Facts) -> str:
    """The teacher prefers a record's own response to another's: it reads the transcript."""
    if not asks_teacher(facts.config):
        raise Skip("nothing in this run reads or asks a teacher")
    vars(facts).pop("probe", None)  # its memory is the teacher's
    return each_teacher(prefers)(facts)


def prefers(facts: Facts) -> str:
    """`teacher_reads` of one teacher."""
    config = facts.config.changed({"teacher.shard": False, "teacher.path": facts.teacher})  # of one process
    if config.objective.about.other_tokenizer:
        raise Skip("with another tokenizer it gives no log-probs of these tokens")
    on = torch.device(device(config))
    if config.teacher.about.servers == "all" and not config.teacher.urls:
        config = config.changed({"teacher.urls": [start(facts, teacher_server(config, place_of("teacher", config)))]})
    itself = ReferenceModel(config, facts.family, on, None) if config.teacher.about.weights == "student" else None
    teacher = make_teacher(config, facts.family, on, itself)
    return preference(teacher, facts.prompts["data.train"], facts.family, min(MAX_TOKENS, config.rollout.max_tokens))


def preference(teacher: Teacher | Any, prompts: list[Prompt], family: Family, limit: int) -> str:
    """Compare the mean log-prob of each record's response with that of another's, after the same transcript.

    Records without `response` get the teacher's greedy reply. Raises UserError when the own one wins too seldom.
    """
    chosen, whose = [p for p in prompts if p.response is not None][:PAIRS], "gold responses"
    if len(chosen) > 1:
        replies = [gold_ids(family, p, limit)[0] for p in chosen]
    else:
        chosen, whose = prompts[:PAIRS], "its own greedy replies"
        replies = [ids for ids, _ in teacher.respond(chosen, limit)]
    pairs = []
    for i, (prompt, own) in enumerate(zip(chosen, replies, strict=True)):
        others = [*replies[i + 1 :], *replies[:i]]
        if (other := next((r for r in others if r != own), None)) is not None:
            pairs += [Rollout(prompt, "text", ids, None, -1, False) for ids in (own, other)]
    if not pairs:
        raise Skip(f"the {len(chosen)} records have no two different responses to compare")
    means = [np.mean(s.teacher_logprobs) for s in teacher.score(pairs) if s.teacher_logprobs is not None]
    better = -np.diff(np.reshape(means, (-1, 2)))
    wins = f"a record's own before another's in {(better > 0).sum()} of {len(better)}"
    shown = f"{whose}: {wins}, by {better.mean():.2f} nats a token on average"
    if not (better > 0).mean() >= MOST:
        raise UserError(f"{shown}; {MOST:.0%} at least expected")
    return shown


START_REMEDY = "mend what its log names; rollout.server and launch.health_timeout_s are its settings"
PROMPT_REMEDY = "give vLLM and transformers the same processor and chat template: the files of one checkpoint"
WEIGHTS_REMEDY = "restart the servers of rollout.urls with student.path; one just started: `opd families --check`"
STOP_REMEDY = "name what ends the responses in generation_config.json's eos_token_id"
PUSH_REMEDY = "nccl, ipc: take rollout.transport=file; `opd families --check` tries the family on a small checkpoint"
TEACHER_REMEDY = "compare transcripts with responses; is teacher.path an instruction-tuned LLM?"
CHECKS = (
    Check("student server", server, START_REMEDY, ("student", "servers", "clips"), True),
    Check("prompt ids", prompt_ids, PROMPT_REMEDY, ("student server",), True),
    Check("log-probs", log_probs, WEIGHTS_REMEDY, ("prompt ids",), True),
    Check("samples", samples, STOP_REMEDY, ("prompt ids",), True),
    Check("weight push", weight_push, PUSH_REMEDY, ("prompt ids",), True),
    Check("teacher reads", teacher_reads, TEACHER_REMEDY, ("tokenizers", "clips"), True),
)
