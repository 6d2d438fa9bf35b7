"""Loaded by vLLM in each of its processes (entry point `vllm.general_plugins`): registers what is ours.

The weight transport `opd_file` reads safetensors files from a folder that learner and server share, such as /dev/shm.
With OPD_TRIM_AUDIO=1 in the environment, models of vllm_models.py stand in for vLLM's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BACKEND = "opd_file"
BACKENDS = {"file": BACKEND, "nccl": "opd_nccl", "ipc": "opd_ipc"}  # by rollout.transport
TRIM_AUDIO = "OPD_TRIM_AUDIO"
TRIMMED = {
    "Qwen2AudioForConditionalGeneration": "opd.vllm_models:TrimmedQwen2Audio",
    "GraniteSpeechForConditionalGeneration": "opd.vllm_models:ClipwiseGraniteSpeech",
}


def register() -> None:
    """Register `opd_file` with vLLM's factory, once per process, and the trimmed models where asked for."""
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _engine_class())
    if os.environ.get(TRIM_AUDIO) == "1":
        for architecture, model in TRIMMED.items():
            ModelRegistry.register_model(architecture, model)


def tied_heads(model: Any) -> list[tuple[Any, Any]]:
    """Output layers that share their weight with an embedding: no update names them, and vLLM's CPU keeps a copy."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    others = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and m not in heads]
    return [(head, other) for head in heads for other in others if head.weight is other.weight]


def repack_experts(model: Any) -> list[tuple[Any, Any]]:
    """Have vLLM's CPU experts pack their weights again: their kernel keeps the old ones otherwise, silently.

    Returns (quantization method, kernel taken from it): to be given back where the update brings no experts.
    """
    import torch

    modules = model.modules() if not torch.cuda.is_available() else ()
    methods: list[Any] = [getattr(m, "quant_method", None) for m in modules]
    taken = [(m, m.moe_kernel) for m in methods if getattr(m, "moe_kernel", None) is not None]
    for method, _ in taken:
        method.moe_kernel = None
    return taken


def load_through_wrappers() -> None:
    """Have vLLM's Voxtral load its adapter by the loaders that a reload puts around parameters: it goes past them."""
    import torch
    import vllm.model_executor.models.voxtral as voxtral

    plain = voxtral.default_weight_loader
    if getattr(plain, "of_opd", False):
        return

    def load(parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        getattr(parameter, "weight_loader", plain)(parameter, weight)

    load.of_opd = True  # type: ignore[attr-defined]
    voxtral.default_weight_loader = load


def _engine_class() -> type[Any]:
    import torch
    from safetensors import safe_open
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class FileInitInfo(WeightTransferInitInfo):
        folder: str  # the only one that updates may be read from

    @dataclass
    class FileUpdateInfo(WeightTransferUpdateInfo):
        name: str  # of a safetensors file in that folder

    def stream(path: str) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(path, "pt") as f:
            for key in f.keys():  # noqa: SIM118 - not a dict
                yield key, f.get_tensor(key)

    class FileEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
        """Weights in checkpoint format through vLLM's layerwise reload, which undoes and redoes its weight packing."""

        init_info_cls = FileInitInfo
        update_info_cls = FileUpdateInfo

        def init_transfer_engine(self, init_info: FileInitInfo) -> None:
            self.folder = os.path.realpath(init_info.folder)

        def start_weight_update(self) -> None:
            self.tied = tied_heads(self.model)
            self.kernels = repack_experts(self.model)
            if type(self.model).__name__ == "VoxtralForConditionalGeneration":
                load_through_wrappers()
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: FileUpdateInfo) -> None:
            path = os.path.realpath(os.path.join(self.folder, update_info.name))
            if os.path.dirname(path) != self.folder:
                raise ValueError(f"{update_info.name}: outside the transfer folder {self.folder}")
            self.model.load_weights(stream(path))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            for method, kernel in self.kernels:
                method.moe_kernel = method.moe_kernel or kernel
            for head, embedding in self.tied:
                head.weight = embedding.weight
                head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None:
            pass

    return FileEngine
