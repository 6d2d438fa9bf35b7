"""A small world to examine: student, teacher, four tones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from opd.config.load import load_config
from opd.doctor import command as doctor
from opd.doctor import preflight
from opd.doctor.checks import Facts

ROOT = Path(__file__).parents[2]
ASKED = ("what is one plus two", "sort nine two five", "reverse cat dog red", "what is two plus five")
ANSWERS = ("three.", "two five nine.", "red dog cat.", "seven.")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with student, teacher, and a manifest of four tones."""
    monkeypatch.chdir(ROOT)
    for name in ("student", "teacher"):
        shutil.copytree(ROOT / "recipes/tiny" / name, tmp_path / name)
    records = []
    for i, (text, answer) in enumerate(zip(ASKED, ANSWERS, strict=True)):
        tone = 0.3 * np.sin(np.arange(16000 + 4000 * i) / 9)
        soundfile.write(tmp_path / f"{i}.wav", tone, 16000)
        records.append({"audio": f"{i}.wav", "transcript": text, "response": answer, "id": f"q{i}"})
    write(tmp_path, records)
    return tmp_path


def write(world: Path, records: list[dict[str, Any]]) -> None:
    (world / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def overrides(world: Path, *more: str) -> list[str]:
    given = [f"{name}.path={world}/{name}" for name in ("student", "teacher")]
    return [*given, f"data.train={world}/train.jsonl", f"run.dir={world}/run", "eval.test=", "eval.retention=", *more]


def facts_of(world: Path, *more: str) -> Facts:
    return Facts(load_config("recipes/tiny/2_xopd.yaml", overrides(world, *more)))


def lines(facts: Facts) -> dict[str, doctor.Line]:
    return {line.name: line for line in doctor.examine(preflight.checks(), facts)}
