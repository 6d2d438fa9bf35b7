"""The embedded world: its questions, its speech, its data set and its two checkpoints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

TINY = Path(__file__).parents[3] / "recipes/tiny"
sys.path.insert(0, str(TINY))

import world  # noqa: E402

DIGITS = {word: n for n, word in enumerate(world.ONES)} | {w: 10 * n for n, w in enumerate(world.TENS) if n > 1}


def drawn(split: world.Split, count: int, seed: int = 0) -> list[world.Question]:
    return list(islice(world.questions(split, seed), count))


def number(words: list[str]) -> int:
    return sum(DIGITS[w] for w in words)


def test_same_seed_same_questions():
    assert drawn("train", 200, 3) == drawn("train", 200, 3)
    assert drawn("train", 200, 3) != drawn("train", 200, 4)


def test_no_question_in_two_splits():
    asked = {split: {q.question for q in drawn(split, 3000)} for split in world.SPLITS}
    for split, questions in asked.items():
        assert {world.split_of(q) for q in questions} == {split}
    assert not asked["train"] & (asked["validation"] | asked["test"])
    assert not asked["validation"] & asked["test"]


@pytest.mark.parametrize("split", world.SPLITS)
def test_answers_are_right(split):
    skills = set()
    for q in drawn(split, 1500):
        skills.add(q.skill)
        words = q.question.split()
        said = re.sub("[.,]", "", q.response).split()
        if q.skill == "arithmetic":
            a, first, b, second, c = words[2:]
            symbols = {"plus": "+", "minus": "-", "times": "*"}
            result = eval(f"{DIGITS[a]}{symbols[first]}{DIGITS[b]}{symbols[second]}{DIGITS[c]}")
            last = said[max(i for i, w in enumerate(said) if w == "is") + 1 :]
            assert number(last) == result, q
        elif q.skill == "sort":
            assert [DIGITS[w] for w in said] == sorted(DIGITS[w] for w in words[1:]), q
        elif q.skill == "reverse":
            assert said[::-1] == words[1:], q
        else:
            step = DIGITS[words[3]] * (1 if words[5] == "after" else -1)
            start, count = world.DAYS.index(words[6]), abs(step)
            direction = step // count
            assert said == [world.DAYS[(start + direction * i) % 7] for i in range(1, count + 1)], q
        assert q.accepts(q.response), q
    assert skills == set(world.SKILLS)


def test_only_the_result_of_an_arithmetic_answer_counts():
    q = next(q for q in drawn("train", 500) if q.skill == "arithmetic" and q.response.endswith(" is one."))
    assert q.accepts("one.")
    assert not q.accepts("thirty one.")
    assert not q.accepts("two plus two is twenty one.")
    assert not q.accepts(q.response + " two.")
    assert not q.accepts("")


def test_numbers_beyond_the_world_are_refused():
    with pytest.raises(ValueError, match="0 to 99, found 100"):
        world.in_words(100)


def test_speech_depends_on_its_own_calls_alone():
    pytest.importorskip("espeakng_loader", reason="pip install opd[espeak]")
    import speech

    texts = ["sort three one two nine", "what is two plus two times three"]
    first, second = speech.Synthesizer(), speech.Synthesizer()
    a = [first.say(t, "en-us+f2", 170, 50) for t in texts]
    b = [second.say(t, "en-us+f2", 170, 50) for t in texts]
    for x, y, text in zip(a, b, texts, strict=True):
        assert np.array_equal(x.wave, y.wave)
        assert len(x.word_starts) == len(text.split())
        assert list(x.word_starts) == sorted(x.word_starts)
    with pytest.raises(ValueError, match="voice: expected one of"):
        first.say("one", "nobody", 170, 50)


def make(out: Path, *args: str) -> str:
    command = [sys.executable, str(TINY / "make_data.py"), "--out", str(out), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.processes
def test_make_data(tmp_path):
    sizes = ("--train", "6", "--validation", "4", "--test", "5")
    make(tmp_path, *sizes)
    counts = {"train": 6, "validation": 4, "test": 5, "retention_validation": 4, "retention": 5, "hearing": 5}
    for name, count in counts.items():
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(records) == count
        for record in records:
            audio, *rest = record["messages"][0]["content"]
            wave, rate = soundfile.read(tmp_path / audio["path"])
            assert rate == 16000 and wave.ndim == 1 and 0.5 < len(wave) / rate < 4
            assert np.abs(wave).max() > 0.3
            matches = re.fullmatch if record["match"] == "regex" else str.__eq__
            assert matches(record["answer"], record["response"])
            assert [p["text"] for p in rest] == {
                "retention": ["\nman or woman"],
                "retention_validation": ["\nman or woman"],
                "hearing": ["\nrepeat"],
            }.get(name, [])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert "nothing to do" in make(tmp_path, *sizes)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "audio/test-000001.wav").unlink()
    assert "nothing to do" not in make(tmp_path, *sizes)
    assert (tmp_path / "audio/test-000001.wav").is_file()


def test_checkpoints_are_small_and_share_their_tokenizer():
    kinds = ("teacher", "student", "student_hears_badly")
    files = [p for kind in kinds for p in (TINY / kind).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 30_000_000
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert len({(TINY / kind / name).read_bytes() for kind in kinds}) == 1


def test_answers_are_short_and_every_word_is_one_token():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    for word in world.WORDS:
        assert len(tokenizer(f" {word}").input_ids) == 1, word
    for q in drawn("train", 1000):
        assert len(tokenizer(q.response).input_ids) < 24, q  # one is left for the end-of-turn token
