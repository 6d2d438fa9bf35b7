"""The formulas of memory against what they claim to say: DeepSpeed, vLLM, real tensors, published sizes."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from live_memory import LiveMemory

from opd.config.load import load_config
from opd.config.objective import OBJECTIVES
from opd.config.schema import Config
from opd.models import sharding
from opd.models.registry import FAMILIES
from opd.objectives import token_loss
from opd.objectives.token_loss import MicroBatch, TokenLoss
from opd.plan import learner_memory as memory
from opd.plan import server_memory, shapes, step_time
from opd.plan.learner_memory import Zero
from opd.settings import UserError
from opd.train.batch import collate, split
from opd.types import Prompt, Rollout, Sample, ScoredRollout

RECIPE, STUDENT, TEACHER = "recipes/tiny/2_xopd.yaml", "recipes/tiny/student", "recipes/tiny/teacher"
AUDIO7B = ["student.path=Qwen/Qwen2-Audio-7B-Instruct", "teacher.path=Qwen/Qwen2-7B-Instruct"]
OMNI = [
    "student.path=Qwen/Qwen3-Omni-30B-A3B-Instruct",
    "student.family=qwen3_omni_moe",
    "teacher.path=Qwen/Qwen3-30B-A3B-Instruct-2507",
]


def config(*overrides: str) -> Config:
    return load_config(RECIPE, [f"student.path={STUDENT}", *overrides])


def in_file(folder: str) -> dict[str, int]:
    """Elements of every tensor of a checkpoint, from its header."""
    with open(Path(folder, "model.safetensors"), "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    return {n: int(np.prod(t["shape"])) for n, t in header.items() if n != "__metadata__"}


# Shapes


def test_the_tiny_pair_is_counted_exactly() -> None:
    assert shapes.student_shape(config()).count() == sum(in_file(STUDENT).values())
    teacher = shapes.teacher_shape(config())
    assert {w.name: w.numel for w in teacher.weights} == in_file(TEACHER)
    assert (teacher.tower, teacher.audio_tokens(10)) == (None, 0)


@pytest.mark.parametrize("name", list(shapes.shipped()))
def test_shipped_shapes_have_the_published_size(name: str) -> None:
    known = shapes.shipped()[name]
    hears = "thinker_config" in known["config"] or "audio_config" in known["config"]
    shape = shapes._student(name, None) if hears else shapes._teacher(name)
    assert shape.count() == pytest.approx(known["parameters"], rel=0.01)
    assert "shipped" in shape.source and known["source"]


def test_parts_and_active_parameters_of_a_mixture() -> None:
    shape = shapes.student_shape(config(*OMNI))
    assert shape.count("llm") == pytest.approx(30.5e9, rel=0.01)
    assert shape.count("tower") == pytest.approx(0.65e9, rel=0.02)
    assert shape.count("fixed") == pytest.approx(0.54e9, rel=0.01)  # vision, never trained
    assert shape.active == pytest.approx(3.3e9 - 152064 * 2048, rel=0.02)  # "A3B" counts the embedding too
    assert (shape.decoder.intermediate, shape.decoder.experts) == (8 * 768, 128)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_has_a_shape(name: str, tmp_path: Path) -> None:
    from opd.models.tiny import build

    build(name, tmp_path)
    shape = shapes._student(str(tmp_path / "student"), name)
    family = __import__("opd.models.base", fromlist=["family_of"]).family_of(str(tmp_path / "student"))
    hf = family.load(torch.float32, "sdpa")
    named = dict(hf.named_parameters())
    assert {w.name: w.shape for w in shape.weights} == {n: tuple(p.shape) for n, p in named.items()}
    assert all(w.part == family.part_of(w.name) for w in shape.weights)
    for seconds in (2.0, 7.5, 29.0):
        assert shape.audio_tokens(seconds) == family.audio_tokens(round(16000 * seconds))


# Model states


def test_zero_3_against_deepspeeds_estimator() -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    n, largest, ranks = 8 * 10**8, 10**8, 8
    weights = [largest] * 8
    zero = Zero.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}})
    ours = memory.states(zero, weights, weights, 2, ranks)
    _, theirs, layer = estimate(n, largest, ranks, 1, cpu_offload=False, cpu_offload_params=False)
    gradients = ours.phases["optimizer step"]["float32 gradients"]
    # theirs leaves the sharded 16-bit gradients out, which the engine holds; layer: weight and gradient of one, whole
    assert ours.resident - ours.device["gradients"] + gradients == theirs - layer
    zero = Zero.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0, **offloaded("optimizer", "param")}})
    ours = memory.states(zero, weights, weights, 2, ranks)
    host, device, _ = estimate(n, largest, ranks, 1, additional_buffer_factor=1)
    assert ours.resident == device - layer == 0
    assert (sum(ours.host.values()) - ours.host["gradients"]) * ranks == host
    zero = Zero.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0, **offloaded("optimizer")}})
    _, device, _ = estimate(n, largest, ranks, 1, cpu_offload_params=False)
    assert memory.states(zero, weights, weights, 2, ranks).resident == device - layer


def test_zero_2_against_deepspeeds_estimator() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

    weights = [10**8] * 8
    ours = memory.states(Zero.of({"zero_optimization": {"stage": 2}}), weights, weights, 2, 4)
    _, theirs = estimate(sum(weights), 4, 1, cpu_offload=False)
    assert ours.resident + ours.phases["optimizer step"]["float32 gradients"] == theirs
    zero = Zero.of({"zero_optimization": {"stage": 2, **offloaded("optimizer")}})
    _, theirs = estimate(sum(weights), 4, 1, cpu_offload=True)
    assert memory.states(zero, weights, weights, 2, 4).resident == theirs


def offloaded(*what: str) -> dict[str, Any]:
    return {f"offload_{w}": {"device": "cpu"} for w in what}


def test_stages_0_and_1_keep_gradients_whole() -> None:
    weights = [1000, 500]
    one = memory.states(Zero.of({"zero_optimization": {"stage": 1}}), weights, weights, 2, 2).device
    assert one == {"parameters": 3000, "gradients": 3000, "float32 copy": 3000, "AdamW's moments": 6000}
    none = memory.states(Zero.of({}), weights, [1000], 4, 2).device
    assert none == {"parameters": 6000, "gradients": 4000, "AdamW's moments": 8000}


def test_defaults_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), Zero.of({"zero_optimization": {"stage": 3}})
    assert ours.persistence == theirs.param_persistence_threshold and ours.bucket == theirs.reduce_bucket_size
    assert (ours.prefetch, ours.reuse) == (theirs.prefetch_bucket_size, theirs.max_reuse_distance)
    assert ours.sub_group == theirs.sub_group_size and theirs.contiguous_gradients
    with pytest.raises(UserError, match="offload to cpu or none, found nvme"):
        Zero.of({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})


def test_lora_trains_adapters_and_pushes_merged_blocks() -> None:
    c = config(*AUDIO7B, "student.lora={r: 8, targets: [q_proj, v_proj]}", "student.dtype=bfloat16")
    shape = shapes.student_shape(c)
    assert sum(memory.trained(c, shape)) == 32 * 2 * 8 * (4096 + 4096)
    block = 4 * 4096 * 4096 + 3 * 4096  # q, k, v, o and the biases of the first three: a block goes whole
    assert step_time.push_bytes(c, shape) == 32 * block * 2
    whole = config(*AUDIO7B, "student.dtype=bfloat16")
    assert step_time.push_bytes(whole, shape) == shape.count("llm") * 2
    c = config(*AUDIO7B, "student.lora={}", "student.train=[llm, adapter]")
    linear = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert sum(memory.trained(c, shape)) == 32 * 16 * linear + shape.count("adapter")
    with pytest.raises(UserError, match="student.lora.targets: no linear layer nowhere in .* it has .*down_proj"):
        memory.trained(config("student.lora={targets: [nowhere]}"), shape)


# Activations and logits


def sample(name: str, prompt: int, response: int) -> Sample:
    told = Prompt(name, ({"role": "user", "content": name},))
    scored = ScoredRollout(Rollout(told, "text", tuple(range(response)), None, 0, False), None)
    return Sample(scored, [int(name)] * prompt, [])


@pytest.mark.parametrize(("prompt", "response", "n", "budget"), [(30, 10, 4, 300), (50, 20, 8, 128), (90, 40, 2, 100)])
def test_micro_batch_is_what_batches_are_split_into(prompt: int, response: int, n: int, budget: int) -> None:
    samples = [sample(str(i), prompt, response) for i in range(9) for _ in range(n)]
    real = max((collate(m) for m in split(samples, budget)), key=lambda mb: mb.ids.numel())
    mb = memory.micro_batch(prompt, response, n, budget)
    assert (mb.rows, mb.length) == tuple(real.ids.shape)
    assert mb.positions == real.targets.numel() == mb.rows * mb.responses * response


MORE = {
    "xopd": ["rollout.temperature=0.7"],
    "reverse_kl": [],
    "jsd": [],
    "kd": ["rollout.source=teacher"],
    "entropy_aware": ["objective.reference=0.1"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("objective", "checkpointing", "vocab", "elements"),
    [
        ("xopd", True, 600, 1 << 26),
        ("xopd", False, 600, 1 << 26),
        *((name, True, 20000, 1 << 26) for name in ("kd", "entropy_aware")),
        *((name, True, 20000, 1 << 20) for name in ("xopd", "jsd")),
        ("reverse_kl", True, 20000, 1 << 15),  # a token a chunk: what is left is the gradients
    ],
)
@pytest.mark.processes
def test_peak_of_a_real_pass(
    dtype: str, objective: str, checkpointing: bool, vocab: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2AudioForConditionalGeneration

    from opd.models.base import family_of
    from opd.models.speech_lm import SpeechLM

    monkeypatch.setattr("opd.config.needs.ELEMENTS", elements)
    settings = [f"student.dtype={dtype}", f"train.gradient_checkpointing={checkpointing}", "teacher.kind=local"]
    c = config(f"objective.name={objective}", *settings, *MORE[objective])
    family = family_of(STUDENT)
    about, family.vocab_size = family.config, vocab
    about.text_config.update({"hidden_size": 256, "intermediate_size": 768, "vocab_size": vocab, "head_dim": 64})
    about.text_config.update({"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2})
    about.text_config.layer_types = ["full_attention"] * 5
    hf = Qwen2AudioForConditionalGeneration._from_config(about, attn_implementation="sdpa").to(sharding.DTYPES[dtype])
    if checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = SpeechLM(hf, family, ["llm"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    rows, each, length, t = 2, 4, 60 + 4 * 50, 50
    shape = shapes.ModelShape("", "", (), shapes._decoder(about.text_config))
    ids = torch.randint(5, 300, (rows, length))
    attends = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
    row = torch.arange(rows).repeat_interleave(each)
    targets = torch.randint(5, 300, (rows * each, t))
    zeros, ones = torch.zeros(rows * each, t), torch.ones(rows * each, t)
    positions, sampled = torch.zeros_like(targets), torch.ones(rows * each).bool()
    places = torch.arange(length).expand(rows, length).contiguous()
    packed = MicroBatch(
        samples=[],
        ids=ids,
        position_ids=places,
        attends=attends,
        row=row,
        positions=positions,
        targets=targets,
        mask=ones,
        weights=ones / 400,
        teacher_logp=zeros,
        sampler_logp=zeros,
        sampled=sampled,
    )

    def drawn(part: slice) -> torch.Tensor:
        return torch.randn(part.stop - part.start, vocab)

    def loss() -> torch.Tensor:
        o = c.objective
        made = TokenLoss(
            packed, o, c.rollout.temperature, drawn if o.reads == "logits" else None, drawn if o.reference else None
        )
        return model.response_loss(made, ones, **packed.inputs | {"attends": attends.clone()})

    with LiveMemory() as live:
        loss().backward()
    mb = memory.MicroBatch(rows, length, each, targets.numel())
    kept, adds = memory.activations(shape, c, mb)
    expected = kept + max(adds, sum(memory.loss_bytes(shape, c, mb).values()))
    assert expected == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "uld"])  # whole responses instead of chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_a_chunk_are_counted(name: str, dtype: torch.dtype) -> None:
    """To the last one, of every objective, with and without what joins it."""
    n, vocab, hidden = 64, 4000, 4
    for more in ([], ["objective.top_k=4"], ["rollout.temperature=0.5"], ["objective.mu=0", "objective.alpha=0"]):
        if "objective.top_k=4" in more and name not in ("reverse_kl", "forward_kl", "jsd"):
            continue
        c = config(
            f"objective.name={name}", f"rollout.source={OBJECTIVES[name].sources[0]}", "teacher.kind=local", *more
        )
        c = c.changed({"student.dtype": "float32" if dtype == torch.float32 else "bfloat16"})
        head = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype).requires_grad_(False)
        states = torch.randn(n, hidden, dtype=dtype).requires_grad_()
        one = torch.ones(1, n)
        ids = torch.randint(0, vocab, (1, n, 4))
        best = {"top_ids": ids, "top_logp": -torch.rand(1, n, 4) - 4} if c.objective.top_k else {}
        of_rows = dict.fromkeys(("ids", "position_ids", "attends", "row", "positions"), torch.zeros(0))
        logp = {"teacher_logp": -one, "sampler_logp": -one, "sampled": one[:, 0].bool()}
        mb = MicroBatch(samples=[], targets=ids[..., 0], mask=one, weights=one, **of_rows, **logp, **best)
        made = TokenLoss(mb, c.objective, c.rollout.temperature, lambda p: torch.randn(n, vocab))
        made.teacher = made.teacher if c.objective.reads == "logits" else None
        made.tokens["importance"] = torch.ones(n)
        banned = torch.zeros(vocab).bool()
        with LiveMemory() as live:
            finish = partial(torch.masked_fill, mask=banned, value=-1e9)
            token_loss.summed_loss(states, head, lambda x, p: made(finish(x.float()), p), [slice(0, n)])  # noqa: B023
        shape = SimpleNamespace(decoder=SimpleNamespace(vocab=vocab, hidden=hidden))
        c = c.changed({"student.train": ["adapter"]})
        whole: Any = memory.loss_bytes(shape, c, memory.MicroBatch(1, n, 1, n))  # type: ignore[arg-type]
        assert live.peak == pytest.approx(whole["logits and loss"], rel=0.02), more


# Servers


@pytest.mark.parametrize(("model", "tensor_parallel"), [(AUDIO7B, 1), (AUDIO7B, 2), (OMNI, 1), (OMNI, 2), (OMNI, 8)])
def test_keys_and_values_against_vllm(model: list[str], tensor_parallel: int) -> None:
    from vllm.config import ModelConfig
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    c = config(*model, "student.dtype=bfloat16", "rollout.server.max_model_len=1000")
    shape = shapes.student_shape(c)
    m = shape.decoder
    ours = server_memory.server_memory(c, shape, "student", tensor_parallel, 80 << 30, None)
    arch = SimpleNamespace(total_num_kv_heads=m.kv_heads)
    parallel: Any = SimpleNamespace(tensor_parallel_size=tensor_parallel, decode_context_parallel_size=1)
    about: Any = SimpleNamespace(use_mla=False, model_arch_config=arch, max_model_len=1000)
    heads = ModelConfig.get_num_kv_heads(about, parallel)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=m.head_dim, dtype=torch.bfloat16)
    assert ours.kv_per_token * 16 == spec.page_size_bytes * m.layers
    num_blocks = ours.kv // (spec.page_size_bytes * m.layers)
    theirs = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layers"], spec)])
    vllm_config: Any = SimpleNamespace(model_config=about, parallel_config=parallel)
    _, sequences = get_kv_cache_capacity(vllm_config, theirs)
    assert ours.sequences(1000) == int(sequences) > 0 and ours.missing == 0


def test_weights_of_a_server() -> None:
    c = config(*OMNI, "student.dtype=bfloat16")
    shape = shapes.student_shape(c)
    one, two, eight = (server_memory.weight_bytes(shape, 2, tp) for tp in (1, 2, 8))
    assert one == (shape.count() - shape.count("fixed")) * 2  # vision is switched off
    routers = 48 * 128 * 2048
    assert two == pytest.approx((shape.count("llm") / 2 + shape.count("tower") + routers / 2) * 2, rel=0.002)
    keys = 48 * 2 * 4 * 128 * 2048  # 4 heads on 8 GPUs: one each, twice as much as an eighth
    rest = (shape.count("llm") - keys - routers) / 8 + keys / 4 + routers + shape.count("tower")
    assert eight == pytest.approx(rest * 2, rel=0.003)


def test_a_server_that_is_too_large_says_how_much() -> None:
    c = config(*OMNI, "student.dtype=bfloat16")
    shape = shapes.student_shape(c)
    s = server_memory.server_memory(c, shape, "student", 1, 40 << 30, 0.9)
    assert s.share == int((40 << 30) * 0.9) and s.kv < 0 and s.sequences(100) == 0
    assert s.missing == 32 * 16 * s.kv_per_token - s.kv  # 512 tokens are 32 blocks
