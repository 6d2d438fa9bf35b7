"""Stage `speak`: espeak-ng, and an endpoint that is well, slow, down, or talks nonsense."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_openai import Call, FakeOpenAI, Reply, serving, tone

from opd.data.engine.runner import Summary, run_stage
from opd.data.engine.stage import ClipStore, Drop
from opd.data.stages import espeak, stage_class
from opd.data.stages.speak import lufs, true_peak
from opd.prompts.audio import load
from opd.prompts.manifest import read_manifest
from opd.settings import UserError, validated

TEXTS = ["what is seven plus nine", "who wrote Faust", "name three rivers", "how far is the moon"]


def stage(**settings: Any) -> Any:
    return validated(stage_class("speak"), settings, "test")


def asking(fake: FakeOpenAI, **more: Any) -> dict[str, Any]:
    return {"endpoint": {"url": fake.url, "model": "kokoro", "retries": 1, **more}, "voices": ["anna", "ben", "cleo"]}


def manifest(folder: Path, texts: list[str] = TEXTS, start: int = 0) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"q{start + i}", "messages": [{"role": "user", "content": t}]} for i, t in enumerate(texts)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "texts.jsonl")


def speak(tmp_path: Path, settings: dict[str, Any], out: str = "spoken", **how: Any) -> tuple[Summary, list[Any]]:
    path, workers = tmp_path / f"{out}.jsonl", None if "endpoint" in settings else 1
    summary = run_stage(stage(**settings), manifest(tmp_path / "in", **how), path, workers=workers)
    return summary, [json.loads(line) for line in path.read_text().splitlines()]


def good(call: Call) -> Reply:
    return Reply(tone(0.2 + len(call.body["input"]) / 20))


def test_an_endpoint_speaks(tmp_path):
    with serving(FakeOpenAI(good)) as fake:
        settings = asking(fake) | {"speed": [0.9, 1.2], "extra": {"instructions": "calm"}}
        summary, records = speak(tmp_path, settings)
    assert (summary.written, summary.dropped.total(), summary.failed.total()) == (4, 0, 0)
    asked = {call.body["input"]: call.body for call in fake.calls}
    for record, text in zip(records, TEXTS, strict=True):
        part = record["messages"][-1]["content"][0]
        assert part["transcript"] == text
        wave, rate = soundfile.read(tmp_path / part["path"])
        assert rate == 16000 and wave.ndim == 1
        assert record["seconds"] == pytest.approx(0.2 + len(text) / 20, abs=0.011)
        assert lufs(wave, rate) == pytest.approx(-23, abs=0.1)
        body = asked[text]
        assert record["voice"] == body["voice"] and body["voice"] in ("anna", "ben", "cleo")
        assert (body["model"], body["response_format"], body["instructions"]) == ("kokoro", "wav", "calm")
        assert 0.9 <= body["speed"] <= 1.2
    assert {call.path for call in fake.calls} == {"/v1/audio/speech"}
    prompts, bad = read_manifest(str(tmp_path / "spoken.jsonl"))
    assert len(prompts) == 4 and not bad


def test_voices_are_of_the_record_and_the_seed(tmp_path):
    texts = [f"question number {i}" for i in range(40)]
    with serving(FakeOpenAI(good)) as fake:
        _, first = speak(tmp_path, asking(fake), texts=texts)
        lines = (tmp_path / "in/texts.jsonl").read_text().splitlines()
        (tmp_path / "in/back.jsonl").write_text("\n".join(lines[::-1]))
        run_stage(stage(**asking(fake)), str(tmp_path / "in/back.jsonl"), tmp_path / "b/back.jsonl", shard=(0, 2))
        run_stage(stage(**asking(fake)), str(tmp_path / "in/back.jsonl"), tmp_path / "b/back.jsonl", shard=(1, 2))
        _, other = speak(tmp_path, asking(fake) | {"seed": 1}, "seed", texts=texts)
    back = [json.loads(line) for line in (tmp_path / "b/back.jsonl").read_text().splitlines()]
    assert back[::-1] == first
    voices = [r["voice"] for r in first]
    assert voices != [r["voice"] for r in other]
    assert all(voices.count(v) >= 5 for v in ("anna", "ben", "cleo"))


def test_nothing_is_spoken_twice(tmp_path):
    with serving(FakeOpenAI(good)) as fake:
        settings = asking(fake) | {"voices": ["anna"]}
        speak(tmp_path, settings)
        assert len(fake.calls) == 4
        speak(tmp_path, settings, "again", start=100)  # other records with the same texts
        speak(tmp_path, settings | {"max_seconds": 20.0}, "limits")
        assert len(fake.calls) == 4
        speak(tmp_path, settings | {"lufs": -20.0}, "louder")
        assert len(fake.calls) == 8
    clips = [p.name for p in (tmp_path / "audio").rglob("*.flac")]
    assert len(clips) == len(set(clips)) == 8


def test_the_same_voice_elsewhere_is_the_same(tmp_path):
    """Where an endpoint is decides nothing; which model it serves does."""
    with serving(FakeOpenAI(good)) as fake, serving(FakeOpenAI(good)) as moved:
        speak(tmp_path, asking(fake))
        summary, _ = speak(tmp_path, asking(moved))
        assert summary.made == 0 and not moved.calls
        summary, _ = speak(tmp_path, asking(moved, model="cosy"))
        assert summary.made == 4 and len(moved.calls) == 4


BAD = {
    "no audio": b'{"error": "no such voice"}',
    "empty": b"",
    "silence": tone(1, level=0.0),
    "truncated": tone(1)[:20000],
    "whisper of nothing": tone(1, level=0.0002),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_is_no_whole_audio_fails_and_is_asked_again(tmp_path, content):
    with serving(FakeOpenAI(lambda call: Reply(content) if "Faust" in call.body["input"] else good(call))) as fake:
        summary, records = speak(tmp_path, asking(fake))
        assert dict(summary.failed) == {"no usable audio": 1} and [r["id"] for r in records] == ["q0", "q2", "q3"]
        fake.answer, before = good, len(fake.calls)
        summary, records = speak(tmp_path, asking(fake))
        assert summary.failed.total() == 0 and len(records) == 4
        assert [call.body["input"] for call in fake.calls[before:]] == ["who wrote Faust"]


def test_an_endpoint_that_only_fails_is_given_up(tmp_path):
    texts = [f"question number {i}" for i in range(40)]
    with (
        serving(FakeOpenAI(lambda call: Reply({"oh": "no"}))) as fake,
        pytest.raises(UserError, match="no usable audio: .*oh.* not readable as audio") as caught,
    ):
        speak(tmp_path, asking(fake), texts=texts)
    assert str(caught.value).startswith("speak: 11 of 11 records failed")
    assert not (tmp_path / "spoken.jsonl").exists()


def test_busy_and_stumbling_endpoints_are_asked_again(tmp_path):
    busy = Reply({"error": {"message": "busy"}}, 429, {"Retry-After": "1"})
    for first in (busy, Reply(b"", 503), Reply(tone(1), cut=5000), Reply(tone(1), cut=0)):
        with serving(FakeOpenAI(good, first)) as fake:
            started = time.monotonic()
            summary, _ = speak(tmp_path / fake.url[-8:-3], asking(fake), texts=TEXTS[:1])
            assert summary.written == 1 and len(fake.calls) == 2
            assert first is not busy or time.monotonic() - started >= 1


DOWN = {
    "HTTP 500": Reply(b"", 500),
    "HTTP 401": Reply({"error": {"message": "wrong key"}}, 401),
    "HTTP 404": Reply({"error": {"message": "no such model"}}, 404),
    "no answer in 0.2 s": Reply(tone(1), delay=0.6),
    "cannot be reached": Reply(tone(1), cut=5000),
}


@pytest.mark.parametrize("told, reply", DOWN.items(), ids=DOWN)
def test_an_endpoint_that_is_down_stops_the_run_and_what_is_done_is_kept(tmp_path, told, reply):
    with serving(FakeOpenAI(lambda call: reply if "moon" in call.body["input"] else good(call))) as fake:
        patience = {"timeout_s": 0.2} if reply.delay else {}
        with pytest.raises(UserError, match=told):
            speak(tmp_path, asking(fake, **patience))
        assert not (tmp_path / "spoken.jsonl").exists()
        fake.answer = good
        before = sum("moon" not in call.body["input"] for call in fake.calls)
        summary, records = speak(tmp_path, asking(fake))
        assert len(records) == 4
        assert sum("moon" not in call.body["input"] for call in fake.calls) == max(before, 3)


def test_an_endpoint_that_is_not_there(tmp_path):
    with serving(FakeOpenAI(good)) as fake:
        pass
    with pytest.raises(UserError, match="cannot be reached"):
        speak(tmp_path, asking(fake))


def test_a_key_is_sent_and_its_absence_told(tmp_path, monkeypatch):
    with serving(FakeOpenAI(good)) as fake:
        with pytest.raises(UserError, match=r"endpoint.key_env: the environment variable OPD_TEST_KEY is not set"):
            speak(tmp_path, asking(fake, key_env="OPD_TEST_KEY"))
        monkeypatch.setenv("OPD_TEST_KEY", "secret")
        speak(tmp_path, asking(fake, key_env="OPD_TEST_KEY"))
    assert {call.key for call in fake.calls} == {"Bearer secret"}
    assert not any("secret" in p.read_text() for p in tmp_path.rglob("*.json*"))


def test_clips_outside_the_limits_are_left_out(tmp_path):
    lengths = dict(zip(TEXTS, (0.1, 1.0, 4.0, 40.0), strict=True))
    with serving(FakeOpenAI(lambda call: Reply(tone(lengths[call.body["input"]])))) as fake:
        summary, records = speak(tmp_path, asking(fake) | {"max_seconds": 3.0})
        assert [r["id"] for r in records] == ["q1"]
        assert dict(summary.dropped) == {"clip too short": 1, "clip too long": 2}
        # a clip that is there already is held to the limits too
        summary, _ = speak(tmp_path, asking(fake) | {"max_seconds": 5.0}, "looser")
        assert summary.written == 2
        summary, _ = speak(tmp_path, asking(fake) | {"max_seconds": 2.0}, "tighter")
        assert summary.written == 1


THERE = {"url": "http://x/v1", "model": "m"}


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"rate": [200, 150]}, r"rate: expected \[FROM, TO\] within 80 and 450, found \[200, 150\]"),
        ({"speed": [1.0, 2.0]}, "speed: is a setting of an endpoint"),
        ({"endpoint": THERE}, "voices: expected the names of voices"),
        (
            {"endpoint": THERE, "voices": ["v"], "pitch": [1, 2]},
            "pitch: is a setting of",
        ),
        ({"sample_rate": 100}, "sample_rate: .*8000"),
        ({"sampling": 1}, "unknown key sampling"),
    ],
)
def test_settings_that_make_no_sense(settings, told):
    with pytest.raises(UserError, match=told):
        stage(**settings)


def test_espeak_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"espeak-ng is not installed: pip install 'opd\[espeak\]'"):
        stage().check()


@pytest.mark.processes
class TestEspeak:
    """The built-in engine."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("espeakng_loader", reason="pip install opd[espeak]")

    @staticmethod
    def say(folder: Path, *texts: Any, **settings: Any) -> list[dict[str, Any]]:
        work = stage(**settings).begin(ClipStore(folder))
        records = [{"id": str(i), "messages": [{"role": "user", "content": t}]} for i, t in enumerate(texts)]
        return [work(r) for r in records]

    def test_a_run(self, tmp_path):
        summary, records = speak(tmp_path, {"voices": ["en-us+f2", "de+m3"]}, texts=[*TEXTS, "..."])
        assert summary.written == 4 and dict(summary.dropped) == {"nothing to say": 1}
        for record in records:
            wave = load(str(tmp_path / record["messages"][0]["content"][0]["path"]), 16000, 30)
            assert lufs(wave, 16000) == pytest.approx(-23, abs=0.2)
            assert true_peak(wave) <= 10 ** (-1 / 20) + 0.001
            assert 0.5 < record["seconds"] == pytest.approx(len(wave) / 16000, abs=0.01)

    def test_a_clip_does_not_depend_on_those_before_it(self, tmp_path):
        """The library itself says a text otherwise the second time."""
        for voice in ("en-us+m1", "en-us+whisper", "fr"):
            self.say(tmp_path / "a", *TEXTS, voices=[voice])
            self.say(tmp_path / "b", *TEXTS[::-1], voices=[voice])
        made = [{p.name: p.read_bytes() for p in (tmp_path / f).rglob("*.flac")} for f in "ab"]
        assert made[0] == made[1] and len(made[0]) == 12

    def test_rates_and_pitches_and_sample_rate(self, tmp_path):
        slow, fast = (self.say(tmp_path, TEXTS[0], voices=["en"], rate=r)[0] for r in ([90, 90], [300, 300]))
        assert slow["seconds"] > 2 * fast["seconds"]
        low, high = (self.say(tmp_path, "ah", voices=["en"], pitch=p)[0] for p in ([0, 0], [99, 99]))
        tones = [_pitch(tmp_path / r["messages"][0]["content"][0]["path"]) for r in (low, high)]
        assert tones[1] > 1.3 * tones[0]
        (wide,) = self.say(tmp_path, TEXTS[0], sample_rate=24000)
        assert soundfile.info(wide["messages"][0]["content"][0]["path"]).samplerate == 24000

    def test_the_last_question_is_spoken_and_nothing_else(self, tmp_path):
        chat = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "text", "text": " Who wrote "}, {"type": "text", "text": "Faust? "}]},
        ]
        record = stage().begin(ClipStore(tmp_path))({"id": "x", "messages": chat, "group": "books"})
        assert record["messages"][:3] == chat[:3] and record["group"] == "books"
        assert record["messages"][3]["content"][0]["transcript"] == "Who wrote Faust?"
        for content, why in (("  ", "empty"), ([{"type": "audio", "path": "x", "transcript": "y"}], "spoken already")):
            with pytest.raises(Drop, match=why):
                self.say(tmp_path, content)

    def test_voices_are_looked_up(self):
        for voice in ("nobody", "en-us+nobody", "+f2", "en-us+", "!v/f2"):
            with pytest.raises(UserError, match="espeak-ng has no voice"):
                stage(voices=["en-us+f2", voice]).check()
        stage().check()
        stage(voices=["de", "cmn+f4", "en-us+whisper"]).check()

    def test_text_that_c_would_cut(self):
        with espeak.Synthesizer() as a, espeak.Synthesizer() as b:
            whole = a.say("one two three", "en", 170, 50)
            assert np.array_equal(whole.samples, b.say("one\0two\0three", "en", 170, 50).samples)


def _pitch(path: Path) -> float:
    """Hz of the strongest repetition."""
    wave, rate = soundfile.read(path)
    wave = wave[len(wave) // 4 : len(wave) // 2]
    repeats = np.correlate(wave, wave, "full")[len(wave) - 1 :]
    lags = np.arange(rate // 400, rate // 50)
    return rate / float(lags[repeats[lags].argmax()])
