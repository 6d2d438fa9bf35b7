"""Bytes of a vLLM server's GPU, by formula. Imports no torch.

vLLM takes gpu_memory_utilization of the device, loads the weights, measures one forward pass at full load, and gives
what remains to keys and values (vllm/v1/worker/gpu_worker.py, determine_available_memory), in blocks of 16 tokens
(arXiv 2309.06180, section 4). Weights and blocks are exact; the forward pass is a rough figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opd.config.needs import scored_tokens
from opd.config.placement import Servers, memory_share
from opd.config.schema import Config
from opd.plan.learner_memory import SIZES, kv_token_bytes, tower_bytes
from opd.plan.shapes import ModelShape

GIB = 1 << 30
BLOCK = 16  # tokens, vLLM's default
Kind = Literal["student", "teacher"]
Kinds = dict[Kind, tuple[ModelShape, list[Servers]]]
CONTEXT = GIB  # CUDA's context and NCCL's buffers, of any process on a GPU: assumed
GRAPHS = GIB  # CUDA graphs: assumed
# (GiB of a GPU from which, tokens): vllm/engine/arg_utils.py, get_batch_defaults, of an API server
DEFAULT_BATCH = ((160, 16384), (70, 8192), (0, 2048))
SLEEPING = CONTEXT + GRAPHS  # what a server that sleeps keeps of its GPU


@dataclass(frozen=True)
class ServerMemory:
    """One GPU of one server."""

    kind: Kind
    tensor_parallel: int
    share: int  # bytes that vLLM may take
    weights: int
    forward_pass: int  # of one forward pass, with context and graphs
    beyond: int  # outside its share: log-probs of prompts, which vLLM does not measure
    kv_per_token: int  # bytes of keys and values of one token
    max_model_len: int

    @property
    def kv(self) -> int:
        """Bytes that remain for keys and values; below 0: weights and one pass are more than the share."""
        return self.share - self.weights - self.forward_pass

    @property
    def missing(self) -> int:
        """Bytes short of one sequence of max_model_len, without which vLLM does not start; 0 where it fits."""
        return max(0, blocks(self.max_model_len) * BLOCK * self.kv_per_token - self.kv)

    def sequences(self, length: int) -> int:
        """How many sequences of so many tokens the cache holds at a time."""
        return max(0, self.kv // (BLOCK * self.kv_per_token)) // blocks(length)


def blocks(tokens: int) -> int:
    """Blocks of a sequence."""
    return -(-tokens // BLOCK)


def weight_bytes(shape: ModelShape, d: int, tensor_parallel: int) -> int:
    """Bytes of weights on one GPU.

    Matrices of the LLM are cut, its vectors and a mixture's router are not, keys' and values' not below one head;
    tower and adapter are whole; what stays `fixed` (vision) is not loaded, for its modality is switched off.
    """
    total = 0
    for w in shape.weights:
        if w.part == "fixed":
            continue
        cut = 1
        if w.part == "llm" and len(w.shape) > 1 and not w.name.endswith(".gate.weight"):
            cut = tensor_parallel
            if ".k_proj." in w.name or ".v_proj." in w.name:
                cut = min(tensor_parallel, shape.decoder.kv_heads)
        total += -(-w.numel // cut)
    return total * d


def batched_tokens(config: Config, kind: str, memory: int) -> int:
    """Tokens of one forward pass: as the launcher or the recipe asks, else vLLM's default for a GPU of this memory."""
    s = config.rollout.server
    if (flag := "--max-num-batched-tokens") in s.args[:-1]:
        return int(s.args[s.args.index(flag) + 1])
    if kind == "teacher":
        return scored_tokens(config)
    default = next(tokens for least, tokens in DEFAULT_BATCH if memory >= least * GIB)
    return max(min(default, s.max_num_seqs * s.max_model_len), s.max_num_seqs)


def server_memory(
    config: Config, shape: ModelShape, kind: Kind, tensor_parallel: int, memory: int, share: float | None
) -> ServerMemory:
    """One GPU of a server. `memory`: bytes of the device; `share`: what the placement gives it of that.

    A forward pass of so many tokens: per token the widest of a layer, d (3h + 3i / tp), in a mixture each of its
    experts' inputs too; float32 logits three times for every sequence; the tower over as many clips as the pass has
    tokens for. A teacher's log-probs of a prompt are a row of V for every token of a pass, in d and twice in float32.
    """
    s, m = config.rollout.server, shape.decoder
    d = SIZES[config.student.dtype if kind == "student" else config.teacher.dtype]
    tokens = batched_tokens(config, kind, memory)
    per_token = d * (3 * m.hidden + 3 * m.intermediate // tensor_parallel)
    if m.experts > 1:
        per_token += 2 * d * m.hidden * m.experts_per_token
    clips = max(1, tokens // max(1, shape.audio_tokens(30.0))) if shape.tower else 0
    logits = 3 * 4 * s.max_num_seqs * m.vocab
    forward_pass = tokens * per_token + logits + tower_bytes(shape, d, 30.0, clips, kept=False) + CONTEXT + GRAPHS
    own, weights = int(memory * memory_share(config, share)), weight_bytes(shape, d, tensor_parallel)
    beyond = tokens * m.vocab * (d + 8) if kind == "teacher" else 0
    kv_per_token = kv_token_bytes(m, d, tensor_parallel)
    return ServerMemory(kind, tensor_parallel, own, weights, forward_pass, beyond, kv_per_token, s.max_model_len)
