"""The learner on a GPU, in bfloat16 under real ZeRO over NCCL: values, memory and speed of Qwen2-Audio at true width.

What is measured and how close it must be: docs/cluster.md. Each case has a process, and so a GPU, of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import (
    FULL,
    LORA,
    PEAK,
    ZERO3,
    Case,
    check_flops,
    check_loss,
    check_peak,
    loss_cases,
    record,
    run_cases,
)

pytestmark = pytest.mark.needs("deepspeed", "transformers", "peft", "trl")
TIMEOUT = 850  # seconds, less than pytest's own
# Two layers of LLM and tower at full width: 1.8 billion parameters, which the CPU reads in float32 within seconds.
SHALLOW: dict[str, Any] = {"text": {"num_hidden_layers": 2}, "audio": {"encoder_layers": 2}}
SIX = {"num_hidden_layers": 6}  # 20 bytes of each of 2.5 billion trained parameters fit an 80 GB card
LONG = ["train.prompts_per_step=4"]  # else as the recipe: 30 s clips, 4 responses of 512 tokens, 4096 tokens at a time
Make = Callable[..., Path]


@pytest.mark.parametrize("index", range(5), ids=[c.name for c in loss_cases("", "cuda")])
def test_loss_and_gradient_are_the_cpu_references(student: Make, tmp_path: Path, index: int) -> None:
    case = loss_cases(str(student("two_layers", **SHALLOW)), "cuda")[index]
    case.about = {"model": "Qwen2-Audio-7B, 2 + 2 layers"}
    (r,) = run_cases([case], tmp_path, TIMEOUT)
    record(r)
    check_loss(r)
    assert r["zero_stage"] == (2 if case.name.endswith("ZeRO-2") else 3)
    assert r["later_losses"][0] != r["loss"]  # the optimizer's step changed something
    if case.name.endswith("offload"):  # what is prefetched varies: an upper bound
        assert r["peak"] < (1 + PEAK) * r["planned"], r


@pytest.mark.parametrize("zero", [[], [ZERO3]], ids=["ZeRO-2", "ZeRO-3"])
def test_lora_of_the_true_shape(student: Make, tmp_path: Path, zero: list[str]) -> None:
    """recipes/qwen2_audio_7b/3_xopd_lora.yaml as it is, four prompts a step; the reference is on the GPU too."""
    case = Case("LoRA, 7B, " + ("ZeRO-3" if zero else "ZeRO-2"), "", LORA, [*LONG, *zero], "cuda")
    case.reference, case.flops = "cuda", True
    case.student = str(student("7b"))
    measure(case, tmp_path)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_full_fine_tuning_of_six_layers(student: Make, tmp_path: Path, checkpointing: str) -> None:
    name = f"full, 6 layers, ZeRO-3, checkpointing {checkpointing}"
    case = Case(name, "", FULL, [*LONG, f"train.gradient_checkpointing={checkpointing}"], "cuda", flops=True)
    case.student = str(student("six_layers", text=SIX))
    measure(case, tmp_path)


def measure(case: Case, folder: Path) -> None:
    """Run, record, judge."""
    import torch

    card = torch.cuda.get_device_properties(0).total_memory
    if card < 70 << 30:
        pytest.skip(f"{case.name}: needs a card of 80 GB, found {card / (1 << 30):.0f} GiB")
    (r,) = run_cases([case], folder, TIMEOUT)
    record(r)
    if case.reference:
        check_loss(r)
    check_flops(r)
    assert r["tokens_per_s"] > 0
    assert r["peak_tflops"] is None or 0.05 < r["mfu"] <= r["hfu"] < 1, r
    check_peak(r)
