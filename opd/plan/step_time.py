"""A rough estimate of the seconds of a step, and of the bytes of a weight push. Imports no torch.

Arithmetic of a transformer: 2 FLOPs per parameter and token forward, 4 backward (arXiv 2001.08361, section 2.1), a
further 2 where gradient checkpointing computes forward again (arXiv 2205.05198, section 5). Decoding reads all weights
and the keys and values of all sequences for every token, so memory bandwidth bounds it. Every assumed number is in
`Speeds` and is printed with the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from opd.config.schema import Config
from opd.plan.learner_memory import SIZES, Lengths, adapted, adapters, trained
from opd.plan.server_memory import ServerMemory
from opd.plan.shapes import ModelShape


@dataclass(frozen=True)
class Speeds:
    """What is assumed of a device and its links; the defaults are of an NVIDIA H100 SXM's data sheet."""

    tflops: float = 989.0  # dense bfloat16
    hbm: float = 3350.0  # GB/s of device memory
    dense: float = 0.30  # share of tflops that a learner or a prefill reaches
    mixture: float = 0.10  # the same, of a mixture of experts
    read: float = 0.6  # share of hbm that decoding reaches
    links: dict[str, float] = field(default_factory=lambda: {"nccl": 50.0, "ipc": 500.0, "file": 2.0})  # GB/s

    def flops(self, shape: ModelShape) -> float:
        """FLOPs per second that one device reaches with this model."""
        return self.tflops * 1e12 * (self.mixture if shape.decoder.experts > 1 else self.dense)


def push_bytes(config: Config, shape: ModelShape) -> int:
    """Bytes of one weight push: every tensor with a gradient; with LoRA the whole blocks that hold adapters, merged."""
    blocks = {w.name.rpartition(".")[0].rpartition(".")[0] for w in adapted(config, shape)}
    merged = sum(w.numel for w in shape.weights if w.name.rpartition(".")[0].rpartition(".")[0] in blocks)
    return (sum(trained(config, shape)) - sum(adapters(config, shape)) + merged) * SIZES[config.student.dtype]


def push_seconds(size: int, transport: str, gbps: float) -> float:
    """Seconds of one push. nccl sends once to all servers, ipc hands over a copy on the device; a file is written
    once, and then read by all servers at the same time."""
    return size * (2 if transport == "file" else 1) / (gbps * 1e9)


def learner_flops(config: Config, shape: ModelShape, typical: Lengths) -> float:
    """FLOPs of one step over all ranks. A prompt is read once for its n responses (opd/train/batch.py).

    Per parameter and token of the LLM 2 forward, 2 backward through it, 2 for the gradients of what is trained (none of
    weights that only carry adapters), 2 again with checkpointing. The output layer, of V * h parameters, is at work at
    response tokens only (opd/models/base.py, response_logits), and lies outside of what checkpointing computes again.
    The frozen tower 2 per position, once per clip.
    """
    n = config.rollout.n if config.rollout.student_writes else 1
    responses = len(_prompts(config, typical)) * n * typical.response * config.train.prompts_per_step
    tokens = sum(_prompts(config, typical)) * config.train.prompts_per_step + responses
    per = 2 + 2 + (2 if "llm" in config.student.train and config.student.lora is None else 0)
    again = 2 if config.train.gradient_checkpointing else 0
    output = shape.decoder.vocab * shape.decoder.hidden
    tower = 0.0
    if shape.tower and config.objective.lambda_ < 1:
        positions = typical.audio * shape.tower.positions_per_second * config.train.prompts_per_step
        tower = positions * shape.count("tower") * (6 if "tower" in config.student.train else 2)
    return (per + again) * (shape.active - output) * tokens + per * output * responses + tower


def decode_seconds(
    config: Config, shape: ModelShape, server: ServerMemory, servers: int, ranks: int, typical: Lengths, speeds: Speeds
) -> tuple[float, int]:
    """(seconds of a step's rollout, sequences at a time) on student servers.

    Waves of as many sequences as the cache, max_num_seqs and rollout.concurrency (of each rank) hold; each response
    token reads the weights of a GPU (all experts: together the sequences meet nearly all) and the sequences' keys and
    values. Prefill of each prompt once, 2 FLOPs per parameter and token.
    """
    prompts = _prompts(config, typical)
    mean = sum(prompts) / len(prompts) + typical.response / 2
    each = -(-config.train.prompts_per_step * config.rollout.n * len(prompts) // servers)
    most = min(server.sequences(max(prompts) + typical.response), config.rollout.server.max_num_seqs)
    at_once = max(1, min(each, most, -(-config.rollout.concurrency * ranks // servers)))
    read = server.weights + at_once * mean * server.kv_per_token
    decode = -(-each // at_once) * typical.response * read / (speeds.hbm * 1e9 * speeds.read)
    tokens = sum(prompts) * config.train.prompts_per_step / servers
    return decode + 2 * shape.active * tokens / (server.tensor_parallel * speeds.flops(shape)), at_once


def scoring_seconds(config: Config, teacher: ModelShape, devices: int, typical: Lengths, speeds: Speeds) -> float:
    """Seconds in which the teacher reads each response behind its prompt's text: 2 FLOPs per parameter and token."""
    n = config.rollout.n if config.rollout.student_writes else 1
    tokens = (typical.text + typical.response) * n * len(_prompts(config, typical)) * config.train.prompts_per_step
    return 2 * teacher.active * tokens / (devices * speeds.flops(teacher))


def _prompts(config: Config, typical: Lengths) -> list[int]:
    lam = config.objective.lambda_
    return [p for p, share in ((typical.speech, 1 - lam), (typical.text, lam)) if share > 0]
