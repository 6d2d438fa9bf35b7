"""The doctor's last cheap checks: the placement's GPUs are here, and what goes on them fits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doctor_world import ROOT, facts_of, lines, world

from opd.config.load import load_config
from opd.doctor import command as doctor
from opd.doctor import machine, preflight
from opd.doctor.checks import Facts

__all__ = ["world"]  # a fixture


@pytest.mark.parametrize(("here", "outcome"), [(2, "pass"), (1, "FAIL"), (0, "FAIL")])
def test_gpus_of_the_placement_must_be_there(
    world: Path, monkeypatch: pytest.MonkeyPatch, here: int, outcome: str
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: here)
    found = lines(facts_of(world, "launch.placement=recipes/placements/2gpu_1r_1l.yaml"))["placement"]
    assert found.outcome == outcome
    said = "GPUs [0, 1] of node 0, 2 are here" if here == 2 else f"gives GPU 1 to node 0, {here} GPUs were found here"
    assert said in found.found


def test_gpus_are_counted_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g: (UUID: y)'\necho 'GPU 1: A (UUID: z)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.gpus() == 2
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert machine.gpus() == len(list(Path("/dev").glob("nvidia[0-9]*")))


AUDIO_LORA, VOXTRAL = "recipes/qwen2_audio_7b/3_xopd_lora.yaml", "recipes/voxtral_mini_3b/1_warmstart.yaml"
OMNI = "recipes/qwen3_omni_30b_a3b/1_warmstart.yaml"  # on 4 nodes: servers on the first two, the learner on the others


def memory_of(
    monkeypatch: pytest.MonkeyPatch, recipe: str, gpus: list[float], host: float, *overrides: str
) -> doctor.Line:
    """The line of the memory check on a machine of such GPUs and such a host, in GiB."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(machine, "gpu_memory", lambda: gpus)
    total = SimpleNamespace(total=round(host * (1 << 30)))
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: total)
    check = next(c for c in doctor.checks() if c.name == "memory")
    (line,) = doctor.examine([check], Facts(load_config(recipe, list(overrides))))
    return line


def test_memory_is_held_against_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    line = memory_of(monkeypatch, AUDIO_LORA, [80.0, 8.0], 64)  # the second is not used
    assert (line.outcome, line.found) == ("pass", "fits: GPUs of 80.0 GiB, host of 64.0 GiB")
    line = memory_of(monkeypatch, AUDIO_LORA, [24.0], 64)
    assert line.outcome == "FAIL" and "1gpu_shared.yaml does not fit GPUs of 24.0 GiB, host of 64.0 GiB: " in line.found
    assert "student server on node 0 GPU 0: its share 8.4 GiB less weights 15.6 GiB" in line.found
    assert "node 0 GPU 0: student server needs 40.0 GiB of 24.0 GiB, 16.0 GiB short" in line.found
    assert "; choose another placement, or lower data.max_audio_seconds" in line.found and "`opd plan`" in line.remedy


def test_the_smallest_gpu_that_is_used_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_of(monkeypatch, VOXTRAL, [80.0] * 4, 64).outcome == "pass"
    line = memory_of(monkeypatch, VOXTRAL, [80.0, 80.0, 24.0, 80.0], 64)
    assert line.outcome == "FAIL" and "node 0 GPU 2-3: learner, optimizer step needs 56.9 GiB" in line.found


def test_memory_of_the_host_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    line = memory_of(monkeypatch, AUDIO_LORA, [80.0], 16)  # the sleeping server's weights alone are 15.6 GiB
    assert line.outcome == "FAIL" and "node 0 host: all together needs 16.6 GiB of 16.0 GiB" in line.found
    line = memory_of(monkeypatch, "recipes/tiny/1_warmstart.yaml", [8.0], 8)
    assert (line.outcome, line.found) == ("pass", "fits: host of 8.0 GiB")
    line = memory_of(monkeypatch, "recipes/tiny/1_warmstart.yaml", [80.0], 2)
    assert line.outcome == "FAIL" and "everything on the CPU does not fit host of 2.0 GiB: node 0 host" in line.found


def test_memory_that_is_not_known_here_is_only_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assumed = "GPUs of 80.0 GiB (assumed: none is known here), host of 64.0 GiB"
    line = memory_of(monkeypatch, AUDIO_LORA, [], 64)
    assert (line.outcome, line.found) == ("pass", f"fits: {assumed}")
    line = memory_of(monkeypatch, AUDIO_LORA, [], 64, "rollout.server.gpu_memory_utilization=0.1")
    assert line.outcome == "warn" and line.found.startswith(
        f"does not fit {assumed}: student server on node 0 GPU 0: its share 8.0"
    )
    line = memory_of(monkeypatch, OMNI, [80.0] * 8, 64, "launch.hosts=[a, b, c, d]", "launch.node=0")
    assert line.outcome == "pass"
    line = memory_of(monkeypatch, OMNI, [40.0] * 8, 64, "launch.hosts=[a, b, c, d]", "launch.node=0")
    assert line.outcome == "warn" and "for nodes that are like this one: node 2 GPU 0-7; node 3 GPU 0-7" in line.found
    line = memory_of(monkeypatch, OMNI, [40.0] * 8, 64, "launch.hosts=[a, b, c, d]", "launch.node=2")
    assert line.outcome == "FAIL" and "host of 64.0 GiB: node 2 GPU 0-7: learner, loss needs" in line.found


def test_a_model_without_arithmetic_is_not_judged(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = memory_of(monkeypatch, AUDIO_LORA, [24.0], 64, f"student.path={world}/none")
    assert line.outcome == "not run" and line.found.startswith("no estimate: student.path ")

    def odd(config: Any, machine: Any) -> None:
        raise AttributeError("no num_attention_heads")

    monkeypatch.setattr("opd.doctor.machine.estimate", odd)
    told = preflight.check(facts_of(world).config)
    assert told[-1] == "memory: not run: no estimate: AttributeError: no num_attention_heads"


def test_memory_of_gpus_is_the_drivers_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    for told, found in (("24576\\n81559", [24.0, 81559 / 1024]), ("[N/A]", []), ("Failed to initialize", [])):
        tool.write_text(f"#!/bin/sh\n[ $1 = --query-gpu=memory.total ] && printf '{told}\\n'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert machine.gpu_memory() == found
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert machine.gpu_memory() == []


# ---- the table --------------------------------------------------------------------------------------------------
