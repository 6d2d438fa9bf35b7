"""The commands behind a run: vLLM servers and learner ranks, with their environment. Imports nothing heavy."""

from __future__ import annotations

import base64
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from opd.config.load import resolve_model
from opd.config.needs import scored_tokens
from opd.config.placement import Placement, memory_share
from opd.config.schema import Config
from opd.inference.host import sockets
from opd.inference.plugin import BACKENDS, TRIM_AUDIO
from opd.models.registry import family_entry
from opd.processes.layout import Layout, Place, told

Resolve = Callable[[str, str], str]
PLUGIN = "opd"  # our entry point in vLLM's group of general plugins


@dataclass(frozen=True)
class Command:
    """A process to start: `env` is added to the inherited environment."""

    name: str
    argv: list[str]
    env: dict[str, str]
    url: str = ""  # of a server

    def shell(self) -> str:
        """The command as one can paste it into a shell."""
        env = [f"{k}={shlex.quote(v)}" for k, v in self.env.items()]
        return " ".join([*env, *map(shlex.quote, self.argv)])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def servers(config: Config, places: list[Place], resolve: Resolve = resolve_model) -> list[Command]:
    """The vLLM servers at some places of a machine."""
    return [(student_server if p.kind == "student" else teacher_server)(config, p, resolve) for p in places]


def student_server(config: Config, place: Place, resolve: Resolve = resolve_model) -> Command:
    """A vLLM server that samples from the student and takes new weights.

    Its development endpoints let whoever reaches the port replace the weights: never on a public address.
    """
    model = resolve(config.student.path, "student.path")
    family = family_entry(model, config.student.family)
    limits = {m: family.clips if m == "audio" else 0 for m in family.modalities}
    extra = ["--logprobs-mode", "processed_logprobs", "--limit-mm-per-prompt", json.dumps(limits)]
    backend = BACKENDS[config.rollout.transport or "file"]
    extra += ["--weight-transfer-config", json.dumps({"backend": backend}), *family.server]
    extra += ["--enable-sleep-mode"] if config.rollout.sleep else []
    command = _server(config, place, model, config.student.dtype, extra)
    command.env.update({"VLLM_SERVER_DEV_MODE": "1", TRIM_AUDIO: str(int(config.rollout.server.trim_audio))})
    if "VLLM_PLUGINS" in os.environ:  # unset loads every plugin; a choice must not leave ours out
        chosen = [name for name in os.environ["VLLM_PLUGINS"].split(",") if name]
        command.env["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*chosen, PLUGIN]))
    return command


def teacher_server(config: Config, place: Place, resolve: Resolve = resolve_model) -> Command:
    """A vLLM server that scores token ids. Prompt log-probs hold [tokens, V] in memory: the batch is capped."""
    extra = ["--max-num-batched-tokens", str(scored_tokens(config))]
    return _server(config, place, resolve(config.teacher.path, "teacher.path"), config.teacher.dtype, extra)


def _server(config: Config, place: Place, model: str, dtype: str, extra: list[str]) -> Command:
    s = config.rollout.server
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    argv += ["--served-model-name", place.kind, "--host", place.host, "--port", str(place.port)]
    argv += ["--dtype", dtype, "--seed", str(config.run.seed)]
    argv += ["--max-model-len", str(s.max_model_len), "--max-num-seqs", str(s.max_num_seqs), "--max-logprobs", "-1"]
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"} | sockets()
    if place.devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
        argv += ["--tensor-parallel-size", str(len(place.devices))]
        argv += ["--gpu-memory-utilization", str(memory_share(config, place.memory))]
    else:
        argv.append("--enforce-eager")
        # One process for engine and model: two wait for each other by spinning, for a second after every message too.
        argv += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
        if place.kind == "student":
            argv += ["--block-size", "32"]  # of prefix caching: n answers share what they can of their prompt
            # vLLM's CPU runner cannot rewind a request's own random generator after a partial prefill
            most = max(65536, s.max_model_len, s.max_num_seqs)
            argv += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(most)]
        env |= {"VLLM_CPU_KVCACHE_SPACE": str(s.kv_cache_gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # one small function of the sampler would be compiled by g++ at start: slow, and fatal where memory is short
        env["TORCHDYNAMO_DISABLE"] = "1"
        env |= _threads(s.threads or max(1, cores() // place.neighbours))
    return Command(place.name, [*argv, *extra, *s.args], env, place.url)


def learner(config: Config, recipe: str, overrides: list[str], where: Layout, node: int) -> Command | None:
    """One node's learner processes, None where it has none; overrides tell them the servers' URLs."""
    placement = where.placement
    group = next((g for g in placement.learner if g.node == node), None)
    if group is None:
        return None
    here = placement.learner_nodes.index(node)
    start = {"accelerate": _accelerate, "deepspeed": _deepspeed}[config.launch.launcher]
    argv = [sys.executable, *start(placement, where.hosts[where.head], where.rendezvous_port, here)]
    argv += ["opd.train", recipe, *overrides, f"run.dir={config.run.dir}", *told(where.servers)]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")  # ninja lives beside python
    env = {"PATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    # else the ranks listen at whatever address the host's name has
    interface = network_interface(where.hosts[node])
    if group.devices:
        if config.launch.launcher == "accelerate":  # DeepSpeed's launcher sets it by itself
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, group.devices))
        env |= {"NCCL_SOCKET_IFNAME": interface} if interface else {}
    else:
        env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        env |= _threads(config.launch.threads or max(1, cores() // group.count))
    env |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    return Command("learner" if len(placement.learner) == 1 else f"learner-{node}", argv, env)


def _accelerate(placement: Placement, host: str, port: int, here: int) -> list[str]:
    """Arguments of `accelerate launch` on the `here`-th node that has ranks."""
    nodes = len(placement.learner)
    neutral = str(Path(__file__).with_name("accelerate.yaml"))  # the user's own would move and count ranks otherwise
    argv = ["-m", "accelerate.commands.launch", "--config_file", neutral, "--use_deepspeed"]
    argv += ["--num_processes", str(placement.ranks)]
    argv += ["--num_machines", str(nodes), "--machine_rank", str(here), "--main_process_ip", host]
    if nodes > 1:  # else accelerate calls pdsh to reach the others
        argv += ["--deepspeed_multinode_launcher", "standard"]
    argv += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*argv, "--module"]


def _deepspeed(placement: Placement, host: str, port: int, here: int) -> list[str]:
    """Arguments of DeepSpeed's launcher of one node, the `here`-th of those with ranks."""
    slots = {f"node{g.node}": g.devices or list(range(g.count)) for g in placement.learner}
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    argv = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={here}"]
    return [*argv, f"--master_addr={host}", f"--master_port={port}", "--no_local_rank", "--module"]


def network_interface(host: str) -> str | None:
    """The network interface of this machine that has the address of `host`, None when it is another's."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    return next((n for n, some in psutil.net_if_addrs().items() if any(a.address == address for a in some)), None)


def _threads(n: int) -> dict[str, str]:
    """Server and learner take turns on the same cores: a thread that spins while it waits would steal them."""
    env = {"OMP_NUM_THREADS": str(n), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "1"}
    openmp = Path(sys.prefix, "lib", "libiomp5.so")  # comes with vllm-cpu, and wakes threads faster than GNU's
    if openmp.is_file():
        env["LD_PRELOAD"] = os.pathsep.join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD")]))
    return env
