"""What can be known before a server starts: files, models, tokenizers, manifests, clips, the run folder."""

from __future__ import annotations

import math
import os
import random

import numpy as np

from opd import types
from opd.config.deepspeed import deepspeed_settings
from opd.config.load import resolve_model, state_of_run, unread
from opd.config.needs import asks_teacher, copies_start, route_of, starts_student, teacher_servers
from opd.config.schema import Config
from opd.doctor.checks import Check, Facts, Skip, Warned, each_teacher
from opd.doctor.machine import caches, memory, placement, versions, weights_folder
from opd.inference.client import Server
from opd.models.registry import whole_weights
from opd.prompts import audio
from opd.prompts.augment import Augmenter
from opd.prompts.clips import ContextLimit, check_share
from opd.prompts.manifest import read_manifest
from opd.scoring.scorer import Scorer
from opd.settings import UserError, attempt, looked, shown
from opd.types import Prompt, audio_paths

KEPT = 8  # training records that are kept with their clips for what comes after


def check(config: Config) -> list[str]:
    """Check a recipe without a server or GPU: one line per thing checked. Raises UserError at the first fault."""
    facts, lines = Facts(config), []
    for c in checks():
        try:
            lines.append(f"{c.name}: {c.run(facts)}")
        except Skip as e:
            lines.append(f"{c.name}: not run: {e}")
    return lines


def checks() -> tuple[Check, ...]:
    """The cheap checks of a recipe, in their order."""
    from opd.doctor import tokenizers as v  # needs torch

    both = ("student", "teacher")
    stop = "set eos_token_id in generation_config.json to what ends a turn"
    return (
        Check("run folder", run_folder_, "choose another run.dir"),
        Check("DeepSpeed", deepspeed, "mend the JSON file that train.deepspeed names"),
        Check("student", student, "name a whole checkpoint (`opd families`), or mend student.lora"),
        Check("teacher", each_teacher(teacher), "name a whole checkpoint of a text LLM"),
        Check("settings", settings, "lower objective.top_k", both),
        Check("servers", servers, "start the servers of the recipe with its models, or take the URLs out", both),
        Check("manifests", manifests, "mend or remove the records that are named"),
        Check("versions", versions, "install what was tested: requirements/"),
        Check("tokenizers", each_teacher(v.tokenizers), "choose a teacher with the student's tokenizer", both),
        Check("chat templates", each_teacher(v.templates), "mend chat_template.jinja", ("tokenizers", "manifests")),
        Check("clips", clips, "mend or remove them, or have the servers take more", ("student", "manifests")),
        Check("stop ids", each_teacher(v.stop_ids), stop, ("tokenizers",)),
        Check("banned ids", v.banned_ids, "mend the family's banned_ids in opd/models/", ("student",)),
        Check("caches", caches, "set the variable that is named to a folder that can be written"),
        Check("new weights", weights_folder, "make room there", ("student",)),
        Check("placement", placement, "choose a placement of recipes/placements/ for the GPUs that are here"),
        Check("memory", memory, "`opd plan` seeks what would fit"),
    )


def run_folder_(facts: Facts) -> str:
    """The run folder holds nothing else."""
    return f"{facts.config.run.dir}: {state_of_run(facts.config)}"


def deepspeed(facts: Facts) -> str:
    """The DeepSpeed JSON sets ZeRO only."""
    stage = (deepspeed_settings(facts.config).get("zero_optimization") or {}).get("stage", 0)
    return f"ZeRO stage {stage}"


def student(facts: Facts) -> str:
    """The student is a whole checkpoint of a known family."""
    from opd.models.base import family_of
    from opd.models.lora import targets

    s = facts.config.student
    path = resolve_model(s.path, "student.path")
    family = family_of(path, s.family)
    whole_weights(path, "student.path")
    facts.student, facts.family = path, family
    said = f"{s.path}: {type(family).__name__}, {family.vocab_size} ids"
    if s.lora is not None:
        layers = targets(family.outline(), family, s.lora)
        kinds = sorted({n.rpartition(".")[2] for n in layers})
        said += f"; adapters on {len(layers)} linear layers of the LLM: {', '.join(kinds)}"
    return said


def teacher(facts: Facts) -> str:
    """The teacher is a whole checkpoint of a text LLM. One that nothing asks is not looked at."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if not asks_teacher(facts.config):
        return "none: nothing in this run reads or asks one"
    if facts.config.teacher.about.weights == "student":
        facts.teacher = resolve_model(facts.config.student.path, "student.path")
        copied = "in a second copy" if copies_start(facts.config) else "adapters switched off"
        return f"the student at the start, {copied}"
    path = resolve_model(facts.config.teacher.path, "teacher.path")
    whole_weights(path, "teacher.path")
    try:
        about = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise UserError(f"teacher.path {path}: no loadable config: {str(e).splitlines()[0]}") from e
    if type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"teacher.path {path}: expected a text LLM, found model_type {about.model_type!r}")
    facts.teacher, facts.teacher_ids = path, about.vocab_size
    return f"{facts.config.teacher.path}: {about.model_type}, {about.vocab_size} ids"


def settings(facts: Facts) -> str:
    """objective.top_k fits the vocabularies; what is set and yet not read is named."""
    top, sizes = facts.config.objective.top_k, [("student", facts.family.vocab_size)]
    sizes += [("teacher", f.teacher_ids) for f in (facts, *facts.routes.values()) if f.teacher_ids is not None]
    whose, limit = min(sizes, key=lambda found: found[1])
    if top is not None and top > limit:
        raise UserError(f"objective.top_k {top}: expected at most {limit}, as many ids as the {whose}'s vocabulary has")
    found = unread(facts.config)
    return Warned("; ".join(found)) if found else "all that are set are read"


def servers(facts: Facts) -> str:
    """Running servers that the recipe names hold its models; what the student's take is noted."""
    config, asked = facts.config, teacher_servers(facts.config)
    named = [("rollout.urls", url, facts.student) for url in config.rollout.urls]
    named += [(key, url, resolve_model(model, key)) for key, url, model in asked]
    found = [Server(url, config.rollout.timeout_s).check_model(key, path, path) for key, url, path in named]
    taken = found[: len(config.rollout.urls)]
    if not taken and starts_student(config):
        taken = [config.rollout.server.max_model_len]
    facts.max_model_len = min(taken, default=None)
    if not config.rollout.urls and not asked:
        return "the recipe names none"
    return f"{len(config.rollout.urls)} hold the student, {len(asked)} the teacher"


def manifests(facts: Facts) -> str:
    """Every record can be read, has what its use needs, and names clips that exist."""
    config = facts.config
    paths = {"data.train": config.data.train, "eval.test": config.eval.test, "eval.retention": config.eval.retention}
    return "; ".join(_read(facts, key, path) for key, path in paths.items() if path is not None)


def _read(facts: Facts, key: str, path: str) -> str:
    config = facts.config
    try:
        prompts, bad = read_manifest(path, None if key == "data.train" else config.eval.limit)
    except UserError as e:
        without = "" if key == "data.train" else f"; to go without it: {key}="
        raise UserError(f"{key}: {e}{looked(path)}{without}") from e
    records = len(prompts) + len(bad)
    if bad:
        _refuse(config, key, len(bad), records, f"{bad[0]['place']}: {bad[0]['reason']}")
    for p in prompts if key == "data.train" else []:
        if config.rollout.source == "dataset" and p.response is None:
            raise UserError(f"{key}: {p.place}: rollout.source dataset needs a `response` in every record")
        if (name := config.data.weight) and not 0 < p.number(name) < math.inf:
            there = p.numbers.get(name, p.other.get(name))
            found = "the record has none" if there is None else f"found {there!r}"
            raise UserError(f"data.weight: {p.place}: expected a number above 0 by the name {name!r}, {found}")
    if key != "data.train":
        if lacking := [p.place for p in prompts if p.answer is None]:
            raise UserError(f"{key}: {lacking[0]}: an evaluation needs an `answer`, the record lacks one")
        Scorer(config.eval).check(prompts, key)
    follows = prompts and key == "eval.test" and config.eval.best in ("misalignment", "forgetting")
    if follows and all(p.response is None for p in prompts):
        raise UserError(f"eval.best {config.eval.best}: follows gold responses, and no record of {path} has any")
    if config.teacher.about.routes and key != "eval.retention":
        for p in prompts:
            route_of(config.teacher, p)
    if gone := [(p.place, a) for p in prompts for a in audio_paths(p) if not os.path.isfile(a)]:
        fault = f"{gone[0][0]}: {shown(gone[0][1])}: no such audio file"
        _refuse(config, key, len(bad) + len(dict(gone)), records, fault)
    facts.prompts[key], facts.bad[key] = prompts, bad
    numbered = [p for p in prompts if p.numbered]
    note = f"; {len(numbered)} ids are numbers, taken as text, such as {numbered[0].id!r}" if numbered else ""
    return f"{key} {path}: {len(prompts)} records, {len(bad)} bad{note}"


def _refuse(config: Config, key: str, bad: int, of: int, fault: str) -> None:
    if key != "data.train":
        raise UserError(f"{key}: {fault}; mend or remove it: every held-out record must be good")
    check_share(config, bad, of, fault)


def clips(facts: Facts) -> str:
    """A sample of the training records, and all that are held out, decode and fit."""
    length = facts.max_model_len
    if length is None and starts_student(facts.config):
        length = facts.config.rollout.server.max_model_len
    limit = ContextLimit(facts.family, facts.config.rollout.max_tokens, length)
    if facts.config.data.augment.active:
        Augmenter(facts.config.data.augment, facts.config.run.seed, facts.family.sampling_rate)  # looks for its noise
    return "; ".join(_decode(facts, key, limit) for key in facts.prompts)


def _decode(facts: Facts, key: str, limit: ContextLimit) -> str:
    config, prompts, bad = facts.config, facts.prompts[key], facts.bad[key]
    size = config.data.check if key == "data.train" and config.data.check else len(prompts)
    chosen = random.Random(config.run.seed).sample(prompts, min(size, len(prompts)))
    found = [f"{b['place']}: {b['reason']}" for b in bad]
    long, longest, seconds = 0, 0, list[float]()
    for prompt in chosen:
        heard = attempt(_heard, prompt, limit, config.data.max_audio_seconds)
        if isinstance(heard, ValueError):
            long += isinstance(heard, types.TooLong)
            found.append(f"{prompt.place}: {heard}")
            _refuse(config, key, len(found), len(chosen) + len(bad), found[-1])
            continue
        waves, ids, lengths = heard
        seconds += lengths
        longest = max(longest, ids)
        if key == "data.train" and len(facts.records) < KEPT:
            facts.records.append(prompt)
            facts.clips |= waves
    beside = "" if limit.max_model_len is None else f" + {limit.max_tokens} of {limit.max_model_len}"
    length = ""
    if seconds:
        length = f"clips of {min(seconds):.1f} to {max(seconds):.1f} s, {np.mean(seconds):.1f} on average, "
    counts = f"{key}: {len(chosen)} of {len(prompts)} decoded, {len(found)} bad, {long} of them too long, "
    return "\n  bad: ".join([f"{counts}{length}at most {longest} prompt ids{beside}", *found])


def _heard(prompt: Prompt, limit: ContextLimit, longest: float) -> tuple[dict[str, np.ndarray], int, list[float]]:
    """Waveforms by path, ids of the longer view, seconds of each clip."""
    rate = limit.family.sampling_rate
    waves = {p: audio.load(p, rate, longest) for p in audio_paths(prompt)}
    seconds = [len(w) / rate for w in waves.values()]
    waves = {p: limit.filled(w) for p, w in waves.items()}
    return waves, limit.check(prompt, waves), seconds
