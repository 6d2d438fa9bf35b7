"""Weights on disk: safetensors written whole, and checked to be whole. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.settings import UserError

if TYPE_CHECKING:
    import torch

    from opd.models.base import Family


def write_model(family: Family, hf: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a model as files; `state` holds its parameters and persistent buffers by their names in memory."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    family.save_extras(hf, folder)
    published = {n: v for name, tensor in state.items() for n, v in family.published(name, tensor)}
    save_torch_state_dict(published, folder)
    family.save_other_weights(state, folder)


def buffers(hf: Any) -> dict[str, torch.Tensor]:
    """What a state dict holds besides parameters, such as the statistics of batch norms."""
    parameters = {name for name, _ in hf.named_parameters(remove_duplicate=False)}
    return {n: b.detach().cpu() for n, b in hf.state_dict().items() if n not in parameters}


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
