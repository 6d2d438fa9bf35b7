"""Recordings to import: noise, saved and encoded, and a run of the stage."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import soundfile

from opd.data.engine.runner import Summary, run_stage
from opd.data.stages.natural import Natural
from opd.prompts import audio
from opd.prompts.manifest import read_manifest

RATE = 8000


def noise(seconds: float, seed: int = 0, level: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-level, level, int(seconds * RATE)).astype(np.float32)


def save(path: Path, wave: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)
    return path


def encoded(wave: np.ndarray, format: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format=format)
    return buffer.getvalue()


def run(source: object, out: Path, **settings: object) -> tuple[Summary, list[dict], list[str]]:
    """Summary, records with the audio part taken out of the messages, reasons of what was dropped."""
    summary = run_stage(Natural(**settings), str(source), out, workers=1)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    _, bad = read_manifest(str(out))
    assert not bad
    for row in rows:
        (message,) = row.pop("messages")
        (part,) = message["content"]
        assert message["role"] == "user" and part["type"] == "audio"
        row |= {"path": out.parent / part["path"], "text": part["transcript"]}
        audio.load(str(row["path"]), RATE, 60)
    dropped = (out.with_suffix(".stage") / "dropped.jsonl").read_text().splitlines()
    return summary, rows, [json.loads(line)["reason"] for line in dropped]


SRT = """1
00:00:00,000 --> 00:00:02,000
<i>one</i>

2
00:00:02,000 --> 00:00:04,000
two
and a half

3
00:00:05,000 --> 00:00:07,500
three
"""
