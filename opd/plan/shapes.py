"""Shapes of models: names and sizes of all weights, from config.json alone. Imports no torch before it is asked.

The model is built by transformers on the `meta` device, where a tensor has a shape and no storage: counts are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from opd.config.load import resolve_model
from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.models.registry import FAMILIES, quiet
from opd.settings import UserError, first_line, read_yaml

RATE = 16000  # samples per second of every family
# What a family asks of its feature extractor, as Whisper's has it: windows of 30 s, a frame every 10 ms.
EXTRACTOR = {"sampling_rate": RATE, "hop_length": 160, "n_samples": 30 * RATE, "nb_max_frames": 3000, "min_length": 0}


@dataclass(frozen=True)
class Weight:
    """One parameter, whole."""

    name: str
    shape: tuple[int, ...]
    part: str  # tower, adapter, llm or fixed; of a teacher always llm
    linear: bool  # of a linear layer that is not the output layer
    embedding: bool  # looked up, not multiplied

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Decoder:
    """Dimensions of an LLM."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the experts that one token meets together, in a mixture
    vocab: int
    experts: int = 1
    experts_per_token: int = 1


@dataclass(frozen=True)
class Tower:
    """Dimensions of an audio tower."""

    layers: int
    width: int
    intermediate: int
    positions_per_second: float


@dataclass(frozen=True)
class ModelShape:
    """All that sizes need to know of a model."""

    path: str
    source: str  # where its config came from
    weights: tuple[Weight, ...]
    decoder: Decoder
    tower: Tower | None = None
    audio_tokens: Callable[[float], int] = lambda seconds: 0  # embeddings of a clip of so many seconds

    def count(self, part: str | None = None) -> int:
        """Parameters of a part, or of all."""
        return sum(w.numel for w in self.weights if part in (None, w.part))

    @property
    def active(self) -> float:
        """Parameters that one token of the LLM is multiplied with: experts by their share, no embeddings."""
        share = self.decoder.experts_per_token / self.decoder.experts
        llm = [w for w in self.weights if w.part == "llm" and not w.embedding]
        return sum(w.numel * (share if ".experts." in w.name else 1.0) for w in llm)


@cache
def shipped() -> dict[str, Any]:
    """Published checkpoints whose shapes come with opd: hub id -> source, parameters, config."""
    return read_yaml(Path(__file__).with_name("shapes.yaml"))


def student_shape(config: Config) -> ModelShape:
    """Shape of the recipe's student, by its family. Raises UserError when there is no config to read."""
    return _student(_resolved(config.student.path, "student.path"), config.student.family)


def teacher_shape(config: Config) -> ModelShape:
    """The teacher's shape: of several the largest, of `self` the student's. UserError: no config, or no text LLM."""
    if config.teacher.about.routes:
        return max(map(teacher_shape, of_routes(config).values()), key=lambda shape: shape.count())
    if config.teacher.about.weights == "student":
        return student_shape(config)
    return _teacher(_resolved(config.teacher.path, "teacher.path"))


def _resolved(path: str, key: str) -> str:
    """`resolve_model`; a run that is still to come has the shape of what its own recipe names: not known here."""
    try:
        return resolve_model(path, key)
    except UserError as e:
        raise UserError(f"{e}; to plan before it exists, name what it starts from: {key}=...") from e


@cache
def _student(path: str, name: str | None) -> ModelShape:
    import transformers

    from opd.models.base import Family

    full, source = _config(path, "student.path")
    entry = next((e for e in FAMILIES.values() if full.model_type in e.model_types), None)
    if entry is None:
        raise UserError(f"student.path {path}: model_type {full.model_type!r} is not supported; see `opd families`")
    if name not in (None, entry.name):
        raise UserError(f"student.family {name}: {path} is of {entry.name}; leave it out: student.family=")
    family: Family = object.__new__(entry.load_class())  # without a checkpoint's processor
    about = family.model_config(full)
    family.config, family.extractor = about, _extractor(about)
    weights = _weights(_on_meta(getattr(transformers, family.model_class), about), family.part_of)
    decoder = _decoder(about.get_text_config())
    tower = _tower(getattr(about, "audio_config", None) or about.encoder_config)
    return ModelShape(path, source, weights, decoder, tower, lambda s: family.audio_tokens(round(s * RATE)))


@cache
def _teacher(path: str) -> ModelShape:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    about, source = _config(path, "teacher.path")
    if type(about) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"teacher.path {path}: expected a text LLM, found model_type {about.model_type!r}")
    weights = _weights(_on_meta(MODEL_FOR_CAUSAL_LM_MAPPING[type(about)], about), lambda name: "llm")
    return ModelShape(path, source, weights, _decoder(about))


def _config(path: str, key: str) -> tuple[Any, str]:
    """(transformers config, where it came from): a folder, the hub's cache, the shipped shapes, the hub."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    try:
        if Path(path, "config.json").is_file():
            return AutoConfig.from_pretrained(path), "its config.json"
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return AutoConfig.from_pretrained(path, local_files_only=True), "its config.json in the hub's cache"
        if path in shipped():
            with quiet():
                known = AutoConfig.for_model(**shipped()[path]["config"])
            return known, "shipped shapes (opd/plan/shapes.yaml), not its config.json"
        return AutoConfig.from_pretrained(path), "its config.json on the hub"
    except (OSError, ValueError, KeyError) as e:
        remedy = "name a folder or a hub id that can be reached, or one whose shape comes with opd"
        told = f"no readable config.json ({first_line(e)}); {remedy}: {', '.join(shipped())}"
        raise UserError(f"{key} {path}: {told}") from e


def _extractor(about: Any) -> Any:
    """Granite-Speech counts by its projector: `window` frames of 20 ms become window / downsample embeddings."""

    def embeddings(samples: list[int]) -> list[int]:
        frames = [(n // 160 + 1) // 2 for n in samples]
        return [-(-f // about.window_size) * (about.window_size // about.downsample_rate) for f in frames]

    return SimpleNamespace(**EXTRACTOR, _get_num_audio_features=embeddings)


def _on_meta(model_class: Any, about: Any) -> Any:
    import torch

    with quiet(), torch.device("meta"):  # it warns of special ids that sizes do not depend on
        return model_class._from_config(about)


def _weights(hf: Any, part_of: Callable[[str], Any]) -> tuple[Weight, ...]:
    """Every parameter once: a tied output layer is the embedding, and multiplies."""
    from torch import nn

    output = hf.get_output_embeddings()
    kinds = {f"{n}.weight": m for n, m in hf.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    found = []
    for name, p in hf.named_parameters():
        module = kinds.get(name)
        linear = isinstance(module, nn.Linear) and module is not output
        looked_up = isinstance(module, nn.Embedding) and not (output is not None and output.weight is p)
        found.append(Weight(name, tuple(p.shape), part_of(name), linear, looked_up))
    return tuple(found)


def _decoder(about: Any) -> Decoder:
    mixture = next((n for k in ("num_experts", "num_local_experts") if (n := getattr(about, k, None))), 1)
    width = getattr(about, "moe_intermediate_size", None) if mixture > 1 else None
    at_work = getattr(about, "num_experts_per_tok", None) or 1 if mixture > 1 else 1
    return Decoder(
        layers=about.num_hidden_layers,
        hidden=about.hidden_size,
        heads=about.num_attention_heads,
        kv_heads=getattr(about, "num_key_value_heads", None) or about.num_attention_heads,
        head_dim=getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads,
        intermediate=(width or about.intermediate_size) * at_work,
        vocab=about.vocab_size,
        experts=mixture,
        experts_per_token=at_work,
    )


def _tower(about: Any) -> Tower:
    """Names differ from tower to tower; three convolutions of stride 2 precede Qwen3's, one those of the others."""

    def first(*names: str) -> int:
        return next(int(v) for n in names if (v := getattr(about, n, None)))

    width = first("d_model", "hidden_size", "hidden_dim")
    ffn = getattr(about, "encoder_ffn_dim", None) or getattr(about, "intermediate_size", None) or 4 * width
    layers = first("encoder_layers", "num_hidden_layers", "num_layers")
    return Tower(layers, width, ffn, 12.5 if getattr(about, "downsample_hidden_size", None) else 50.0)
