"""What receives weights inside vLLM's workers: from files, by NCCL, by CUDA IPC. Loaded by plugin.py's names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd.inference.transports import decode_handle


def tied_heads(model: Any) -> list[tuple[Any, Any]]:
    """Output layers that share their weight with an embedding: no update names them, and vLLM's CPU keeps a copy."""
    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    others = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and m not in heads]
    return [(head, other) for head in heads for other in others if head.weight is other.weight]


def repack_experts(model: Any) -> list[tuple[Any, Any]]:
    """Have vLLM's CPU experts pack their weights again: their kernel keeps the old ones otherwise, silently.

    Returns (quantization method, kernel taken from it): to be given back where the update brings no experts.
    """
    modules = model.modules() if not torch.cuda.is_available() else ()
    methods: list[Any] = [getattr(m, "quant_method", None) for m in modules]
    taken = [(m, m.moe_kernel) for m in methods if getattr(m, "moe_kernel", None) is not None]
    for method, _ in taken:
        method.moe_kernel = None
    return taken


def load_through_wrappers() -> None:
    """Have vLLM's Voxtral load its adapter by the loaders that a reload puts around parameters: it goes past them."""
    import vllm.model_executor.models.voxtral as voxtral

    plain = voxtral.default_weight_loader
    if getattr(plain, "of_opd", False):
        return

    def load(parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        getattr(parameter, "weight_loader", plain)(parameter, weight)

    load.of_opd = True  # type: ignore[attr-defined]
    voxtral.default_weight_loader = load


class Mended:
    """Around an engine's update, in checkpoint format by layerwise reload: what vLLM's reload leaves wrong."""

    model: Any

    def start_weight_update(self) -> None:
        """Begin an update."""
        self.tied = tied_heads(self.model)
        self.kernels = repack_experts(self.model)
        if type(self.model).__name__ == "VoxtralForConditionalGeneration":
            load_through_wrappers()
        super().start_weight_update()  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        """End it: the new weights are in use."""
        super().finish_weight_update()  # type: ignore[misc]
        for method, kernel in self.kernels:
            method.moe_kernel = method.moe_kernel or kernel
        for head, embedding in self.tied:
            head.weight = embedding.weight
            head.quant_method.process_weights_after_loading(head)


@dataclass
class FileInitInfo(base.WeightTransferInitInfo):
    """What a server must know before the first update."""

    folder: str  # the only one that updates may be read from


@dataclass
class FileUpdateInfo(base.WeightTransferUpdateInfo):
    """One chunk of an update."""

    name: str  # of a safetensors file in that folder


class FileReceiver(base.WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Weights from safetensors files, through vLLM's layerwise reload, which undoes and redoes its weight packing."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        self.folder = os.path.realpath(init_info.folder)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # vLLM's own waits for an accelerator

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        path = os.path.realpath(os.path.join(self.folder, update_info.name))
        if os.path.dirname(path) != self.folder:
            raise ValueError(f"{update_info.name}: outside the transfer folder {self.folder}")
        with safe_open(path, "pt") as f:
            self.model.load_weights((key, f.get_tensor(key)) for key in f.keys())  # noqa: SIM118 - not a dict

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class FileEngine(Mended, FileReceiver):
    """opd_file."""


class NcclEngine(Mended, NCCLWeightTransferEngine):
    """opd_nccl: vLLM's own."""


@dataclass
class IpcUpdateInfo(IPCWeightTransferUpdateInfo):
    """vLLM's, but the handles come as plain JSON; pickled ones are refused."""

    ipc_handles: Any = None  # {UUID of the GPU: handle as opd.inference.transports writes it}

    def __post_init__(self) -> None:
        if self.ipc_handles_pickled is not None or not isinstance(self.ipc_handles, dict):
            raise ValueError("opd_ipc: expected ipc_handles as {uuid: handle}; it takes no pickles")
        self.ipc_handles = {uuid: decode_handle(handle) for uuid, handle in self.ipc_handles.items()}
        super().__post_init__()


class IpcEngine(Mended, IPCWeightTransferEngine):
    """opd_ipc: vLLM's own, told of the memory in plain JSON."""

    update_info_cls = IpcUpdateInfo
