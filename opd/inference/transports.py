"""How new weights travel to vLLM servers: files, NCCL between devices, or CUDA IPC on a shared one."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from opd.config.schema import RolloutConfig
from opd.inference.client import Server, on_each, together
from opd.inference.host import TRANSFER_PREFIX, free_port, sweep
from opd.settings import UserError
from opd.storage import disk

FILE_BYTES = 1 << 30
INIT = "/init_weight_transfer_engine"
Named = tuple[str, Tensor]  # under the name that vLLM's loader knows


class WeightTransport(Protocol):
    """Seam: carries tensors to every server, inside vLLM's start / update / finish protocol."""

    device: torch.device  # where it wants the tensors

    def connect(self, servers: list[Server]) -> None:
        """Make every server ready to receive; again when one of them was restarted."""

    def send(self, tensors: Iterable[Named], servers: list[Server], version: int) -> None:
        """Load tensors into every server and name the result `version`. Holds few of them at a time.

        Raises ServerError, naming the server, as soon as one fails.
        """

    def close(self) -> None:
        """Leave nothing behind."""


def chunks(tensors: Iterable[Named], limit: int) -> Iterator[list[Named]]:
    """Tensors in lists; each ends with the tensor that brings it to `limit` bytes or more."""
    chunk: list[Named] = []
    size = 0
    for name, tensor in tensors:
        chunk.append((name, tensor.contiguous()))
        size += tensor.nbytes
        if size >= limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class FileTransport:
    """Chunks of safetensors in a folder that learner and servers share (/dev/shm on one machine)."""

    device = torch.device("cpu")

    def __init__(self, config: RolloutConfig) -> None:
        sweep(config.transfer_dir)
        disk.free(config.transfer_dir, "rollout.transfer_dir")
        os.makedirs(config.transfer_dir, exist_ok=True)
        self.folder = tempfile.mkdtemp(prefix=f"{TRANSFER_PREFIX}{os.getpid()}-", dir=config.transfer_dir)
        self._numbers = count()  # of files, none used twice: a server may cache by name

    def connect(self, servers: list[Server]) -> None:
        on_each(servers, lambda server: server.post(INIT, {"init_info": {"folder": self.folder}}))

    def send(self, tensors: Iterable[Named], servers: list[Server], version: int) -> None:
        # every chunk is on disk before the first server starts: an update that fails half-way kills the engine
        paths: list[Path] = []
        size = 0
        for chunk in chunks(tensors, FILE_BYTES):
            paths.append(Path(self.folder, f"{next(self._numbers):06d}.safetensors"))
            size += sum(tensor.nbytes for _, tensor in chunk)
            with disk.filling(Path(self.folder), f"rollout.transfer_dir: {disk.gib(size)} of new weights do not fit"):
                save_file(dict(chunk), paths[-1])

        def update(server: Server) -> None:
            server.post("/start_weight_update")
            for path in paths:
                server.post("/update_weights", {"update_info": {"name": path.name}})
            server.post("/finish_weight_update", {"weight_version": str(version)})

        on_each(servers, update)
        for path in paths:
            path.unlink()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _Streaming(ABC):
    """Chunks go straight from rank 0's device, each with one update request that says what it holds.

    So no names or shapes are needed before the weights are gathered, and one chunk at a time is whole.
    """

    limit: int  # bytes of a chunk

    def __init__(self, config: RolloutConfig) -> None:
        if not torch.cuda.is_available():
            raise UserError(f"rollout.transport {config.transport}: the learner has no GPU; take file")
        self.device = torch.device("cuda", torch.cuda.current_device())

    def send(self, tensors: Iterable[Named], servers: list[Server], version: int) -> None:
        on_each(servers, lambda server: server.post("/start_weight_update"))
        for chunk in chunks(tensors, self.limit):
            about = {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
                "shapes": [list(tensor.shape) for _, tensor in chunk],
            }
            self._update(chunk, about, servers)
        on_each(servers, lambda server: server.post("/finish_weight_update", {"weight_version": str(version)}))

    @abstractmethod
    def _update(self, chunk: list[Named], about: dict[str, Any], servers: list[Server]) -> None:
        """Bring one chunk to every server."""


class NcclTransport(_Streaming):
    """vLLM's packed NCCL broadcast: rank 0 of the learner and all workers of all servers are one group."""

    limit = 1 << 30
    group: Any = None

    def connect(self, servers: list[Server]) -> None:
        if self.group is not None:
            on_each(servers, lambda server: server.post("/shutdown_weight_transfer_engine"))
            self.group.destroy()
            self.group = None
        *offsets, world = accumulate(on_each(servers, workers), initial=1)  # the learner is rank 0 of the group
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        _check_reachable(address, servers)
        info = {"master_address": address, "master_port": free_port(), "world_size": world}
        info |= {"packed": True, "packed_buffer_size_bytes": self.limit, "packed_num_buffers": 2}
        # each joins by a blocking call that ends when all have come
        bodies = ({"init_info": info | {"rank_offset": offset}} for offset in offsets)
        joins = [partial(s.post, INIT, body) for s, body in zip(servers, bodies, strict=True)]
        self.group = together([partial(join_group, info, self.device), *joins])[0]

    def _update(self, chunk: list[Named], about: dict[str, Any], servers: list[Server]) -> None:
        receive = [partial(server.post, "/update_weights", {"update_info": about}) for server in servers]
        together([partial(broadcast, self.group, chunk, self.device, self.limit), *receive])

    def close(self) -> None:
        if self.group is not None:
            self.group.destroy()


def workers(server: Server) -> int:
    """How many GPUs a server has."""
    return int(server.get("/get_world_size")["world_size"])


def join_group(info: dict[str, Any], device: torch.device) -> Any:
    """Rank 0 of the NCCL group that `info` describes to vLLM. Blocks until all ranks have joined."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    torch.cuda.set_device(device)  # of this thread
    return trainer_init(info)


def broadcast(group: Any, chunk: list[Named], device: torch.device, buffer_bytes: int) -> None:
    """Send a chunk to the other ranks of the group. Returns when it has left the device."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    torch.cuda.set_device(device)  # of this thread
    torch.cuda.synchronize()  # vLLM packs on streams of its own, which do not wait for ours
    packed_nccl_broadcast_producer(iter(chunk), group, 0, lambda item: item[1], buffer_bytes, 2)


def _check_reachable(address: str, servers: list[Server]) -> None:
    local = ("127.", "localhost", "::1")
    away = next((s.url for s in servers if not (urlsplit(s.url).hostname or "").startswith(local)), None)
    if away is not None and address.startswith(local):
        remedy = "start it with the address that its host has there (--main_process_ip, launch.hosts), or take file"
        raise UserError(f"rollout.transport nccl: {away} cannot reach the learner at MASTER_ADDR={address}; {remedy}")


class IpcTransport(_Streaming):
    """CUDA IPC: one server maps the memory of the learner rank whose GPU it shares. Handles travel as plain JSON."""

    limit = 1 << 28  # of the one device that learner and server share

    def connect(self, servers: list[Server]) -> None:
        gpus = sum(on_each(servers, workers))
        if gpus > 1:
            found = f"{len(servers)} with {gpus} GPUs together; take nccl or file"
            raise UserError(f"rollout.transport ipc: expected one server on the learner's GPU, found {found}")
        servers[0].post(INIT, {"init_info": {"packed": True}})

    def _update(self, chunk: list[Named], about: dict[str, Any], servers: list[Server]) -> None:
        flat = torch.cat([tensor.view(-1).view(torch.uint8) for _, tensor in chunk])
        about |= {"tensor_sizes": [tensor.nbytes for _, tensor in chunk], "ipc_handles": export(flat)}
        servers[0].post("/update_weights", {"update_info": about})  # returns when the server has made its copy

    def close(self) -> None:
        torch.cuda.ipc_collect()


def export(flat: Tensor) -> dict[str, Any]:
    """{UUID of its GPU: handle} by which another process maps a tensor; the tensor must live until it has."""
    torch.cuda.synchronize(flat.device)
    return {str(torch.cuda.get_device_properties(flat.device).uuid): encode_handle(reduce_tensor(flat)[1])}


# Handles of CUDA memory travel as JSON: what `torch.multiprocessing` would pickle, without a pickle from the network.
# Arguments of `rebuild_cuda_tensor` as torch's `reduce_tensor` gives them, in order, and what JSON holds of each.
HANDLE_FIELDS: dict[str, type] = {
    **{"class": str, "size": list, "stride": list, "offset": int, "storage_class": str, "dtype": str, "device": int},
    **{"handle": bytes, "storage_bytes": int, "storage_offset_bytes": int, "requires_grad": bool},
    **{"counter": bytes, "counter_offset": int, "event": bytes, "event_sync": bool},
}
# The only classes and dtypes that a handle may name.
HANDLE_NAMES: dict[str, dict[str, Any]] = {
    "class": {"Tensor": torch.Tensor},
    "storage_class": {"TypedStorage": torch.storage.TypedStorage, "UntypedStorage": torch.UntypedStorage},
    "dtype": {"uint8": torch.uint8},
}


def encode_handle(args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments of `rebuild_cuda_tensor` for a flat uint8 tensor as JSON; bytes in base64."""
    out: dict[str, Any] = {}
    for (name, kind), value in zip(HANDLE_FIELDS.items(), args, strict=True):
        if name in HANDLE_NAMES:
            out[name] = next(word for word, known in HANDLE_NAMES[name].items() if known is value)
        elif kind is bytes:
            out[name] = base64.b64encode(value).decode()
        else:
            out[name] = kind(value)
    return out


def decode_handle(handle: Any) -> tuple[Any, ...]:
    """What `encode_handle` was given. Raises ValueError for anything else than its results."""
    if not isinstance(handle, dict) or set(handle) != set(HANDLE_FIELDS):
        raise ValueError(f"IPC handle: expected the keys {', '.join(HANDLE_FIELDS)}, found {str(handle)[:80]}")
    return tuple(_decoded(name, kind, handle[name]) for name, kind in HANDLE_FIELDS.items())


def _decoded(name: str, kind: type, value: Any) -> Any:
    right = type(value) is (str if kind is bytes else kind)  # a bool is no int here
    if not right:
        raise ValueError(f"IPC handle: {name}: expected {kind.__name__}, found {str(value)[:80]!r}")
    if name in HANDLE_NAMES:
        if value not in HANDLE_NAMES[name]:
            raise ValueError(f"IPC handle: {name}: expected {' or '.join(HANDLE_NAMES[name])}, found {value[:80]!r}")
        return HANDLE_NAMES[name][value]
    if kind is bytes:
        return base64.b64decode(value, validate=True)
    if kind is list:
        if any(type(n) is not int for n in value):
            raise ValueError(f"IPC handle: {name}: expected whole numbers, found {str(value)[:80]}")
        return torch.Size(value) if name == "size" else tuple(value)
    return value


Make = Callable[[RolloutConfig], WeightTransport]
TRANSPORTS: dict[str, Make] = {"file": FileTransport, "nccl": NcclTransport, "ipc": IpcTransport}
