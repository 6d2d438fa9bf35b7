"""Which speech LLM families there are, and what a launcher has to know of them. Imports no torch.

A new family is one file in opd/models/ and one entry here: docs/families.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from opd.settings import UserError


@dataclass(frozen=True)
class Entry:
    """One family: its class, and how vLLM serves it."""

    name: str
    family: str  # module of opd.models:class
    teacher: str  # the text LLM whose tokenizer it has
    _: KW_ONLY
    also: tuple[str, ...] = ()  # what config.json may call it beside its name
    modalities: tuple[str, ...] = ("audio",)  # that vLLM would take; all but audio are switched off
    server: tuple[str, ...] = ()  # further vLLM flags
    clips: int = 8  # at most, in one prompt
    shortest_s: float = 0.0  # shorter clips are filled up with silence: the tower pads them by what is beside them
    tail_s: float = 0.0  # silence behind every clip: else its last frames depend on what is beside it

    @property
    def model_types(self) -> tuple[str, ...]:
        """Of config.json."""
        return (self.name, *self.also)

    def load_class(self) -> Any:
        """Its subclass of opd.models.base.Family."""
        module, _, name = self.family.partition(":")
        return getattr(import_module(f"opd.models.{module}"), name)


_SEES: dict[str, Any] = {"modalities": ("audio", "image", "video")}
_QWEN3_TOWER: dict[str, Any] = {"shortest_s": 1.0, "tail_s": 0.02}
_QWEN3_OMNI = {"also": ("qwen3_omni_moe_thinker",)} | _SEES | _QWEN3_TOWER
_MISTRAL = ("--tokenizer-mode", "mistral", "--config-format", "mistral", "--load-format", "mistral")
_ENTRIES = (
    Entry("qwen2_audio", "whisper:Qwen2Audio", "Qwen/Qwen2-7B-Instruct"),
    Entry("qwen2_5_omni", "omni:Qwen25Omni", "Qwen/Qwen2.5-7B-Instruct", also=("qwen2_5_omni_thinker",), **_SEES),
    Entry("qwen3_omni_moe", "omni:Qwen3OmniMoe", "Qwen/Qwen3-30B-A3B-Instruct-2507", **_QWEN3_OMNI),
    Entry("voxtral", "voxtral:Voxtral", "mistralai/Ministral-8B-Instruct-2410", server=_MISTRAL, clips=5),
    Entry("audioflamingo3", "whisper:AudioFlamingo3", "Qwen/Qwen2.5-7B-Instruct", clips=1),
    Entry("glmasr", "whisper:GlmAsr", "zai-org/GLM-Edge-1.5B-Chat", clips=1),
    Entry("granite_speech", "granite_speech:GraniteSpeech", "ibm-granite/granite-3.3-2b-instruct", clips=1),
    Entry("qwen3_asr", "omni:Qwen3Asr", "Qwen/Qwen3-1.7B", **_QWEN3_TOWER),
)
FAMILIES = {entry.name: entry for entry in _ENTRIES}


def family_entry(path: str, name: str | None = None) -> Entry:
    """The entry of a checkpoint (folder or hub id), by its name, else by the `model_type` of its config.json.

    Raises UserError when there is no readable config, its model_type is not one of ours, or not that of `name`.
    """
    if name is not None:
        if name not in FAMILIES:
            raise UserError(f"student.family {name}: not known; known: {', '.join(FAMILIES)}")
        found = _config(path).get("model_type") if Path(path, "config.json").is_file() else None
        if found is not None and found not in FAMILIES[name].model_types:
            raise UserError(f"student.family {name}: {path} is of model_type {found!r}; leave it out: student.family=")
        return FAMILIES[name]
    found = _config(path).get("model_type")
    if entry := next((e for e in FAMILIES.values() if found in e.model_types), None):
        return entry
    known = ", ".join(sorted(t for e in FAMILIES.values() for t in e.model_types))
    raise UserError(f"student.path {path}: model_type {found!r} is not supported; supported: {known}")


def _config(path: str) -> dict[str, object]:
    file = Path(path, "config.json")
    try:
        if not file.is_file():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, "config.json"))
        config = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        remedy = f"({str(e).splitlines()[0]}); name its family: student.family=..."
        raise UserError(f"student.path {path}: no loadable config {remedy}") from e
    if not isinstance(config, dict):
        raise UserError(f"student.path {path}: no loadable config: {file} holds no object")
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers prints of its own; what is wrong, it raises."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


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
