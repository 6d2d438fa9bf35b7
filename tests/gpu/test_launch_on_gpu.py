"""The tiny pair through `opd launch` and `opd doctor` with upstream vLLM on GPUs: sleep mode, CUDA IPC, NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_cases import MISMATCH, ROOT, SHARED, SPLIT, TINY, TINY_ON_GPU

pytestmark = pytest.mark.needs("opd", "deepspeed", "vllm")


def opd(command: str, data: Path, run: Path, *more: str) -> None:
    """Run a command of the tiny recipe; it must end well."""
    overrides = [f"data.train={data}/train.jsonl", f"run.dir={run}", *TINY_ON_GPU]
    argv = [sys.executable, "-m", "opd.cli", command, TINY, *overrides, *more]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=850, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def check_run(run: Path) -> None:
    """Three steps, each sampled with the weights of the step before, and log-probs alike on both sides."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps([{k: round(v, 5) for k, v in m.items()} for m in steps]))
    assert [m["step"] for m in steps] == [1, 2, 3]
    for m in steps:
        assert 0 < m["mismatch/logprob"] < MISMATCH and m["version/lag"] == 0 and m["grad_norm"] > 0, m


def test_server_and_learner_share_a_gpu(data: Path, tmp_path: Path) -> None:
    """The server sleeps while the learner works; weights go by CUDA IPC."""
    opd("launch", data, tmp_path / "run", SHARED, "--plain")
    check_run(tmp_path / "run")
    log = (tmp_path / "run/logs/student.log").read_text(errors="replace")
    assert log.count("Sleep mode freed") >= 3  # what vLLM's worker says each time


@pytest.mark.needs(gpus=2)
def test_server_and_learner_on_a_gpu_each(data: Path, tmp_path: Path) -> None:
    """Weights go by NCCL."""
    opd("launch", data, tmp_path / "run", SPLIT, "--plain")
    check_run(tmp_path / "run")


def test_doctor(data: Path, tmp_path: Path) -> None:
    """Its weight push fails where a push that is left out would go unnoticed."""
    found = tmp_path / "found.json"
    opd("doctor", data, tmp_path / "run", SHARED, "--json", str(found))
    checks = {c["name"]: c for c in json.loads(found.read_text())["checks"]}
    print(json.dumps({name: c["found"] for name, c in checks.items()}))
    for name in ("placement", "memory", "student server", "prompt ids", "log-probs", "weight push", "teacher reads"):
        assert checks[name]["outcome"] == "pass", checks[name]
    assert "learner's side is on cuda:0" in checks["prompt ids"]["found"]
