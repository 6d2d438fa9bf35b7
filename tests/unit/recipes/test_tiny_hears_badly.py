"""The second student of the tiny world: what was measured of it, and that its ear, not its reading, is what is poor."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

TINY = Path(__file__).parents[3] / "recipes/tiny"
sys.path.insert(0, str(TINY))

import torch  # noqa: E402
from transformers import Qwen2AudioForConditionalGeneration  # noqa: E402

pytest.importorskip("espeakng_loader", reason="pip install opd[espeak]")
import build  # noqa: E402
from build_hearing import POSITIONS, hear, set_window, synthesize  # noqa: E402
from build_tokenizer import build_tokenizer  # noqa: E402
from chat import Chat  # noqa: E402
from measure import accuracy, speaker_accuracy, word_errors  # noqa: E402
from world import questions  # noqa: E402

pytestmark = pytest.mark.processes

SPLITS = ("validation", "test")


def reported(world: str, split: str) -> dict:
    return json.loads((TINY / build.WORLDS[world].report).read_text())["measured"][split]


@pytest.mark.parametrize("split", SPLITS)
def test_what_was_measured_is_the_world_that_is_promised(split):
    well, badly = reported("hears_well", split), reported("hears_badly", split)
    assert badly["teacher, typed questions"] == well["teacher, typed questions"]  # one teacher, the same questions
    rate = "student, word error rate of repeating"
    assert well[rate]["value"] < 0.01
    assert 0.15 <= badly[rate]["value"] <= 0.25
    assert badly["student, man or woman"]["value"] >= 0.95
    typed = [m["student, typed questions"] for m in (well, badly)]
    for skill in ("arithmetic", "sort", "reverse"):  # the few held-out questions of `days` decide nothing
        assert abs(typed[0][skill]["value"] - typed[1][skill]["value"]) < 0.01
    assert typed[1]["all"]["value"] > 0.92
    assert badly["student, spoken questions"]["all"]["value"] < well["student, spoken questions"]["all"]["value"]


def test_the_shipped_students_differ_in_what_they_hear():
    """Fresh questions of the validation split: what the report says holds of the checkpoints that are shipped."""
    chat, data = Chat(build_tokenizer()), synthesize("validation", 60, 7)
    typed, rates = list(islice(questions("validation", 7), 100)), {}
    for name, world in build.WORLDS.items():
        student = Qwen2AudioForConditionalGeneration.from_pretrained(TINY / world.student, dtype=torch.float32).eval()
        set_window(student, POSITIONS)
        heard = hear(student, data)
        rates[name] = word_errors(student, chat, data, heard)["value"]
        assert speaker_accuracy(student, chat, data, heard)["value"] > 0.9
        assert accuracy(student, chat, typed)["all"]["value"] > 0.85
    assert rates["hears_well"] < 0.02
    assert 0.1 < rates["hears_badly"] < 0.3


def test_a_world_without_its_teacher_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path), "--world", "hears_badly"])
    with pytest.raises(SystemExit) as refused:
        build.main()
    assert refused.value.code == 2
    assert f"expected a teacher in {tmp_path / 'teacher'}; build hears_well there first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
