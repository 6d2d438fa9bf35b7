"""X-OPD with adapters through the command line: merged pushes, checkpoints, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from live import STUDENT, opd, recipe
from peft import PeftModel
from safetensors.torch import load_file

from opd.cli import main
from opd.models.base import family_of

LORA = [f"student.path={STUDENT}", "student.lora={r: 4, alpha: 16}", "train.gradient_checkpointing=true"]
FAST = ["train.steps=2", "optim.lr=1e-2", "optim.warmup_steps=0"]  # a push that is left out costs 0.1 nats and more


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_xopd_with_adapters(data: Path, student_url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path, overrides = recipe("2_xopd", data, run, *LORA, *FAST, f'rollout.urls=["{student_url}"]')
    done = opd("launch", path, *overrides, "--plain")
    assert done.returncode == 0, done.stderr + done.stdout
    steps = metrics(run)
    assert [m["version/lag"] for m in steps] == [0, 0]
    assert all(m["mismatch/logprob"] < 1e-4 for m in steps)  # the second step sampled from pushed weights
    last = run / "checkpoints/step_2"
    merged = load_file(last / "model/model.safetensors")
    shipped = load_file(f"{STUDENT}/model.safetensors")
    adapter = load_file(last / "adapter/adapter_model.safetensors")
    changed = {n for n, p in shipped.items() if not torch.equal(p, merged[n])}
    assert len(changed) == len(adapter) // 2 and all(n.endswith("_proj.weight") for n in changed)

    # what PEFT makes of base and adapter is the merged model
    base = family_of(STUDENT)
    peft = PeftModel.from_pretrained(base.load(torch.float32, "sdpa"), last / "adapter").merge_and_unload()
    for name, p in peft.named_parameters():
        torch.testing.assert_close(p.data, merged[base.to_vllm(name)], atol=1e-6, rtol=0, msg=name)

    # from the first checkpoint once more: the same second step
    shutil.rmtree(last)
    (run / "status.json").unlink()  # it says that the run is finished
    again = opd("launch", path, *overrides, "--plain")
    assert again.returncode == 0, again.stderr + again.stdout
    assert [m["loss"] for m in metrics(run)] == pytest.approx([m["loss"] for m in steps], abs=1e-5)
    for name, p in load_file(last / "adapter/adapter_model.safetensors").items():
        torch.testing.assert_close(p, adapter[name], atol=1e-5, rtol=0, msg=name)


def test_a_wrong_target_is_named_before_anything_starts(data: Path, tmp_path: Path, capsys) -> None:
    path, overrides = recipe("2_xopd", data, tmp_path / "run", *LORA)
    assert main(["check", path, *overrides]) == 0
    assert "; adapters on " in (out := capsys.readouterr().out) and "gate_proj, k_proj" in out
    assert main(["check", path, *overrides, "student.lora.targets=[q_proj, wo]"]) == 2
    err = capsys.readouterr().err
    assert "found 'wo'; " in err.splitlines()[-1] and "q_proj, up_proj, v_proj" in err and "Traceback" not in err
