"""Every entry of a learner's and a server's memory to the byte, worked by hand from a small written-out shape.

Student, elements: tower 63, adapter 32, vision 15; LLM: embedding 400, q 64, k 32, norm 8, output 400 = 904; all 1014.
Teacher: embedding 320, q 64, k 32, norm 8, output 320 = 744. Both bfloat16: 2 bytes.
A layer's activations, per token: norms 2(4*8 + 2*8) = 96, inputs 2*2*8 = 32, attention 5*2*8 = 80, and the MLP
4*2*16 = 128 of the student, 4*2*12 = 96 of the teacher: 336 and 304.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from opd.config.load import load_config
from opd.config.schema import Config
from opd.plan import learner_memory as memory
from opd.plan import server_memory
from opd.plan.learner_memory import LearnerMemory, Lengths, Zero, learner_memory
from opd.plan.server_memory import GIB
from opd.plan.shapes import Decoder, ModelShape, Tower, Weight

XOPD, KD = "recipes/tiny/2_xopd.yaml", "recipes/tiny/1_warmstart.yaml"
LENGTHS = Lengths(speech=30, text=10, response=20, audio=0.8)
ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 100,
    "stage3_param_persistence_threshold": 40,
    "stage3_prefetch_bucket_size": 30,
    "stage3_max_reuse_distance": 501,
    "sub_group_size": 300,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def llm(vocab: int) -> tuple[Weight, ...]:
    return (
        Weight("embed.weight", (vocab, 8), "llm", False, True),
        Weight("layers.0.q_proj.weight", (8, 8), "llm", True, False),
        Weight("layers.0.k_proj.weight", (4, 8), "llm", True, False),
        Weight("layers.0.norm.weight", (8,), "llm", False, False),
        Weight("lm_head.weight", (vocab, 8), "llm", False, False),
    )


STUDENT = ModelShape(
    "student",
    "",
    (
        Weight("tower.weight", (9, 7), "tower", False, False),
        Weight("adapter.weight", (8, 4), "adapter", False, False),
        Weight("vision.weight", (3, 5), "fixed", False, False),
        *llm(50),
    ),
    Decoder(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=50),
    Tower(layers=3, width=4, intermediate=6, positions_per_second=50.0),
    lambda seconds: round(25 * seconds),
)
TEACHER = ModelShape("teacher", "", llm(40), Decoder(3, 8, 2, 2, 4, 12, 40))
MIXTURE = replace(STUDENT, decoder=replace(STUDENT.decoder, experts=4, experts_per_token=2))


def config(*overrides: str, recipe: str = XOPD) -> Config:
    common = ["student.path=recipes/tiny/student", "student.dtype=bfloat16", "teacher.dtype=bfloat16"]
    sizes = ["train.prompts_per_step=5", "train.micro_batch_tokens=200", "teacher.batch_tokens=100"]
    return load_config(recipe, [*common, *sizes, *overrides])


def of_two_ranks(c: Config, zero: dict[str, Any]) -> LearnerMemory:
    return learner_memory(c, Zero.of({"zero_optimization": zero}), STUDENT, TEACHER, LENGTHS, 2)


# Learner

# A row: 30 tokens of the prompt and 3 responses of 20 are 90. Two rows in 200 tokens: 180, 120 of them of responses.
PASS = {
    "activations kept": 57240,  # 180 x ((2 layers + 1) x 2*8 + 90 x (2 + 1) of bias and mask)
    "gathered parameters": 1360,  # 2 x (501 // 2 + 30 + 400), below all that are above 40: 927
}
XOPD_PHASES = {
    "tower": {"tower's activations": 30720},  # 8 clips x 40 positions x 2(9*4 + 2*6)
    "loss": {
        **PASS,
        "logits and loss": 108000,  # 120 x 50 x (4 of 4 bytes, one of 2)
        "output layer's gradient": 1600,  # 4 x 50 x 8
        "hidden states of responses": 3840,  # 2 x 2 x 120 x 8
    },
    # the largest gradient is the embedding's; 180 x (2(2*8 + 2*16) + 336)
    "backward": {**PASS, "largest gradient": 800, "a layer's backward": 77760},
    "teacher scores": {
        "teacher's activations": 27360,  # 100 // 30 = 3 rows of 30 tokens, x 304
        "teacher's hidden states": 960,  # 2 x 60 x 8
        "teacher's logits": 24000,  # 60 x 50 of the student's vocabulary, twice 4 bytes
        "teacher's gathered parameters": 1200,  # 2 x (250 + 30 + 320), below 704
    },
}
XOPD_SETTINGS = ["rollout.n=3", "train.gradient_checkpointing=true", "teacher.shard=true"]


def test_zero_3_with_a_sharded_teacher() -> None:
    m = of_two_ranks(config(*XOPD_SETTINGS), ZERO3)
    assert m.device == {
        "parameters": 1016,  # halves, rounded up: 32 + 16 + 8 + 200 + 32 + 16 + 4 + 200 = 508
        "small parameters, whole": 174,  # up to 40: adapter 32, vision 15, k 32, norm 8
        "gradient bucket": 200,
        "gradients": 904,  # 452 x 2
        "float32 copy": 1808,
        "AdamW's moments": 3616,
        "local teacher": 744,  # 744 x 2 over 2 ranks
        "encoded clips": 960,  # ceil(5 / 2) prompts x 20 embeddings x 8 x 2
    }
    step = {"float32 gradients": 1200, "AdamW's square root": 1200}  # a sub-group of 300 of 452
    assert m.phases == {"optimizer step": step, **XOPD_PHASES}
    assert m.host == {}
    assert (m.resident, m.worst, m.peak) == (9422, "loss", 9422 + 172040)


def test_zero_3_with_all_offloaded() -> None:
    m = of_two_ranks(config(*XOPD_SETTINGS), {**ZERO3, **OFFLOAD})
    assert m.device == {"small parameters, whole": 174, "gradient bucket": 200, "encoded clips": 960}
    assert m.phases == {"optimizer step": {}, **XOPD_PHASES}
    assert m.host == {
        "parameters": 1016,
        "gradients": 904,
        "float32 copy": 1808,
        "AdamW's moments": 3616,
        "float32 gradients": 1808,
        "local teacher": 744,
    }


def test_zero_2_with_a_trained_tower_and_a_whole_teacher_that_writes() -> None:
    c = config("student.train=[llm, tower]", recipe=KD)  # no checkpointing; one response a prompt
    m = of_two_ranks(c, {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 100})
    assert m.device == {
        "parameters": 2028,
        "gradients": 968,  # 452 + 32 of the tower's 63
        "float32 copy": 1936,
        "AdamW's moments": 3872,
        "local teacher": 1488,
    }
    # four rows of 50 tokens, 80 of them answered
    every = {
        "activations kept": 164400,  # 200 x (2 layers x 336 + 50 x (2 + 1))
        "gradient bucket": 400,  # two of 100
        "tower's activations": 46080,  # 4 clips x 40 positions x 96 x 3 layers
    }
    assert m.phases == {
        "optimizer step": {"float32 gradients": 1936, "AdamW's square root": 1936},
        # three of the four samples at a time
        "teacher reads": {
            "teacher's activations": 27360,
            "teacher's hidden states": 960,
            "teacher's, of the micro-batch": 1920,  # 2 x 120 x 8: six rows of the text view
        },
        "loss": {
            **every,
            "logits and loss": 136000,  # 80 x 50 x (8 of 4 bytes, one of 2)
            "output layer's gradient": 1600,
            "hidden states of responses": 2560,
            "teacher's, of the micro-batch": 1280,
        },
        "backward": {**every, "largest gradient": 800, "a layer's backward": 19200},  # 200 x 2(2*8 + 2*16)
        "teacher responds": {"keys and values": 9600},  # 2 x 3 layers x 2 heads x 4 x 2 x 100 tokens
    }
    assert m.host == {}


def test_a_sharded_teacher_that_writes_is_gathered() -> None:
    for stage in (2, 3):  # whatever the student's stage is
        m = of_two_ranks(config("teacher.shard=true", recipe=KD), {**ZERO3, "stage": stage})
        assert m.phases["teacher responds"] == {"keys and values": 9600, "teacher's gathered parameters": 1200}


def test_few_samples_are_a_small_chunk() -> None:
    found = memory.teacher_bytes(TEACHER, 50, config(), LENGTHS, 2)
    kept = {"teacher's activations": 2 * 30 * 304, "teacher's hidden states": 2 * 40 * 8}
    assert found == {**kept, "teacher's logits": 8 * 40 * 50}


def test_rows_of_a_sharded_teacher_are_made_at_once() -> None:
    mb = memory.MicroBatch(4, 50, 1, 80)
    kept, reads = memory.read_bytes(TEACHER, 50, config("teacher.shard=true"), LENGTHS, mb)
    assert kept == 4 * 80 * 50 and reads["teacher's logits"] == 8 * 60 * 50


def test_a_chunk_and_what_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.config.needs.ELEMENTS", 620)  # 12 tokens of 50 logits
    mb = memory.MicroBatch(4, 50, 1, 80)
    of_both = {"output layer's gradient": 1600, "hidden states of responses": 2560}
    assert memory.loss_bytes(STUDENT, config(), mb) == {"logits and loss": 12 * 50 * 18, **of_both}
    monkeypatch.setattr("opd.config.needs.ELEMENTS", 1)
    # a token's logits are less than what it adds to the output layer's gradient: 2 x 50 x (8 + 1)
    assert memory.loss_bytes(STUDENT, config(), mb) == {"logits and loss": 900, **of_both}
    lora = memory.loss_bytes(STUDENT, config("student.lora={}"), mb)
    assert lora == {"logits and loss": 900, "hidden states of responses": 2560}
    assert memory.teacher_bytes(TEACHER, 50, config(), LENGTHS, 2)["teacher's logits"] == 8 * 50


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (["objective.name=xopd"], 5),
        (["objective.name=xopd", "rollout.temperature=0.5"], 6),
        (["objective.name=reverse_kl"], 8),
        (["objective.name=reverse_kl", "objective.top_k=3"], 5),
        (["objective.name=reverse_kl", "objective.reference=0.1"], 11),
        (["objective.name=jsd"], 12),
        (["objective.name=jsd", "objective.beta=1"], 8),
        (["objective.name=kd", "rollout.source=teacher"], 9),
        (["objective.name=kd", "rollout.source=teacher", "objective.mu=0"], 5),
    ],
)
def test_tensors_of_a_chunk(settings: list[str], count: int) -> None:
    assert memory.chunk_tensors(config("teacher.kind=local", *settings)) == count


def test_gathered_parameters() -> None:
    zero = Zero.of({"zero_optimization": ZERO3})
    assert memory.gathered(zero, [400, 300, 200, 40], 2, 2) == 2 * (250 + 30 + 400)
    assert memory.gathered(zero, [400, 100, 40], 2, 2) == 2 * 500  # there are no more
    assert memory.gathered(zero, [400, 300, 200], 2, 1) == 0  # a lone rank uses them where they lie
    offloaded = Zero.of({"zero_optimization": {**ZERO3, **OFFLOAD}})
    assert memory.gathered(offloaded, [400, 300, 200], 2, 1) == 2 * 680
    assert memory.gathered(replace(zero, stage=2), [400, 300, 200], 2, 2) == 0


def test_a_layer_of_a_mixture_and_of_eager_attention() -> None:
    assert memory.layer_bytes(STUDENT, 2, 10, "sdpa") == 336
    assert memory.layer_bytes(MIXTURE, 2, 10, "sdpa") == 336 + 3 * 2 * 8 * 2
    assert memory.layer_bytes(STUDENT, 2, 10, "eager") == 336 + 2 * 10 * (2 * 2 + 4)


# Servers


def test_a_student_server() -> None:
    c = config("rollout.server.max_num_seqs=4", "rollout.server.max_model_len=100")
    s = server_memory.server_memory(c, STUDENT, "student", 2, 10 * GIB, 0.5)
    assert (s.kind, s.tensor_parallel, s.max_model_len, s.beyond) == ("student", 2, 100, 0)
    assert s.share == 5 * GIB
    assert s.weights == 2 * (63 + 32 + 200 + 32 + 32 + 8 + 200)  # one head of keys: whole on both GPUs
    # 400 tokens: 4 sequences of 100 are no more. Logits of 4 sequences, a tower over one clip of 30 s.
    assert s.forward_pass == 400 * 2 * (3 * 8 + 24) + 3 * 4 * 4 * 50 + 1500 * 96 + 2 * GIB
    assert s.kv_per_token == 2 * 2 * 1 * 4 * 2
    assert s.kv == 5 * GIB - 1134 - (38400 + 2400 + 144000 + 2 * GIB) and s.missing == 0
    assert s.sequences(100) == s.kv // (16 * 32) // 7


def test_a_server_of_a_mixture_with_a_batch_of_its_own() -> None:
    c = config("rollout.server.max_num_seqs=4", "rollout.server.args=[--max-num-batched-tokens, '1600']")
    s = server_memory.server_memory(c, MIXTURE, "student", 2, 10 * GIB, 0.5)
    # of each token also 2 experts' inputs, 2 x 2*8 each; the tower over 1600 // 750 = 2 clips
    assert s.forward_pass == 1600 * (96 + 2 * 2 * 8 * 2) + 2400 + 2 * 144000 + 2 * GIB


def test_a_teacher_server() -> None:
    c = config("rollout.server.max_num_seqs=4", "rollout.server.max_model_len=100")
    s = server_memory.server_memory(c, TEACHER, "teacher", 2, 10 * GIB, None)
    assert s.share == 9 * GIB
    assert s.weights == 2 * (160 + 32 + 16 + 8 + 160)
    assert s.forward_pass == 2048 * 2 * (3 * 8 + 18) + 3 * 4 * 4 * 40 + 2 * GIB  # opd's launcher asks for 2048 tokens
    assert s.beyond == 2048 * 40 * (2 + 4 + 4)
    assert s.kv_per_token == 2 * 3 * 1 * 4 * 2
    short = replace(s, share=s.weights + s.forward_pass + 1000)
    assert short.missing == 7 * 16 * 48 - 1000 and short.sequences(16) == 1000 // (16 * 48)


@pytest.mark.parametrize("gib", [24, 69, 70, 141, 159, 160, 180])
def test_default_batch_is_vllms(gib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    device = SimpleNamespace(
        get_device_total_memory=lambda: gib * GIB, get_device_name=lambda: "H100", is_tpu=lambda: False,
        is_cpu=lambda: False,
    )  # fmt: skip
    monkeypatch.setattr(arg_utils, "current_platform", device)
    tokens, _ = arg_utils.EngineArgs.get_batch_defaults(1)
    assert server_memory.batched_tokens(config(), "student", gib * GIB) == tokens[UsageContext.OPENAI_API_SERVER]


def test_batch_holds_a_token_of_every_sequence() -> None:
    c = config("rollout.server.max_num_seqs=4096")
    assert server_memory.batched_tokens(c, "student", 24 * GIB) == 4096
    assert server_memory.batched_tokens(c, "teacher", 24 * GIB) == 4096
