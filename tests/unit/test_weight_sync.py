"""The folder of the file transport: swept after a kill, chunked, gone when closed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd import weight_sync
from opd.config import RolloutConfig, load_config
from opd.models import family_of
from opd.supervisor import TRANSFER_PREFIX
from opd.weight_sync import FileTransport, WeightSync


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
    dead = tmp_path / f"{TRANSFER_PREFIX}999999999-x"
    alive = tmp_path / f"{TRANSFER_PREFIX}{os.getpid()}-x"
    for folder in (dead, alive):
        folder.mkdir()
    servers = [Recorder(), Recorder()]
    transport = FileTransport(RolloutConfig(transfer_dir=str(tmp_path)), servers)
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


class Learner:
    """Stands where the learner stands: two trained parameters."""

    def gathered(self) -> Any:
        yield from {"model.language_model.a": torch.ones(2), "model.multi_modal_projector.b": torch.zeros(2)}.items()


@pytest.mark.parametrize(("train", "encoder"), [(["llm"], False), (["llm", "adapter"], True), (["tower"], True)])
def test_a_push_resets_every_cache_that_it_made_stale(tmp_path: Path, train: list[str], encoder: bool) -> None:
    overrides = [f"rollout.transfer_dir={tmp_path}", f"student.train={train}"]
    config = load_config("recipes/tiny/2_xopd.yaml", overrides)
    server: Any = Recorder()
    sync = WeightSync([server], family_of("recipes/tiny/student"), config, 0)
    sync.push(Learner(), version=7)
    paths = [path for path, _ in server.calls]
    update = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert paths == [*update, "/reset_prefix_cache"] + ["/reset_encoder_cache"] * encoder
    assert set(server.loaded) == {"language_model.model.a", "multi_modal_projector.b"}
    sync.close()
