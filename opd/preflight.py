"""What can be known before a server starts: files, models, tokenizers, manifests, clips, the run folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

from opd import audio, run_folder
from opd.clips import Room, check_share
from opd.config import Config, UserError, resolve_model
from opd.http import Server, check_model
from opd.layout import asks_teacher_servers, starts_student
from opd.prompts import read_manifest
from opd.types import Prompt
from opd.views import audio_paths


def check(config: Config) -> list[str]:
    """Check a recipe without a server or GPU: one line per thing checked. Raises UserError at the first fault."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from opd.learner import deepspeed_settings
    from opd.models import family_of
    from opd.models.lora import targets
    from opd.teacher import check_tokenizers

    lines = [f"run folder {config.run.dir}: {run_folder.check(config)}"]
    stage = (deepspeed_settings(config).get("zero_optimization") or {}).get("stage", 0)
    lines.append(f"DeepSpeed settings: ZeRO stage {stage}")
    student = resolve_model(config.student.path, "student.path")
    family = family_of(student, config.student.family)
    whole_weights(student, "student.path")
    lines.append(f"student {config.student.path}: {type(family).__name__}, {family.vocab_size} ids")
    if config.student.lora is not None:
        layers = targets(family.outline(), family, config.student.lora)
        kinds = sorted({n.rpartition(".")[2] for n in layers})
        lines.append(f"student.lora: adapters on {len(layers)} linear layers of the LLM: {', '.join(kinds)}")
    teacher = resolve_model(config.teacher.path, "teacher.path")
    whole_weights(teacher, "teacher.path")
    try:
        tokenizer = family.text_tokenizer(teacher)
    except (OSError, ValueError) as e:
        raise UserError(f"teacher.path {teacher}: no loadable tokenizer: {str(e).splitlines()[0]}") from e
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if len(tokenizer) <= (len(added) if isinstance(added, dict) else 0):
        raise UserError(f"teacher.path {teacher}: expected tokenizer files such as tokenizer.json, found none")
    check_tokenizers(family, tokenizer, teacher)
    about = AutoConfig.from_pretrained(teacher)
    if type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"teacher.path {teacher}: expected a text LLM, found model_type {about.model_type!r}")
    lines.append(f"teacher {config.teacher.path}: same tokens as the student")
    taken = [_server(config, "rollout.urls", u, student) for u in config.rollout.urls]
    asked = config.teacher.urls if asks_teacher_servers(config) else []
    for url in asked:
        _server(config, "teacher.urls", url, teacher)
    if asked:
        lines.append(f"teacher.urls: {len(asked)} servers hold the teacher")
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


def whole_weights(path: str, key: str) -> None:
    """Raise UserError unless every safetensors file of a checkpoint folder is there and whole, by its header.

    A hub id is not looked at.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in sorted(names):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{key} {path}: expected {name}, found none; weights must be safetensors")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as e:
            raise UserError(f"{key} {path}: {name} is damaged: {e}") from e


def _server(config: Config, key: str, url: str, path: str) -> int:
    return check_model(Server(url, config.rollout.timeout_s), key, path, path)


def _manifest(config: Config, key: str, path: str, room: Room) -> str:
    try:
        prompts, bad = read_manifest(path, None if key == "data.train" else config.eval.limit)
    except UserError as e:
        raise UserError(f"{key}: {e}" + ("" if key == "data.train" else f"; to go without it: {key}=")) from e
    training = key == "data.train"

    def refuse(count: int, of: int, fault: str) -> None:
        if not training:
            raise UserError(f"{key}: {fault}; mend or remove it: every held-out record must be good")
        check_share(config, count, of, fault)

    records = len(prompts) + len(bad)
    if bad:
        refuse(len(bad), records, f"{bad[0]['place']}: {bad[0]['reason']}")
    if not training:
        _check_answers(key, prompts)
    elif config.rollout.source == "dataset":
        without = next((p.place for p in prompts if p.response is None), None)
        if without:
            raise UserError(f"{key}: {without}: rollout.source dataset needs a `response` in every record")
    faults = len(bad)
    for prompt in prompts:
        if missing := next((a for a in audio_paths(prompt) if not Path(a).is_file()), None):
            faults += 1
            refuse(faults, records, f"{prompt.place}: {missing}: no such audio file")
    size = config.data.check if training and config.data.check else len(prompts)
    chosen = random.Random(config.run.seed).sample(prompts, min(size, len(prompts)))
    wrong = 0
    found = [f"{b['place']}: {b['reason']}" for b in bad]
    for prompt in chosen:
        try:
            limit = config.data.max_audio_seconds
            clips = {p: room.filled(audio.load(p, room.family.sampling_rate, limit)) for p in audio_paths(prompt)}
            room.check(prompt, clips)
        except audio.BadAudio as e:
            wrong += 1
            found.append(f"{prompt.place}: {e}")
            refuse(wrong + len(bad), len(chosen) + len(bad), f"{prompt.place}: {e}")
    counts = f"{key} {path}: {len(prompts)} records, {len(bad) + wrong} bad, {len(chosen)} decoded"
    return "\n  bad: ".join([counts, *found])


def _check_answers(key: str, prompts: list[Prompt]) -> None:
    for p in prompts:
        if p.answer is None or p.response is None:
            raise UserError(f"{key}: {p.place}: an evaluation needs `answer` and `response`, the record lacks one")
