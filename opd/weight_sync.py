"""New weights into live vLLM servers: names, versions, transport, cache resets."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from opd.config import Config, RolloutConfig
from opd.http import Server
from opd.models.base import Family
from opd.supervisor import TRANSFER_PREFIX, sweep

CHUNK_BYTES = 1 << 30


class WeightTransport(Protocol):
    """Seam: carries tensors to every server, inside vLLM's start / update / finish protocol."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor, under the name that vLLM's loader knows."""
        ...

    def send(self, servers: list[Server], version: int) -> None:
        """Load all queued tensors into every server and name the result `version`."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class FileTransport:
    """Chunks of safetensors in a folder that learner and servers share (/dev/shm on one machine)."""

    def __init__(self, config: RolloutConfig, servers: list[Server]) -> None:
        parent = config.transfer_dir
        sweep(parent)
        self.folder = tempfile.mkdtemp(prefix=f"{TRANSFER_PREFIX}{os.getpid()}-", dir=parent)
        self._buffer: dict[str, Tensor] = {}
        self._bytes = self._count = 0
        self._files: list[str] = []
        for server in servers:
            server.post("/init_weight_transfer_engine", {"init_info": {"folder": self.folder}})

    def add(self, name: str, tensor: Tensor) -> None:
        self._buffer[name] = tensor.contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= CHUNK_BYTES:
            self._write()

    def send(self, servers: list[Server], version: int) -> None:
        # every chunk is on disk before the first server starts: an update that fails half-way kills the engine
        self._write()
        for server in servers:
            server.post("/start_weight_update")
            for name in self._files:
                server.post("/update_weights", {"update_info": {"name": name}})
            server.post("/finish_weight_update", {"weight_version": str(version)})
        for name in self._files:
            os.remove(os.path.join(self.folder, name))
        self._files = []

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self) -> None:
        from safetensors.torch import save_file

        if not self._buffer:
            return
        name = f"{self._count:06d}.safetensors"  # never used twice: a server may cache by name
        save_file(self._buffer, os.path.join(self.folder, name))
        self._files.append(name)
        self._buffer, self._bytes, self._count = {}, 0, self._count + 1


TRANSPORTS: dict[str, Callable[[RolloutConfig, list[Server]], WeightTransport]] = {"file": FileTransport}


class WeightSync:
    """Pushes what was trained; all ranks call `push`, rank 0 talks."""

    def __init__(self, servers: list[Server], family: Family, config: Config, rank: int) -> None:
        self.servers, self.family, self.rank = servers, family, rank
        self.audio_trained = bool({"tower", "adapter"} & set(config.student.train))
        transport = TRANSPORTS[config.rollout.transport or "file"]
        self.transport: WeightTransport | None = transport(config.rollout, servers) if rank == 0 else None

    def push(self, learner: Any, version: int) -> None:
        """Send the learner's trainable weights to every server as `version`, then reset what they made stale.

        The prefix cache holds keys and values of the old weights: always. The encoder cache holds audio embeddings:
        when the tower or the adapter was trained. Returns on all ranks when the servers are ready.
        """
        for name, tensor in learner.gathered():
            if self.transport is not None:
                assert tensor is not None
                for published, value in self.family.published(name, tensor):
                    self.transport.add(published, value)
        if self.transport is not None:
            self.transport.send(self.servers, version)
            for server in self.servers:
                server.post("/reset_prefix_cache")
                if self.audio_trained:
                    server.post("/reset_encoder_cache")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def close(self) -> None:
        """Remove the transfer folder."""
        if self.transport is not None:
            self.transport.close()
