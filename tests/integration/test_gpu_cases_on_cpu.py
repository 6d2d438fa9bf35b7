"""What tests/gpu measures, with small models on the CPU: the same cases, code and limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import (
    NO_CHECKPOINTING,
    ROOT,
    SHARED,
    SPLIT,
    TINY,
    TINY_ON_GPU,
    check_flops,
    check_loss,
    check_peak,
    loss_cases,
    record,
    run_cases,
)
from random_student import write_student

from opd.config.load import load_config
from opd.processes.commands import learner, student_server
from opd.processes.layout import layout

# The output layer has the share of the LLM that it has in the 7B: a tenth.
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 4, "vocab_size": 1600}
AUDIO = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}

WORST = {"full, ZeRO-3": "optimizer step", "LoRA, ZeRO-2": "loss"}  # case -> phase of its peak


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one process, by name."""
    base = tmp_path_factory.mktemp("gpu_cases")
    student, other = (str(write_student(base / str(i), "cpu", TEXT, AUDIO, seed=i)) for i in range(2))
    cases = [c for c in loss_cases(student, "cpu") if c.name in WORST]
    for i, (case, name) in enumerate(zip(cases, ("zero3", "zero2"), strict=True)):
        settings = json.loads((ROOT / f"deepspeed_configs/{name}.json").read_text())
        settings["zero_optimization"]["reduce_bucket_size"] = 10**5  # else a constant would be most of the sum
        (base / f"{name}.json").write_text(json.dumps(settings))
        case.flops = True
        case.overrides += [f"train.deepspeed={base}/{name}.json", *([NO_CHECKPOINTING] if i else [])]
    wrong = replace(cases[0], name="wrong", reference_student=other, gradient=False, flops=False, steps=0)
    env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPD_PEAK_TFLOPS": "0.5"}
    found = run_cases([*cases, wrong], base / "out", 280, PYTHONPATH=str(ROOT / "tests/unit"), **env)
    return {r["name"]: r for r in found}


def test_loss_is_the_references(figures: dict[str, dict[str, Any]]) -> None:
    for name, stage in zip(WORST, (3, 2), strict=True):
        r = figures[name]
        check_loss(r)
        assert r["reference_grad_norm"] > 0 and r["zero_stage"] == stage and r["later_losses"][0] != r["loss"]


def test_a_reference_with_other_weights_is_noticed(figures: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        check_loss(figures["wrong"])


def test_peak_and_arithmetic_are_as_planned(figures: dict[str, dict[str, Any]]) -> None:
    for name, worst in WORST.items():
        assert figures[name]["worst"] == worst
        check_peak(figures[name])
        check_flops(figures[name])
    doubled = figures["full, ZeRO-3"] | {"planned": 2 * figures["full, ZeRO-3"]["planned"]}
    with pytest.raises(AssertionError):
        check_peak(doubled)


def test_speed_is_of_the_tokens_that_were_read(
    figures: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = figures["full, ZeRO-3"]
    (seconds,) = r["seconds"]
    assert r["response_tokens_per_s"] * seconds == pytest.approx(2 * 2 * 2 * 48)
    assert r["tokens_per_s"] * seconds == pytest.approx(r["read"])
    assert r["read"] == 2 * sum(length + 2 * 48 for length in r["prompt_tokens"])
    assert r["hfu"] == pytest.approx(r["flops"] / seconds / 0.5e12)
    layers = 4 * (4 * 256 * 256 + 3 * 256 + 3 * 256 * 1024 + 2 * 256) + 256  # q, k, v, o, biases, MLP, norms; the last
    again = (r["hfu"] - r["mfu"]) * seconds * 0.5e12  # checkpointing computes forward again, but the output layer
    assert again == pytest.approx(2 * layers * r["read"])
    assert figures["LoRA, ZeRO-2"]["mfu"] == figures["LoRA, ZeRO-2"]["hfu"]
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
