"""The benchmark of the loss, at sizes that take no time: every objective, and the bytes that the docs promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

BENCHMARK = str(Path(__file__).parents[3] / "benchmarks/loss_memory.py")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [BENCHMARK, *arguments])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(BENCHMARK, run_name="__main__")
    return int(str(e.value.code or 0))


def test_every_objective_takes_at_most_a_fifth_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes at a real vocabulary and 8192 tokens, where nothing is allocated."""
    assert run(monkeypatch, "--timed-tokens", "0") == 0
    ours = [line.split() for line in capsys.readouterr().out.splitlines() if " ours " in line]
    assert [line[0] for line in ours] == [
        *("sft", "kd", "xopd", "reverse_kl", "forward_kl", "jsd", "entropy_aware", "cord", "salad"),
        "reverse_kl,top_k",
    ]
    assert all(float(line[3]) <= 0.2 for line in ours)


def test_it_compares_with_whole_logits_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--vocab", "503", "--hidden", "8", "--tokens", "64", "--timed-tokens", "40", "--repeats", "1"]
    assert run(monkeypatch, *sizes, "--top-k", "4", "--objectives", "xopd", "jsd", "reverse_kl,top_k") == 0
    out = capsys.readouterr().out
    assert (out.count(" ours "), out.count(" plain "), out.count(" TRL ")) == (3, 3, 2)


def test_uld_is_not_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--objectives", "uld") == 2
    assert "invalid choice: 'uld'" in capsys.readouterr().err
