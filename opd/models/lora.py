"""Low-rank adapters on the LLM's linear layers (LoRA, arXiv 2106.09685), through PEFT; docs/training.md.

Whatever leaves the learner has the names and shapes of the plain model, adapters merged into what they adapt:
W + alpha / r * B A. Weight sync and checkpoints know nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd.config.schema import LoraConfig
from opd.models.base import Family
from opd.settings import UserError

ADAPTER = "default"  # PEFT's name for the only one
BASE = ".base_layer."  # in names of what an adapter sits on


def adaptable(hf: Any, family: Family) -> list[str]:
    """Names of the layers that can have an adapter: the LLM's linear ones but its output layer.

    Experts of a mixture, fused into 3-D parameters, are no linear layers: adapters go on the attention beside them.
    """
    head = hf.get_output_embeddings()
    linear = [n for n, m in hf.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return [n for n in linear if family.part_of(f"{n}.weight") == "llm"]


def targets(hf: Any, family: Family, lora: LoraConfig) -> list[str]:
    """Names of the layers that `lora` adapts; a target is a layer's name or how it ends.

    Raises UserError when a target matches no adaptable layer, with the names that would.
    """
    layers = adaptable(hf, family)
    found = {t: {n for n in layers if f".{n}".endswith(f".{t}")} for t in lora.targets}
    for target, those in found.items():
        if not those:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in layers}))
            told = f"expected names of the LLM's linear layers, found {target!r}; {family.path} has {known}"
            raise UserError(f"student.lora.targets: {told} (of one decoder layer: such as {layers[0]})")
    return [n for n in layers if not found or any(n in those for those in found.values())]


def inject(hf: Any, family: Family, lora: LoraConfig, seed: int) -> None:
    """Put adapters into `hf`, which then computes just what it did: B is 0. All else is frozen.

    Adapters have the dtype of what they adapt. In bfloat16 no small step is lost, for DeepSpeed's optimizer keeps a
    float32 copy of every trained parameter; and ZeRO-3 gathers parameters of one dtype.
    """
    import peft

    wanted = targets(hf, family, lora)
    sizes = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    model = {"base_model_class": type(hf).__name__, "parent_library": type(hf).__module__}
    about = {"base_model_name_or_path": family.path, "auto_mapping": model}
    settings = peft.LoraConfig(**sizes, **about, target_modules=wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # ZeRO-3 takes each rank's share from what that rank drew: all must draw the same
        peft.inject_adapter_in_model(settings, hf, ADAPTER)
    layers = adapted(hf)
    assert layers.keys() == set(wanted), "PEFT adapted other layers than it was told to"
    for layer in layers.values():
        for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            part.to(layer.base_layer.weight.dtype)


def adapted(hf: Any) -> dict[str, Any]:
    """PEFT's layers by the names of the linear layers whose place they took; none without adapters."""
    if getattr(hf, "peft_config", None) is None:
        return {}
    from peft.tuners.lora import LoraLayer

    return {n: m for n, m in hf.named_modules() if isinstance(m, LoraLayer)}


@contextmanager
def switched_off(hf: Any) -> Iterator[None]:
    """`hf` computes what it did before it had adapters; nothing with a gradient may be under way."""
    layers = adapted(hf).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass
class Piece:
    """One tensor of the plain model, and what of the learner it is made of."""

    name: str  # Hugging Face's, in memory, without adapters
    weight: nn.Parameter
    layer: Any = None  # PEFT's, when `weight` is adapted

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What has to be whole for `value`."""
        adapter = [self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight] if self.layer else []
        return [self.weight, *adapter]

    @torch.no_grad()
    def value(self, device: torch.device | str = "cpu") -> Tensor:
        """A copy on `device`; W + alpha / r * B A, summed in at least float32, where there is an adapter.

        The weight itself is left alone, so that however often one asks, nothing drifts.
        """
        if self.layer is None:
            return self.weight.data.detach().to(device, copy=True)
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        w, a, b = (p.data.to(exact) for p in self.parameters)
        return (w + self.layer.scaling[ADAPTER] * (b @ a)).to(self.weight.dtype).to(device)


def adapters(hf: Any) -> list[Piece]:
    """The adapters' own matrices, by their names in memory."""
    of = tuple(f"{n}.lora_" for n in adapted(hf))
    return [Piece(n, p) for n, p in hf.named_parameters() if of and n.startswith(of)]


def pieces(hf: Any, trainable_only: bool) -> Iterator[Piece]:
    """The plain model's tensors; `trainable_only`: those that training changes, and what vLLM needs beside them.

    vLLM fuses matrices of a block (q, k and v; gate and up) with their biases into one layer, and an update that
    brings a part of such a layer leaves the rest of it uninitialised. So a block that holds an adapter goes whole.
    """
    layers = adapted(hf)
    blocks = {n.rpartition(".")[0] for n in layers}
    own = {p.name for p in adapters(hf)}
    for name, p in hf.named_parameters():
        if name in own:
            continue
        plain = name.replace(BASE, ".")
        module, _, kind = plain.rpartition(".")
        if p.requires_grad or not trainable_only or module.rpartition(".")[0] in blocks:
            yield Piece(plain, p, layers.get(module) if kind == "weight" else None)


def save_adapter(hf: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write adapters as PEFT's files, for `PeftModel.from_pretrained` on the model that they were trained on.

    state: what `adapters` names, whole.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    settings = copy(hf.peft_config[ADAPTER])
    settings.inference_mode = True
    folder.mkdir(parents=True)
    settings.save_pretrained(str(folder))
    found = get_peft_model_state_dict(hf, state, ADAPTER, save_embedding_layers=False)
    whole = {f"base_model.model.{n}": v.contiguous() for n, v in found.items()}  # as a PeftModel would name them
    save_file(whole, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
