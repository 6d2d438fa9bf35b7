"""NCCL and CUDA IPC without a GPU: the requests of the learner's side, and vLLM's own classes reading them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_servers import FakeServer, serving
from safetensors.torch import save_file

from opd.config.schema import RolloutConfig
from opd.inference import transports
from opd.inference.client import Server, ServerError
from opd.inference.plugin import BACKENDS, ENGINES, register
from opd.inference.transports import IpcTransport, NcclTransport, chunks
from opd.settings import UserError

TENSORS = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.arange(6.0).view(2, 3).T}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)


class Group:
    """Stands where vLLM's communicator stands: a broadcast ends when every server takes part in the update."""

    def __init__(self) -> None:
        self.sent: list[dict[str, torch.Tensor]] = []
        self.left = False

    def destroy(self) -> None:
        self.left = True


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the learner's side of every rendezvous was told, each with the group that came of it."""
    made: list[Any] = []

    def join(info: dict[str, Any], device: torch.device) -> Group:
        assert device == torch.device("cuda", 0)
        made.append((info, Group()))
        return made[-1][1]

    monkeypatch.setattr(transports, "join_group", join)
    monkeypatch.setattr(transports, "broadcast", lambda group, chunk, device, size: group.sent.append(dict(chunk)))
    yield made


def servers_at(urls: list[str]) -> list[Server]:
    return [Server(url, 5) for url in urls]


def test_chunks_end_where_they_are_full() -> None:
    sizes = [(f"w{i}", torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate([40, 60, 250, 10, 10])]
    assert [[name for name, _ in chunk] for chunk in chunks(sizes, 100)] == [["w0", "w1"], ["w2"], ["w3", "w4"]]
    assert list(chunks([], 100)) == []
    (chunk,) = chunks(TENSORS.items(), 1 << 20)
    assert all(tensor.is_contiguous() and torch.equal(tensor, TENSORS[name]) for name, tensor in chunk)


def test_all_workers_of_all_servers_join_one_group(groups: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from opd.inference.engines import NcclEngine

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(NcclTransport, "limit", 32)
    fakes = [FakeServer(2), FakeServer(1), FakeServer(4)]
    transport = NcclTransport(RolloutConfig(transport="nccl"))
    with serving(*fakes) as urls:
        servers = servers_at(urls)
        transport.connect(servers)
        transport.send(iter(TENSORS.items()), servers, 9)
        transport.connect(servers)  # as after a server's restart
    (info, group), (_, second) = groups
    assert info["world_size"] == 1 + 2 + 1 + 4 and info["master_address"] == "127.0.0.1" and info["packed"]
    names = [["a", "b"], ["c"]]
    assert [list(sent) for sent in group.sent] == names
    engine = NcclEngine(None, SimpleNamespace(parallel_config=None, model_config=None), None, None)
    for fake, offset in zip(fakes, (1, 3, 4), strict=True):
        paths = ["/get_world_size", "/init_weight_transfer_engine"]
        update = ["/start_weight_update", "/update_weights", "/update_weights", "/finish_weight_update"]
        assert fake.paths == [*paths, *update, "/shutdown_weight_transfer_engine", *paths]
        told = engine.parse_init_info(fake.calls[1][1]["init_info"])
        assert (told.rank_offset, told.world_size, told.packed) == (offset, 8, True)
        assert (told.master_address, told.master_port) == (info["master_address"], info["master_port"])
        assert told.packed_buffer_size_bytes == 32 and told.nccl_unique_id_bytes is None
        found = [engine.parse_update_info(fake.calls[i][1]["update_info"]) for i in (3, 4)]
        assert [f.names for f in found] == names
        for f, sent in zip(found, group.sent, strict=True):
            for name, dtype, shape in zip(f.names, f.dtype_names, f.shapes, strict=True):
                assert getattr(torch, dtype) == sent[name].dtype and shape == list(sent[name].shape)
                assert torch.equal(sent[name], TENSORS[name])
        assert fake.version == "9"
    assert group.left and not second.left


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_failing_server_is_named_though_the_others_wait_for_it(
    path: str, groups: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, other, ours = FakeServer(), FakeServer(), threading.Event()
    bad.failing, other.hanging = {path}, {path: threading.Event()}
    seam = {"/init_weight_transfer_engine": "join_group", "/update_weights": "broadcast"}[path]
    monkeypatch.setattr(transports, seam, lambda *_: ours.wait())  # NCCL waits for the lost rank for ever
    transport = NcclTransport(RolloutConfig(transport="nccl"))
    with serving(other, bad) as urls:
        servers = servers_at(urls)
        with pytest.raises(ServerError, match=f"^{bad.url}{path}: HTTP 500"):
            transport.connect(servers)
            transport.send(iter(TENSORS.items()), servers, 1)
    ours.set()


def test_a_server_that_stops_answering_is_named_in_time(groups: list[Any]) -> None:
    silent = FakeServer()
    silent.hanging = {"/update_weights": threading.Event()}
    transport = NcclTransport(RolloutConfig(transport="nccl"))
    with serving(silent, FakeServer()) as urls:
        servers = [Server(url, 0.5) for url in urls]
        transport.connect(servers)
        with pytest.raises(ServerError, match=f"^{urls[0]}/update_weights: ReadTimeout after up to 0.5 s"):
            transport.send(iter(TENSORS.items()), servers, 1)


def test_a_learner_at_loopback_cannot_meet_servers_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    away = servers_at(["http://127.0.0.1:1", "http://10.0.0.2:8100"])
    with pytest.raises(UserError, match=r"http://10.0.0.2:8100 cannot reach the learner at MASTER_ADDR=127.0.0.1"):
        transports._check_reachable(os.environ["MASTER_ADDR"], away)
    transports._check_reachable("10.0.0.1", away)


# ---- CUDA IPC -------------------------------------------------------------------------------------------------------

# As torch's reduce_tensor gives them for a flat uint8 tensor of 34 bytes on device 1.
ARGS = (torch.Tensor, torch.Size([34]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 1, b"\x00\xff" * 32, 512)
ARGS += (1024, False, b"/torch_1_2", 7, b"\x01" * 64, True)


def test_handles_travel_as_json() -> None:
    there = json.loads(json.dumps(transports.encode_handle(ARGS)))
    back = transports.decode_handle(there)
    assert back == ARGS and [type(x) for x in back] == [type(x) for x in ARGS]
    hash(back[0:5] + back[6:])  # vLLM keeps a mapping by its arguments


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("class", "os.system", "class: expected Tensor, found 'os.system'"),
        ("storage_class", "Popen", "storage_class: expected TypedStorage or UntypedStorage"),
        ("dtype", "float32", "dtype: expected uint8"),
        ("handle", 5, "handle: expected bytes, found '5'"),
        ("handle", "*", "base64"),
        ("device", True, "device: expected int, found 'True'"),
        ("size", ["34"], "size: expected whole numbers"),
        ("more", 1, "expected the keys class, size"),
    ],
)
def test_anything_else_than_a_handle_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transports.decode_handle(transports.encode_handle(ARGS) | {key: value})


def test_torchs_own_arguments_have_these_fields() -> None:
    import inspect

    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    theirs = "tensor_cls tensor_size tensor_stride tensor_offset storage_cls dtype storage_device storage_handle "
    theirs += "storage_size_bytes storage_offset_bytes requires_grad ref_counter_handle ref_counter_offset "
    theirs += "event_handle event_sync_required"
    assert list(inspect.signature(rebuild_cuda_tensor).parameters) == theirs.split()
    assert len(transports.HANDLE_FIELDS) == len(theirs.split())


def test_ipc_sends_handles_that_vllm_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd.inference.engines import IpcEngine

    flats: list[torch.Tensor] = []

    def export(flat: torch.Tensor) -> dict[str, Any]:
        flats.append(flat)
        return {"GPU-1": transports.encode_handle(ARGS)}

    monkeypatch.setattr(transports, "export", export)
    fake = FakeServer()
    transport = IpcTransport(RolloutConfig(transport="ipc"))
    with serving(fake) as urls:
        servers = servers_at(urls)
        transport.connect(servers)
        transport.send(iter(TENSORS.items()), servers, 4)
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert fake.paths == ["/get_world_size", "/init_weight_transfer_engine", *update] and fake.version == "4"
    engine = IpcEngine(None, SimpleNamespace(parallel_config=None, model_config=None), None, None)
    engine.init_transfer_engine(engine.parse_init_info(fake.calls[1][1]["init_info"]))
    assert engine.packed
    told = engine.parse_update_info(fake.calls[3][1]["update_info"])
    assert told.ipc_handles == {"GPU-1": ARGS} and told.names == list(TENSORS)
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    dtypes = [getattr(torch, name) for name in told.dtype_names]
    for name, tensor in unpack_tensor(flats[0], told.names, told.shapes, dtypes, told.tensor_sizes):
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
    with pytest.raises(ValueError, match="it takes no pickles"):
        pickled = {"ipc_handles": None, "ipc_handles_pickled": "gASVAAAA"}
        engine.parse_update_info(fake.calls[3][1]["update_info"] | pickled)


def test_ipc_is_for_one_server_on_one_gpu() -> None:
    for fakes in ([FakeServer(2)], [FakeServer(), FakeServer()]):
        with serving(*fakes) as urls, pytest.raises(UserError, match="expected one server on the learner's GPU"):
            IpcTransport(RolloutConfig(transport="ipc")).connect(servers_at(urls))


# ---- inside vLLM ----------------------------------------------------------------------------------------------------


def test_every_backend_has_an_engine_that_mends_what_a_reload_leaves_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from opd.inference import engines as vllm_engines

    done: list[str] = []
    monkeypatch.setattr(vllm_engines, "tied_heads", lambda model: [(head, SimpleNamespace(weight="shared"))])
    monkeypatch.setattr(vllm_engines, "repack_experts", lambda model: done.append("repack") or [])
    monkeypatch.setattr(vllm_engines, "load_through_wrappers", lambda: done.append("wrappers"))
    reload = "vllm.model_executor.model_loader.reload"
    for module in (reload, "opd.inference.engines"):  # vLLM's engines import them when they need them
        monkeypatch.setattr(f"{module}.initialize_layerwise_reload", lambda model: done.append("start"))
        monkeypatch.setattr(f"{module}.finalize_layerwise_reload", lambda model, config: done.append("finish"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    register()
    register()  # in every process, and twice in some
    model = type("VoxtralForConditionalGeneration", (), {})()
    about = SimpleNamespace(parallel_config=None, model_config=None)
    assert set(ENGINES) == set(BACKENDS.values())
    for backend in ENGINES:
        head = SimpleNamespace(weight="own copy")
        head.quant_method = SimpleNamespace(process_weights_after_loading=lambda h: done.append(f"head {h.weight}"))
        config: Any = SimpleNamespace(backend=backend)
        engine = WeightTransferEngineFactory.create_engine(config, about, torch.device("cpu"), model)
        assert type(engine).__name__ == ENGINES[backend]
        engine.start_weight_update()
        engine.finish_weight_update()
        engine.shutdown()
        assert done == ["repack", "wrappers", "start", "finish", "head shared"], backend
        done.clear()


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/etc/x.safetensors", "link/x.safetensors"])
def test_a_server_reads_new_weights_from_the_transfer_folder_alone(tmp_path: Path, name: str) -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from opd.inference.engines import FileInitInfo

    loaded: list[str] = []
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        save_file({folder: torch.zeros(1)}, tmp_path / folder / "x.safetensors")
    (tmp_path / "mine/link").symlink_to(tmp_path / "other")
    register()
    model = SimpleNamespace(load_weights=lambda weights: loaded.extend(name for name, _ in weights))
    config, about = SimpleNamespace(backend="opd_file"), SimpleNamespace(parallel_config=None, model_config=None)
    engine: Any = WeightTransferEngineFactory.create_engine(config, about, torch.device("cpu"), model)  # type: ignore
    engine.init_transfer_engine(FileInitInfo(str(tmp_path / "mine")))
    engine.update_weights({"name": "x.safetensors"})
    assert loaded == ["mine"]
    with pytest.raises(ValueError, match="outside the transfer folder"):
        engine.update_weights({"name": name})
    assert loaded == ["mine"]
