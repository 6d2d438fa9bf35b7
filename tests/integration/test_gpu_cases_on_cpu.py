"""What tests/gpu measures, with small models on the CPU: the same cases, code and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import (
    FULL,
    LORA,
    NO_CHECKPOINTING,
    ROOT,
    SHARED,
    SPLIT,
    TINY,
    TINY_ON_GPU,
    Case,
    check_flops,
    check_loss,
    check_peak,
    loss_cases,
    record,
    run_cases,
)
from random_student import write_student

from opd.config import load_config
from opd.layout import layout
from opd.servers import learner, student_server

# The output layer has the share of the LLM that it has in the 7B: a tenth.
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "vocab_size": 1600}
AUDIO = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one process, by name."""
    base = tmp_path_factory.mktemp("gpu_cases")
    student, other = (str(write_student(base / str(i), "cpu", TEXT, AUDIO, seed=i)) for i in range(2))
    zero3 = json.loads((ROOT / "deepspeed_configs/zero3.json").read_text())
    zero3["zero_optimization"]["reduce_bucket_size"] = 10**5  # else a constant would be most of the sum
    (base / "zero3.json").write_text(json.dumps(zero3))
    small = ["train.prompts_per_step=2", "rollout.n=2", "train.micro_batch_tokens=512"]
    size: dict[str, Any] = {"steps": 1, "seconds": 4.0, "text_tokens": 40, "response": 48}
    bucket = f"train.deepspeed={base}/zero3.json"
    cases = [c for c in loss_cases(student, "cpu") if c.name in ("full, ZeRO-3", "LoRA, ZeRO-2")]
    cases += [
        Case("full", student, FULL, [*small, bucket], "cpu", flops=True, **size),
        Case("LoRA", student, LORA, [*small, bucket, NO_CHECKPOINTING], "cpu", flops=True, **size),
        Case("wrong", student, FULL, small, "cpu", reference="cpu", reference_student=other, **size | {"steps": 0}),
    ]
    env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2", "OPD_PEAK_TFLOPS": "0.5"}
    found = run_cases(cases, base / "out", 280, PYTHONPATH=str(ROOT / "tests/unit"), **env)
    return {r["name"]: r for r in found}


def test_loss_is_the_references(figures: dict[str, dict[str, Any]]) -> None:
    for name, stage in (("full, ZeRO-3", 3), ("LoRA, ZeRO-2", 2)):
        r = figures[name]
        check_loss(r)
        assert r["reference_grad_norm"] > 0 and r["zero_stage"] == stage and r["later_losses"][0] != r["loss"]


def test_a_reference_with_other_weights_is_noticed(figures: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        check_loss(figures["wrong"])


def test_peak_and_arithmetic_are_as_planned(figures: dict[str, dict[str, Any]]) -> None:
    for name, worst in (("full", "optimizer step"), ("LoRA", "loss")):
        assert figures[name]["worst"] == worst
        check_peak(figures[name])
        check_flops(figures[name])
    doubled = figures["full"] | {"planned": 2 * figures["full"]["planned"]}
    with pytest.raises(AssertionError):
        check_peak(doubled)


def test_speed_is_of_the_tokens_that_were_read(
    figures: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = figures["full"]
    (seconds,) = r["seconds"]
    assert r["response_tokens_per_s"] * seconds == pytest.approx(2 * 2 * 2 * 48)
    assert r["tokens_per_s"] * seconds == pytest.approx(r["read"])
    assert r["read"] == 2 * sum(length + 2 * 48 for length in r["prompt_tokens"])
    assert r["hfu"] == pytest.approx(r["flops"] / seconds / 0.5e12)
    assert r["mfu"] / r["hfu"] == pytest.approx(6 / 8, rel=0.01)  # forward is computed again
    assert figures["LoRA"]["mfu"] == figures["LoRA"]["hfu"]
    monkeypatch.setenv("OPD_GPU_RECORD", str(tmp_path / "record.jsonl"))
    record(r)
    kept = json.loads((tmp_path / "record.jsonl").read_text())
    assert kept["versions"]["torch"] and kept["device"] == "cpu" and kept["planned"] == r["planned"]


@pytest.mark.parametrize(("placement", "transport", "sleep"), [(SHARED, "ipc", True), (SPLIT, "nccl", False)])
def test_launches_are_what_the_gpu_tests_say(placement: str, transport: str, sleep: bool, tmp_path: Path) -> None:
    overrides = [*TINY_ON_GPU, placement, f"run.dir={tmp_path}"]
    config = load_config(TINY, overrides)
    where = layout(config)
    (place,) = where.servers
    server, ranks = student_server(config, place), learner(config, TINY, overrides, where, 0)
    assert ranks is not None and ranks.env["CUDA_VISIBLE_DEVICES"] == ("0" if sleep else "1")
    assert server.env["CUDA_VISIBLE_DEVICES"] == "0" and ("--enable-sleep-mode" in server.argv) is sleep
    assert json.loads(server.argv[server.argv.index("--weight-transfer-config") + 1])["backend"].endswith(transport)
