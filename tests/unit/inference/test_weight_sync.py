"""Pushes to one and several servers: files, the order of requests, failures, restarts, sleep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_servers import FakeServer, serving
from safetensors import SafetensorError
from safetensors.torch import load_file

from opd.config.load import load_config
from opd.config.schema import Config, RolloutConfig
from opd.inference import transports
from opd.inference.client import Server, ServerError
from opd.inference.host import TRANSFER_PREFIX
from opd.inference.transports import FileTransport
from opd.inference.weight_sync import WeightSync
from opd.models.base import family_of
from opd.settings import UserError


class Receiver(FakeServer):
    """Reads the files as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}
        self.folder = ""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/init_weight_transfer_engine":
            self.folder = body["init_info"]["folder"]
        if path == "/update_weights":
            self.loaded |= load_file(os.path.join(self.folder, body["update_info"]["name"]))
        return super().answer(method, path, body)


class Learner:
    """Stands where the learner stands: two trained parameters."""

    def gathered(self, device: Any = "cpu") -> Any:
        yield from {"model.language_model.a": torch.ones(2), "model.multi_modal_projector.b": torch.zeros(2)}.items()


def config_of(tmp_path: Path, *more: str) -> Config:
    return load_config("recipes/tiny/2_xopd.yaml", [f"rollout.transfer_dir={tmp_path}", *more])


def sync_of(config: Config, urls: list[str]) -> WeightSync:
    servers = [Server(url, 5) for url in urls]
    return WeightSync(servers, family_of("recipes/tiny/student"), config, 0)


UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
INIT = "/init_weight_transfer_engine"


def test_chunks_arrive_whole_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "FILE_BYTES", 100)
    dead = tmp_path / f"{TRANSFER_PREFIX}999999999-x"
    alive = tmp_path / f"{TRANSFER_PREFIX}{os.getpid()}-x"
    for folder in (dead, alive):
        folder.mkdir()
    fakes = [Receiver(), Receiver()]
    transport = FileTransport(RolloutConfig(transfer_dir=str(tmp_path)))
    assert not dead.exists() and alive.exists()
    tensors = {f"w{i}": torch.randn(4, 5) for i in range(5)}
    with serving(*fakes) as urls:
        servers = [Server(url, 5) for url in urls]
        transport.connect(servers)
        transport.send(iter(tensors.items()), servers, 3)
    for fake in fakes:
        assert fake.paths[0] == INIT and fake.paths[1] == UPDATE[0] and len(fake.paths) > 5
        assert fake.paths[2:-1] == ["/update_weights"] * (len(fake.paths) - 3)
        assert fake.calls[-1] == ("/finish_weight_update", {"weight_version": "3"})
        assert set(fake.loaded) == set(tensors)
        assert all(torch.equal(fake.loaded[n], t) for n, t in tensors.items())
    assert not list(Path(transport.folder).iterdir())
    transport.close()
    assert not Path(transport.folder).exists()


@pytest.mark.parametrize(("train", "encoder"), [(["llm"], False), (["llm", "adapter"], True), (["tower"], True)])
def test_a_push_resets_every_cache_that_it_made_stale(tmp_path: Path, train: list[str], encoder: bool) -> None:
    fake = Receiver()
    with serving(fake) as urls:
        sync = sync_of(config_of(tmp_path, f"student.train={train}"), urls)
        sync.push(Learner(), version=7)
    assert fake.paths == [INIT, *UPDATE, "/reset_prefix_cache"] + ["/reset_encoder_cache"] * encoder
    assert set(fake.loaded) == {"language_model.model.a", "multi_modal_projector.b"}
    sync.close()


def test_a_restarted_server_gets_back_what_receives_weights(tmp_path: Path) -> None:
    fakes = [Receiver(), Receiver()]
    with serving(*fakes) as urls:
        sync = sync_of(config_of(tmp_path), urls)
        sync.push(Learner(), version=1)
        sync.push(Learner(), version=2)
        assert [fake.paths.count(INIT) for fake in fakes] == [1, 1]
        fakes[1].version = "default"
        sync.push(Learner(), version=3)
    assert fakes[1].paths.count(INIT) == 2 and [fake.version for fake in fakes] == ["3", "3"]


@pytest.mark.parametrize("path", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_one_servers_failure_is_named_while_another_still_works(tmp_path: Path, path: str) -> None:
    import threading

    good, bad = Receiver(), Receiver()
    bad.failing, good.hanging = {path}, {"/finish_weight_update": threading.Event()}
    with serving(good, bad) as urls:
        sync = sync_of(config_of(tmp_path), urls)
        with pytest.raises(ServerError, match=f"^{bad.url}{path}: HTTP 500"):
            sync.push(Learner(), version=1)


def test_a_server_that_is_gone_ends_the_push(tmp_path: Path) -> None:
    fakes = [Receiver(), Receiver()]
    with serving(*fakes) as urls:
        sync = sync_of(config_of(tmp_path), [urls[0], "http://127.0.0.1:9"])
        with pytest.raises(ServerError, match=r"http://127.0.0.1:9/.*: the server is gone"):
            sync.push(Learner(), version=1)


# ---- sleep ----------------------------------------------------------------------------------------------------------

SLEEP, WEIGHTS, CACHE = "/sleep?level=1", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"


def test_servers_sleep_until_the_push_and_get_weights_before_their_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [Receiver(), Receiver()]
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(fakes[0].calls)))
    with serving(*fakes) as urls:
        config = config_of(tmp_path, f"rollout.urls={urls}", "rollout.sleep=true")
        sync = sync_of(config, urls)
        sync.sleep()
        sync.sleep()  # is asleep
        sync.push(Learner(), version=0)
        sync.push(Learner(), version=0)  # is awake
        sync.sleep()
        sync.push(Learner(), version=1)
    awake = ["/weight_info", *UPDATE, "/reset_prefix_cache"]
    first = [SLEEP, WEIGHTS, INIT, *UPDATE, CACHE, "/reset_prefix_cache"]
    last = [SLEEP, WEIGHTS, "/weight_info", *UPDATE, CACHE, "/reset_prefix_cache"]
    for fake in fakes:
        assert fake.paths == [*first, *awake, *last]
    assert emptied[0] == 1 and emptied[2] == len(first) + len(awake) + 1  # before the server takes memory back


def test_without_the_setting_nobody_sleeps(tmp_path: Path) -> None:
    fake = Receiver()
    with serving(fake) as urls:
        sync = sync_of(config_of(tmp_path), urls)
        sync.sleep()
        sync.push(Learner(), version=0)
    assert not [path for path in fake.paths if "sleep" in path or "wake" in path]


def test_a_cpu_has_no_sleep_mode(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout.sleep true: .* no sleep mode on a CPU; set rollout.sleep=false"):
        config_of(tmp_path, "rollout.sleep=true")


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_cpu_takes_weights_from_files_only(tmp_path: Path, transport: str) -> None:
    with pytest.raises(UserError, match=rf"rollout.transport {transport}: .*(nccl|ipc): .* take"):
        config_of(tmp_path, f"rollout.transport={transport}")
    if not torch.cuda.is_available():
        config = config_of(tmp_path, f"rollout.transport={transport}", "rollout.urls=[http://127.0.0.1:9]")
        with pytest.raises(UserError, match=f"rollout.transport {transport}: the learner has no GPU; take file"):
            sync_of(config, ["http://127.0.0.1:9"])


def test_a_full_transfer_folder_is_named_with_what_it_was_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transports, "save_file", full)
    transport = FileTransport(RolloutConfig(transfer_dir=str(tmp_path / "new")))
    told = rf"^rollout.transfer_dir: 2.0 MiB of new weights do not fit: the disk of {tmp_path}/new/.* is full.* free"
    with pytest.raises(UserError, match=told):
        transport.send([("a", torch.zeros(1 << 19))], [], 1)
    transport.close()
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(UserError, match="^rollout.transfer_dir /proc/1/none: expected a folder that can be written"):
        FileTransport(RolloutConfig(transfer_dir="/proc/1/none"))
