"""Benchmark files, sound as lmms-eval's tasks give it, the table; lmms-eval itself runs in the integration tests."""

from __future__ import annotations

import io
import math
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

from opd import types
from opd.cli import main
from opd.evaluate import page
from opd.evaluate.benchmark import command, worker
from opd.evaluate.benchmark.command import JudgeConfig, read, split
from opd.evaluate.benchmark.sound import clip, decode, seconds
from opd.prompts import audio
from opd.settings import UserError

RATE = 16000


def written(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "b.yaml"
    path.write_text(content)
    return path


# ---- settings -------------------------------------------------------------------------------------------------------


def test_every_shipped_benchmark_is_read() -> None:
    found = {p.stem: read(p, []) for p in sorted(Path("recipes/benchmarks").glob("*.yaml"))}
    assert {"voicebench", "voicebench_without_judge", "mmau", "mmar", "mmsu", "air_bench", "librispeech"} == set(found)
    assert all(b.limit is None and b.max_errors == 0 and b.judge is None for b in found.values())


def test_shipped_benchmarks_name_tasks_of_lmms_eval() -> None:
    spec = find_spec("lmms_eval")
    assert spec is not None and spec.origin is not None
    named = {t for p in Path("recipes/benchmarks").glob("*.yaml") for t in read(p, []).tasks}
    found: set[str] = set()
    for path in (Path(spec.origin).parent / "tasks").rglob("*.yaml"):
        found |= set(
            re.findall(r'^(?:task|group) *: *"?([\w-]+)"?\s*$', path.read_text(errors="replace"), re.MULTILINE)
        )
    assert len(named) >= 8 and named <= found, named - found


def test_overrides_are_told_apart(tmp_path: Path) -> None:
    theirs, ours = split(["rollout.timeout_s=5", "benchmark.limit=3", "benchmark.judge={url: 'http://x/v1', model: m}"])
    assert theirs == ["rollout.timeout_s=5"]
    found = read(written(tmp_path, "tasks: [mmar]\nseed: 4\n"), ours)
    assert (found.limit, found.seed) == (3, 4) and found.judge is not None and found.judge.model == "m"


def test_include_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert read(written(tmp_path, "tasks: [a]\ninclude: mine\n"), []).include == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: []", "tasks: List should have at least 1 item"),
        ("limit: 3", "tasks is required"),
        ("tasks: [a]\nlimt: 3", r"unknown key limt \(did you mean limit\?\)"),
        ("tasks: [a]\nlimit: 0", "limit: Input should be greater than 0, found 0"),
        ("tasks: [a]\nlonger: skip", "longer: Input should be 'refuse' or 'cut'"),
        ("tasks: [a]\ninclude: nowhere", "include: .*nowhere: no such folder"),
        ("tasks: [a]\njudge: {url: here, model: m}", "judge.url: expected http"),
        ("tasks: [a]\njudge: {url: 'http://h/v1', model: m, key_env: NO_SUCH_KEY}", "NO_SUCH_KEY is not set"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, content), [])


def test_command_refuses_in_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = "recipes/tiny/2_xopd.yaml", str(tmp_path / "out")
    given = ["benchmark", recipe, str(tmp_path / "none.yaml"), "--out", out]
    assert main(given) == 2
    assert capsys.readouterr().err == f"opd: error: {given[2]}: no such benchmark file; see recipes/benchmarks/\n"
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    given[2] = str(written(tmp_path, "tasks: [mmar]\n"))
    assert main(given) == 2
    told = "opd benchmark needs the library lmms-eval, which is not installed: pip install 'opd[benchmarks]'"
    assert capsys.readouterr().err == f"opd: error: {told}\n"
    assert not (tmp_path / "out").exists()


def test_without_a_judge_nothing_is_sent_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.llm_judge import ProviderFactory, Request

    from opd.evaluate.benchmark import scoring

    theirs = {
        "OPENAI_API_URL": "https://api.openai.com/v1/chat/completions",
        "OPENAI_BASE_URL": "https://api.openai.com/v1",
    }
    others = ("OPENAI_API_KEY", "API_TYPE", "MODEL_VERSION", "JUDGE_MODEL_VERSION")
    for name, value in {**theirs, **dict.fromkeys(others, "sk-secret")}.items():
        monkeypatch.setenv(name, value)  # what the shell of a user may hold, and is put back
    monkeypatch.setattr(ProviderFactory, "_provider_classes", dict(ProviderFactory._provider_classes))
    for name in ("config_of", "log", "asked"):
        monkeypatch.setattr(scoring.Judge, name, getattr(scoring.Judge, name))
    scoring.install_judge(None, tmp_path / "judge.jsonl")
    for name in theirs:
        url = urlsplit(os.environ[name])
        assert (url.scheme, url.hostname, url.port) == ("http", "127.0.0.1", 9), name
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((url.hostname, url.port), timeout=5)
    assert os.environ["OPENAI_API_KEY"] == "none" and "sk-secret" not in {os.environ[n] for n in others}
    server = ProviderFactory.create_provider(os.environ["API_TYPE"])
    with pytest.raises(scoring.JudgeFailed, match="the task asks a judge, and the benchmark has none"):
        server.evaluate(Request(messages=[{"role": "user", "content": "q"}]))
    assert not (tmp_path / "judge.jsonl").exists()
    # with a judge it is that one, for tasks that post by themselves too
    scoring.install_judge(JudgeConfig(url="http://127.0.0.1:8000/v1/", model="m"), tmp_path / "judge.jsonl")
    assert [os.environ[n] for n in theirs] == [f"http://127.0.0.1:8000/v1{end}" for end in ("/chat/completions", "")]


# ---- sound ----------------------------------------------------------------------------------------------------------


def tone(seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * math.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(wave: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_every_form_of_a_clip_is_the_same_clip(tmp_path: Path) -> None:
    wave = tone(rate=44100)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(wave, 44100))
    samples = SimpleNamespace(
        data=np.stack([wave, wave]), sample_rate=44100
    )  # [channels, samples], as torchcodec has it
    forms: list[Any] = [
        str(path),
        path.read_bytes(),
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
        {"array": wave, "sampling_rate": 44100, "path": "nowhere.wav"},
        {"array": np.stack([wave, wave], axis=1), "sampling_rate": 44100},
        SimpleNamespace(get_all_samples=lambda: samples),
    ]
    expected = audio.load(str(path), RATE, 30.0)  # what training hears
    for form in forms:
        heard, cut = clip(form, RATE, 30.0, cut=False)
        np.testing.assert_allclose(heard, expected, atol=1e-6)
        assert not cut and seconds(form) == pytest.approx(0.5)


def test_two_channels_are_mixed() -> None:
    left, right = np.full(800, 0.5, np.float32), np.zeros(800, np.float32)
    heard, _ = clip({"array": np.stack([left, right]), "sampling_rate": RATE}, RATE, 30.0, cut=False)
    np.testing.assert_allclose(heard, 0.25)


def test_long_clips_are_refused_or_cut() -> None:
    with pytest.raises(types.TooLong, match="2.0 s long, at most 1.5 s expected"):
        clip(wav(tone(2.0)), RATE, 1.5, cut=False)
    heard, cut = clip(wav(tone(2.0)), RATE, 1.5, cut=True)
    assert cut and len(heard) == 1.5 * RATE
    np.testing.assert_allclose(heard, tone(2.0)[: len(heard)])


def test_silence_is_heard() -> None:
    heard, _ = clip({"array": np.zeros(1600), "sampling_rate": RATE}, RATE, 30.0, cut=False)
    assert heard.tolist() == [0.0] * 1600


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no sound", "8 bytes: not readable as audio"),
        ("nowhere.wav", "expected sound: .* found 'nowhere.wav'"),
        ({"array": [0.1, 0.2], "sampling_rate": None}, "at None Hz"),
        ({"array": np.zeros((2, 2, 2)), "sampling_rate": RATE}, r"found shape \(2, 2, 2\)"),
        ({"array": [], "sampling_rate": RATE}, "the clip is empty"),
        ({"array": [0.1, math.nan], "sampling_rate": RATE}, "NaN or infinite"),
        (None, "found 'None'"),
    ],
)
def test_what_is_no_sound_is_named(value: Any, message: str) -> None:
    with pytest.raises(types.BadAudio, match=message):
        clip(value, RATE, 30.0, cut=False)
    assert decode(wav(tone()))[0].shape == (8000, 1)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_standard_errors_are_in_the_metrics_unit() -> None:
    right: list[float | None] = [1.0, 0.0, 1.0, 1.0]
    expected = 0.5 / 2  # sample deviation of 1, 0, 1, 1 is 0.5
    assert worker.stderr(0.75, right) == pytest.approx(expected)
    assert worker.stderr(75.0, right) == pytest.approx(100 * expected)
    assert worker.stderr(0.5, right) is None  # not their mean
    assert worker.stderr(1.0, [1.0]) is None and worker.stderr(1.0, [1.0, None]) is None


def test_rows_take_numbers_of_tasks_only() -> None:
    found = {
        "configs": {"a": {}},
        "results": {
            "a": {"alias": "a", "acc,none": 50.0, "acc_stderr,none": "N/A", "x,none": None, "pedant_score,none": 0.0},
            "group": {"alias": "group", "acc,none": 12.0},
        },
        "samples": {"a": [{"acc": {"overall": 1.0}}, {"acc": {"overall": 0.0}}]},
        "higher_is_better": {"a": {"acc": True}},
        "versions": {"a": 2.0},
    }  # fmt: skip
    (row,) = worker.rows(found)
    assert row == {
        "task": "a", "metric": "acc", "value": 50.0, "stderr": pytest.approx(50.0), "n": 2, "higher_is_better": True,
        "version": 2.0,
    }  # fmt: skip
    assert worker.left_out(found) == ["pedant_score is left out: it needs qa_metrics"]


def test_the_table_is_readable() -> None:
    row = {"task": "mmar", "metric": "acc", "value": 61.5, "stderr": 1.5, "n": 1000, "guessed": 3, "cut_off": 0}
    shown = page.benchmark_text({"results": [row, row | {"stderr": None}], "notes": ["a note"]})
    assert shown.splitlines() == [
        "task  metric  value           records  guessed  cut off",
        "mmar  acc     61.500 ± 1.500  1000     3        0",
        "mmar  acc     61.500          1000     3        0",
        "a note",
    ]
