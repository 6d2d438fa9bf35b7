"""What is measured of the learner, how it is run in a process of its own, and what must hold. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LORA = "recipes/qwen2_audio_7b/3_xopd_lora.yaml"
FULL = "recipes/qwen2_audio_7b/2_xopd.yaml"
ZERO3 = "train.deepspeed=deepspeed_configs/zero3.json"
NO_CHECKPOINTING = "train.gradient_checkpointing=false"
OFFLOAD = "train.deepspeed=deepspeed_configs/zero3_offload.json"

# bfloat16 against float32 (docs/cluster.md). The loss is near 1; rounding of single log-probs averages out in it.
MISMATCH = 0.05  # mean |learner - reference| log-prob, in nats: the doctor's limit
LOSS = 0.03
GRAD_NORM = 0.10  # relative
PEAK = 0.15  # relative, of the peak that `opd plan` predicts
FLOPS = 0.15  # relative, of the counted arithmetic

TINY = "recipes/tiny/2_xopd.yaml"
# X-OPD of the tiny pair with real servers on GPUs; data.train and run.dir come from the test.
TINY_ON_GPU = [
    "student.path=recipes/tiny/student",
    "student.dtype=bfloat16",
    "teacher.dtype=bfloat16",
    "rollout.max_mismatch=0.5",
    "train.prompts_per_step=4",
    "train.steps=3",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "eval.test=",
    "eval.retention=",
]
SHARED = "launch.placement=recipes/placements/1gpu_shared.yaml"
SPLIT = "launch.placement=recipes/placements/2gpu_1r_1l.yaml"


@dataclass
class Case:
    """What to run. The batch has one clip, one text and one response length: what `opd plan` is asked about."""

    name: str
    student: str  # checkpoint folder
    recipe: str
    overrides: list[str]
    device: str  # cuda or cpu
    steps: int = 3  # that are timed, after the first
    seconds: float = 30.0  # of a clip
    text_tokens: int = 64  # of a prompt, at least
    response: int = 512
    reference: str = ""  # device of a float32 reference of loss and log-probs; none: no reference
    gradient: bool = False  # the reference goes backward too
    flops: bool = False  # count the arithmetic of the first step
    reference_student: str = ""  # checkpoint of the reference, where a test wants another one
    about: dict[str, Any] = field(default_factory=dict)  # of the student, for the record


def loss_cases(student: str, device: str, reference: str = "cpu") -> list[Case]:
    """Short batches, for a comparison with a float32 reference: full fine-tuning and LoRA, ZeRO-3 and ZeRO-2."""
    few = ["train.prompts_per_step=2", "rollout.n=2", "train.micro_batch_tokens=512"]
    ways = {
        "full, ZeRO-3": (FULL, few),
        "full, ZeRO-3, no checkpointing": (FULL, [*few, NO_CHECKPOINTING]),
        "LoRA, ZeRO-3": (LORA, [*few, ZERO3]),
        "LoRA, ZeRO-2": (LORA, few),
        "full, ZeRO-3 with offload": (FULL, [*few, OFFLOAD]),
    }
    size: dict[str, Any] = {"steps": 1, "seconds": 4.0, "text_tokens": 40, "response": 48}
    return [
        Case(name, student, recipe, [*more], device, reference=reference, gradient=True, **size)
        for name, (recipe, more) in ways.items()
    ]


def run_cases(cases: list[Case], folder: Path, timeout: float, **env: str) -> list[dict[str, Any]]:
    """The figures of each case (tests/gpu/learner_case.py); a failure shows the end of the process's output."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, out = folder / "cases.json", folder / "figures.json"
    asked.write_text(json.dumps([asdict(c) for c in cases]))
    command = [sys.executable, str(Path(__file__).with_name("learner_case.py")), str(asked), str(out)]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")  # ninja lives beside python
    whole = {**os.environ, "PATH": path, "TOKENIZERS_PARALLELISM": "false", **env}
    whole["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), env.get("PYTHONPATH"), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=whole, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def check_loss(r: dict[str, Any]) -> None:
    """Log-probs, loss and, where the reference went backward, gradient norm are the float32 reference's."""
    assert r["mismatch/logprob"] < MISMATCH, r
    assert abs(r["loss"] - r["reference_loss"]) < LOSS and r["reference_loss"] > 0.5, r
    if r["reference_grad_norm"]:
        assert abs(r["grad_norm"] / r["reference_grad_norm"] - 1) < GRAD_NORM, r


def check_peak(r: dict[str, Any]) -> None:
    """The measured peak is the predicted one; so is what stays between steps, without which the sum proves little."""
    for found, said in (("peak", "planned"), ("resident", "planned_resident")):
        assert abs(r[found] / r[said] - 1) < PEAK, (found, r[found] / r[said], r)


def check_flops(r: dict[str, Any]) -> None:
    """The formula of opd/plan/step_time.py is near what torch counted in the step."""
    assert abs(r["flops"] / r["flops_counted"] - 1) < FLOPS, (r["flops"] / r["flops_counted"], r)


def record(r: dict[str, Any]) -> str:
    """The line for docs/LOG.md, printed and appended to the file that $OPD_GPU_RECORD names."""
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()})
    if file := os.environ.get("OPD_GPU_RECORD"):
        with open(file, "a", encoding="utf-8") as f:
            f.write(line + "\n")
    print(line, flush=True)
    return line
