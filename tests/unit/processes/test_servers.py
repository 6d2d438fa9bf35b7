"""The commands of servers and learner ranks, on the CPU and on GPUs."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from opd.config.load import load_config
from opd.config.placement import Placement
from opd.config.schema import Config
from opd.inference import host
from opd.processes import commands as servers
from opd.processes import layout
from opd.processes.layout import Layout, Place
from opd.settings import UserError

RECIPE = """
run: {{dir: {dir}/run, seed: 5}}
student: {{path: {dir}/student, dtype: float32}}
teacher: {{path: {dir}/teacher}}
data: {{train: {dir}/train.jsonl}}
rollout: {{max_tokens: 32, server: {{max_model_len: 64, max_num_seqs: 8, kv_cache_gib: 2, threads: 3,
  args: [--swap-space, "0"]}}}}
train: {{steps: 30, prompts_per_step: 4}}
"""
HERE = "127.0.0.1"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2_audio"}')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(dir=tmp_path))
    return load_config(path)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "cores", lambda: 8)
    monkeypatch.setattr(layout, "free_port", lambda: 4321)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def quiet(threads: int) -> dict[str, str]:
    env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "1"}
    return env | {"LD_PRELOAD": f"{sys.prefix}/lib/libiomp5.so"}


def test_sockets_have_short_paths(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    for make in (servers.student_server, servers.teacher_server):
        assert make(config, Place("s", "student", 0, HERE, 1234)).env["VLLM_RPC_BASE_PATH"] == "/tmp"
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/run/short")
    assert host.sockets() == {}  # a short one that somebody chose stays
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(long))
    assert host.sockets() == {"VLLM_RPC_BASE_PATH": "/tmp"}
    monkeypatch.setattr(host, "SHORT", "/proc/1/none")
    told = (
        rf"^TMPDIR {long} is too long for sockets, of 70 bytes at most; set VLLM_RPC_BASE_PATH, for /proc/1/none: exp"
    )
    with pytest.raises(UserError, match=told):
        host.sockets()


@pytest.mark.parametrize("devices", [(), (2, 3)])
def test_student_server(config: Config, tmp_path: Path, devices: tuple[int, ...]) -> None:
    command = servers.student_server(config, Place("student-1", "student", 0, HERE, 1234, devices, 0.4))
    expected = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", f"{tmp_path}/student"]
    expected += shlex.split("--served-model-name student --host 127.0.0.1 --port 1234 --dtype float32 --seed 5")
    expected += shlex.split("--max-model-len 64 --max-num-seqs 8 --max-logprobs -1")
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1", "OPD_TRIM_AUDIO": "1"}
    if devices:
        expected += shlex.split("--tensor-parallel-size 2 --gpu-memory-utilization 0.4")
        env["CUDA_VISIBLE_DEVICES"] = "2,3"
    else:
        expected += shlex.split("--enforce-eager --distributed-executor-backend")
        expected += shlex.split("vllm.v1.executor.uniproc_executor.UniProcExecutor --block-size 32")
        expected += ["--no-enable-chunked-prefill"]
        expected += shlex.split("--max-num-batched-tokens 65536")
        env |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env |= {"TORCHDYNAMO_DISABLE": "1"} | quiet(3)
    expected += ["--logprobs-mode", "processed_logprobs", "--limit-mm-per-prompt", '{"audio": 8}']
    expected += ["--weight-transfer-config", '{"backend": "opd_file"}', "--swap-space", "0"]
    assert (command.name, command.argv, command.env) == ("student-1", expected, env)
    assert command.url == "http://127.0.0.1:1234"


def test_teacher_server_takes_no_weights(config: Config) -> None:
    command = servers.teacher_server(config, Place.here("teacher", 1234))
    assert "--weight-transfer-config" not in command.argv and "VLLM_SERVER_DEV_MODE" not in command.env
    assert command.argv[command.argv.index("--max-num-batched-tokens") + 1] == "2048"
    assert command.argv[command.argv.index("--dtype") + 1] == "bfloat16"
    many = config.changed({"rollout.server.max_num_seqs": 4000})  # vLLM refuses a batch of fewer tokens than sequences
    assert servers.teacher_server(many, Place.here("teacher")).argv.count("4000") == 2


def test_a_server_that_shares_its_device_can_sleep(config: Config) -> None:
    place = Place("student", "student", 0, HERE, 1, (0,))
    assert "--enable-sleep-mode" not in servers.student_server(config, place).argv
    config = config.changed({"rollout.sleep": True, "rollout.transport": "ipc"})
    argv = servers.student_server(config, place).argv
    assert "--enable-sleep-mode" in argv and '{"backend": "opd_ipc"}' in argv


def test_servers_of_one_machine_share_its_cores(config: Config) -> None:
    config = config.changed({"rollout.server.threads": 0})
    place = Place("student-0", "student", 0, HERE, 1, neighbours=2)
    assert servers.student_server(config, place).env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(("chosen", "expected"), [("", "opd"), ("a,b", "a,b,opd"), ("opd,a", "opd,a")])
def test_our_plugin_is_always_loaded(
    config: Config, monkeypatch: pytest.MonkeyPatch, chosen: str, expected: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", chosen)
    assert servers.student_server(config, Place.here("student")).env["VLLM_PLUGINS"] == expected


def test_learner_on_the_cpu(config: Config) -> None:
    config = config.changed({"teacher.kind": "server"})
    command = servers.learner(config, "r.yaml", ["optim.lr=1e-4"], layout.layout(config), 0)
    assert command is not None
    neutral = str(Path(servers.__file__).with_name("accelerate.yaml"))
    expected = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", neutral]
    expected += ["--use_deepspeed", "--num_processes", "2"]
    expected += shlex.split("--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1 --main_process_port 4321")
    expected += shlex.split("--mixed_precision no --dynamo_backend no --module opd.train r.yaml optim.lr=1e-4")
    expected += [f"run.dir={config.run.dir}"]
    expected += ['rollout.urls=["http://127.0.0.1:4321"]', 'teacher.urls=["http://127.0.0.1:4321"]']
    env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    env |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"} | quiet(4)
    env["PATH"] = os.path.dirname(sys.executable) + ":/usr/bin"
    assert (command.name, command.argv, command.env) == ("learner", expected, env)


TWO_NODES = {
    "nodes": 3,
    "devices_per_node": 4,
    "rollout": [{"node": 0, "devices": [0, 1, 2, 3]}],
    "learner": [{"node": 1, "devices": [2, 3]}, {"node": 2, "devices": [0, 1]}],
}


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_learner_on_two_nodes_of_three(config: Config, launcher: str) -> None:
    config = config.changed({"launch.launcher": launcher})
    where = Layout(Placement.model_validate(TWO_NODES), ["10.9.9.1", "10.9.9.2", "127.0.0.1"], [], 1, 2)
    assert servers.learner(config, "r.yaml", [], where, 0) is None
    first, second = (servers.learner(config, "r.yaml", [], where, node) for node in (1, 2))
    assert first is not None and second is not None
    assert "NCCL_SOCKET_IFNAME" not in first.env and second.env["NCCL_SOCKET_IFNAME"] == "lo"
    if launcher == "accelerate":
        assert first.env["CUDA_VISIBLE_DEVICES"] == "2,3" and second.env["CUDA_VISIBLE_DEVICES"] == "0,1"
        rest = "--num_machines 2 --machine_rank {} --main_process_ip 10.9.9.2 --deepspeed_multinode_launcher standard"
        for rank, command in enumerate((first, second)):
            assert "--num_processes 4 " + rest.format(rank) in command.shell()
    else:
        assert "CUDA_VISIBLE_DEVICES" not in first.env
        (world,) = [a.partition("=")[2] for a in first.argv if a.startswith("--world_info=")]
        assert json.loads(base64.urlsafe_b64decode(world)) == {"node1": [2, 3], "node2": [0, 1]}
        assert "--node_rank=1 --master_addr=10.9.9.2 --master_port=2" in second.shell()


FREE_PORT = host.free_port


def test_no_two_launchers_are_given_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server((HERE, 0))) for _ in range(3)]
        busy, *free = (s.getsockname()[1] for s in found)
        for s in found[1:]:
            s.close()
        monkeypatch.setattr(host, "PORTS", [busy, *free])
        ask = f"from opd.inference import host as p; p.PORTS = {[busy, *free]}; "
        ask += "print(p.free_port(), flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", ask], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdin is not None and other.stdout is not None
            theirs = int(other.stdout.readline())
            ours = FREE_PORT()
            assert {ours, theirs} == set(free)
            with pytest.raises(UserError, match=f"no free port on 127.0.0.1 from {min(busy, *free)} to"):
                FREE_PORT()
            other.stdin.write("\n")
        assert FREE_PORT() == theirs  # it is let go of with its process
