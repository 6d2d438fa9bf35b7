"""What can be known before a server starts: files, models, tokenizers, manifests, clips, the run folder."""

from __future__ import annotations

import random
from pathlib import Path

from opd import audio, run_folder
from opd.clips import Room, check_share
from opd.config import Config, UserError, resolve_model
from opd.http import Server, check_model
from opd.prompts import read_manifest
from opd.servers import starts_student
from opd.types import Prompt
from opd.views import audio_paths


def check(config: Config) -> list[str]:
    """Check a recipe without a server or GPU: one line per thing checked. Raises UserError at the first fault."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    from opd.learner import deepspeed_settings
    from opd.models import family_of
    from opd.teacher import check_tokenizers

    lines = [f"run folder {config.run.dir}: {run_folder.check(config)}"]
    stage = (deepspeed_settings(config).get("zero_optimization") or {}).get("stage", 0)
    lines.append(f"DeepSpeed settings: ZeRO stage {stage}")
    family = family_of(resolve_model(config.student.path))
    lines.append(f"student {config.student.path}: {type(family).__name__}, {family.vocab_size} ids")
    teacher = resolve_model(config.teacher.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise UserError(f"teacher.path {teacher}: no loadable tokenizer: {str(e).splitlines()[0]}") from e
    check_tokenizers(family, tokenizer, teacher)
    about = AutoConfig.from_pretrained(teacher)
    if type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"teacher.path {teacher}: expected a text LLM, found model_type {about.model_type!r}")
    lines.append(f"teacher {config.teacher.path}: same tokens as the student")
    taken = [_server(config, "rollout.urls", u, resolve_model(config.student.path)) for u in config.rollout.urls]
    for url in config.teacher.urls if config.teacher.kind == "server" else []:
        _server(config, "teacher.urls", url, teacher)
    if taken:
        lines.append(f"rollout.urls: {len(taken)} servers hold the student")
    elif starts_student(config):
        taken = [config.rollout.server.max_model_len]
    room = Room(family, config.rollout.max_tokens, min(taken, default=None))
    manifests = {
        "data.train": config.data.train,
        "eval.test": config.eval.test,
        "eval.retention": config.eval.retention,
    }
    lines += [_manifest(config, key, path, room) for key, path in manifests.items() if path is not None]
    return lines


def finished(config: Config) -> bool:
    """Whether this very recipe has already run to its end in its run folder."""
    return run_folder.check(config) == "finished"


def _server(config: Config, key: str, url: str, path: str) -> int:
    return check_model(Server(url, config.rollout.timeout_s), key, path, path)


def _manifest(config: Config, key: str, path: str, room: Room) -> str:
    try:
        prompts, bad = read_manifest(path, None if key == "data.train" else config.eval.limit)
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
    records = len(prompts) + len(bad)
    if bad:
        check_share(config, len(bad), records, f"{bad[0]['place']}: {bad[0]['reason']}")
    if key != "data.train":
        _check_answers(key, prompts)
    elif config.rollout.source == "dataset":
        without = next((p.place for p in prompts if p.response is None), None)
        if without:
            raise UserError(f"{key}: {without}: rollout.source dataset needs a `response` in every record")
    faults = len(bad)
    for prompt in prompts:
        if missing := next((a for a in audio_paths(prompt) if not Path(a).is_file()), None):
            faults += 1
            check_share(config, faults, records, f"{prompt.place}: {missing}: no such audio file")
    size = config.data.check or len(prompts)
    chosen = random.Random(config.run.seed).sample(prompts, min(size, len(prompts)))
    wrong = 0
    for prompt in chosen:
        try:
            limit = config.data.max_audio_seconds
            clips = {p: audio.load(p, room.family.sampling_rate, limit) for p in audio_paths(prompt)}
            room.check(prompt, clips)
        except audio.BadAudio as e:
            wrong += 1
            check_share(config, wrong + len(bad), len(chosen) + len(bad), f"{prompt.place}: {e}")
    return f"{key} {path}: {len(prompts)} records, {len(bad) + wrong} bad, {len(chosen)} decoded"


def _check_answers(key: str, prompts: list[Prompt]) -> None:
    for p in prompts:
        if p.answer is None or p.response is None:
            raise UserError(f"{key}: {p.place}: an evaluation needs `answer` and `response`, the record lacks one")
