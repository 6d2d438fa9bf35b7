"""The folder of the file transport: swept after a kill, chunked, gone when closed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from opd import weight_sync
from opd.weight_sync import PREFIX, FileTransport


class Recorder:
    """Stands where a server stands: keeps the requests, reads the files as they come."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.folder = ""

    def post(self, path: str, body: dict[str, Any] | None = None) -> None:
        self.calls.append((path, body))
        if path == "/init_weight_transfer_engine":
            self.folder = body["init_info"]["folder"]
        if path == "/update_weights":
            self.loaded |= load_file(os.path.join(self.folder, body["update_info"]["name"]))


def test_chunks_arrive_whole_and_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weight_sync, "CHUNK_BYTES", 100)
    dead = tmp_path / f"{PREFIX}999999999-x"
    alive = tmp_path / f"{PREFIX}{os.getpid()}-x"
    for folder in (dead, alive):
        folder.mkdir()
    servers = [Recorder(), Recorder()]
    transport = FileTransport(str(tmp_path), servers)
    assert not dead.exists() and alive.exists()
    tensors = {f"w{i}": torch.randn(4, 5) for i in range(5)}
    for name, tensor in tensors.items():
        transport.add(name, tensor)
    transport.send(servers, 3)
    for server in servers:
        paths = [p for p, _ in server.calls]
        assert paths[1] == "/start_weight_update" and paths[2:-1] == ["/update_weights"] * (len(paths) - 3)
        assert len(paths) > 4 and server.calls[-1] == ("/finish_weight_update", {"weight_version": "3"})
        assert set(server.loaded) == set(tensors)
        assert all(torch.equal(server.loaded[n], t) for n, t in tensors.items())
    assert not list(Path(transport.folder).iterdir())
    transport.close()
    assert not Path(transport.folder).exists()
