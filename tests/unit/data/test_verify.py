"""Stage `verify`: word error rates by hand, and recognisers that are well, odd, or broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI, Reply, serving, tone

from opd.data.engine.runner import Summary, run_stage
from opd.data.stages import stage_class
from opd.data.stages.verify import normalizer
from opd.settings import UserError, validated

SAID = ["What's 12 plus thirty-one?", "Name the colour of the sky, please", "Who wrote Faust and when did he write it"]


def manifest(folder: Path, said: list[str] = SAID) -> str:
    rows = []
    for i, text in enumerate(said):
        (folder / f"{i}.wav").write_bytes(tone(0.5 + i / 10, rate=16000, channels=1))
        rows.append({"id": f"v{i}", "audio": f"{i}.wav", "transcript": text})
    (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "in.jsonl")


def hearing(folder: Path, *heard: Any) -> FakeOpenAI:
    """A recogniser that knows the clips by their bytes."""
    known = {(folder / f"{i}.wav").read_bytes(): text for i, text in enumerate(heard)}
    return FakeOpenAI(lambda call: Reply({"text": known[call.body["file"]]}))


def verify(fake: FakeOpenAI, source: str, folder: Path, **settings: Any) -> tuple[Summary, list[Any]]:
    stage = validated(
        stage_class("verify"), {"asr": {"url": fake.url, "model": "whisper", "retries": 1}, **settings}, "test"
    )
    summary = run_stage(stage, source, folder / "out.jsonl")
    return summary, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_files_that_settings_name_count_by_content(tmp_path: Path) -> None:
    model, spellings = tmp_path / "whisper", tmp_path / "normalizer.json"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    spellings.write_text('{"colour": "color"}')

    def key(**settings: Any) -> str:
        return validated(stage_class("verify"), settings, "test").key({"id": "q"})

    def both() -> tuple[str, str]:
        return key(asr="openai/whisper-tiny", spellings=str(spellings)), key(asr=str(model))

    before, plain = both(), key(asr="openai/whisper-tiny")
    assert both() == before and len({*before, plain}) == 3
    spellings.write_text('{"colour": "colors"}')
    other = both()
    assert other[0] != before[0] and other[1] == before[1]
    (model / "model.safetensors").write_bytes(b"other weights")
    assert both()[1] != before[1] and both()[0] == other[0] and key(asr="openai/whisper-tiny") == plain


def test_word_error_rates(tmp_path):
    source = manifest(tmp_path)
    heard = [" what is 12 plus 31", "Name the color of a sky please.", "who wrote faust and when did he write"]
    with serving(hearing(tmp_path, *heard)) as fake:
        summary, records = verify(fake, source, tmp_path, max_wer=0.3, language="en")
        assert [r["wer"] for r in records] == [0, round(2 / 7, 4), round(1 / 9, 4)]
        assert [r["weight"] for r in records] == [1, round(5 / 7, 4), round(8 / 9, 4)]
        assert [r["heard"] for r in records] == [" ".join(t.split()) for t in heard]
        summary, records = verify(fake, source, tmp_path)
        assert [r["id"] for r in records] == ["v0"] and dict(summary.dropped) == {"misheard": 2}
        spellings = tmp_path / "normalizer.json"
        spellings.write_text('{"colour": "color"}')
        _, records = verify(fake, source, tmp_path, max_wer=0.2, spellings=str(spellings))
        assert [r["wer"] for r in records] == [0, round(1 / 7, 4), round(1 / 9, 4)]
    sent = fake.calls[0].body
    assert fake.calls[0].path == "/v1/audio/transcriptions"
    assert (sent["model"], sent["language"], sent["response_format"], sent["temperature"]) == (
        "whisper",
        "en",
        "json",
        "0.0",
    )


def test_the_limit_itself_is_allowed(tmp_path):
    twenty = " ".join(f"w{chr(97 + i)}" for i in range(20))
    source = manifest(tmp_path, [twenty, twenty])
    with serving(hearing(tmp_path, twenty[:-2], twenty[:-3] + "and more")) as fake:
        _, records = verify(fake, source, tmp_path)
    assert [(r["id"], r["wer"]) for r in records] == [("v0", 0.05)]


def test_a_twentieth_of_the_words_may_be_misheard(tmp_path):
    words = [f"w{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    source = manifest(tmp_path, [" ".join(words)] * 2)
    with serving(hearing(tmp_path, " ".join(words[:96]), " ".join(words[:94]))) as fake:
        _, records = verify(fake, source, tmp_path)
    assert [(r["id"], r["wer"]) for r in records] == [("v0", 0.04)]  # the other one is at 0.06


def test_other_scripts(tmp_path):
    source = manifest(tmp_path, ["今天天气怎么样"])
    with serving(hearing(tmp_path, "今天天汽怎么样？")) as fake:
        _, records = verify(fake, source, tmp_path, normalizer="characters", max_wer=0.2)
        assert records[0]["wer"] == round(1 / 7, 4)
        with pytest.raises(UserError, match="no record is left: .*1 misheard"):
            verify(fake, source, tmp_path, normalizer="basic", max_wer=0.2)


def test_vowel_signs_are_heard_and_compared_whatever_the_normaliser() -> None:
    for kind in ("english", "basic", "characters"):
        normalize = normalizer(kind, {})
        for said, heard in ("यह दिन है", "यह दान है"), ("இது பால்", "இது பூல்"), ("นี่ คือ ปู", "นี่ คือ ปี"), ("كَتَبَ", "كُتِبَ"):
            assert normalize(said) != normalize(heard) and len(normalize(said).split()) >= len(said.split())
        assert normalize("यह दिन, है।").split() == normalize("यह दिन है").split()
        assert normalize("fine \U0001f44d\ufe0f 1\ufe0f\u20e3").split() == normalize("fine 1").split()
        assert normalize("caf\u00e9").split() == normalize("cafe\u0301").split()
    assert normalizer("english", {})("Caf\u00e9, it's 20") == "cafe it is 20"  # as Whisper's own
    assert normalizer("characters", {})("दिन").split() == ["द", "\U000f093f", "न"]


def test_several_clips_are_one_record(tmp_path):
    manifest(tmp_path, ["one two three", "four"])
    clips = [{"type": "audio", "path": f"{i}.wav", "transcript": t} for i, t in enumerate(("aa bb cc", "dd"))]
    chat = [{"role": "user", "content": clips[:1]}, {"role": "assistant", "content": "And?"}]
    chat += [{"role": "user", "content": clips[1:]}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat[1:2]}))
    with serving(hearing(tmp_path, "aa bb cc", "ee")) as fake:
        summary, records = verify(fake, str(tmp_path / "in.jsonl"), tmp_path, max_wer=0.25)
    assert (records[0]["wer"], records[0]["heard"]) == (0.25, "aa bb cc\nee")
    assert dict(summary.dropped) == {"no audio": 1}


def test_clips_and_transcripts_that_cannot_be_judged(tmp_path):
    source = manifest(tmp_path, ["fine words", "(laughs)", "gone", "cut off"])
    (tmp_path / "2.wav").write_bytes(b"RIFF nothing")
    (tmp_path / "3.wav").write_bytes(tone(2)[:5000])
    with serving(FakeOpenAI(lambda call: Reply({"text": "fine words"}))) as fake:
        summary, records = verify(fake, source, tmp_path)
    assert [r["id"] for r in records] == ["v0"]
    assert dict(summary.dropped) == {"no words in the transcript": 1, "unusable audio": 2}


@pytest.mark.parametrize(
    "reply, reason",
    [
        (Reply({"words": []}), "no transcription"),
        (Reply({"text": None}), "no transcription"),
        (Reply(b"\x00\x01"), "nonsense"),
        (Reply({"error": {"message": "bad audio"}}, 400), "refused"),
    ],
)
def test_nonsense_fails_and_is_asked_again(tmp_path, reply, reason):
    source = manifest(tmp_path)
    fake = hearing(tmp_path, *SAID)
    fake.first.append(reply)
    with serving(fake):
        summary, records = verify(fake, source, tmp_path)
        assert dict(summary.failed) == {reason: 1} and len(records) == 2
        summary, records = verify(fake, source, tmp_path)
        assert len(fake.calls) == 4 and len(records) == 3 and summary.made == 1


def test_busy_then_down(tmp_path):
    source = manifest(tmp_path)
    fake = hearing(tmp_path, *SAID)
    fake.first += [Reply({"error": {}}, 429, {"Retry-After": "0.2"})]
    with serving(fake):
        summary, _ = verify(fake, source, tmp_path)
        assert summary.written == 3 and len(fake.calls) == 4
    with pytest.raises(UserError, match="cannot be reached"):
        verify(fake, source, tmp_path, language="de")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"asr": "no/such/folder"}, r"asr: expected \{url, model\}, a folder or OWNER/NAME on the Hub"),
        ({"asr": "./nowhere"}, "asr: expected"),
        ({"asr": {"url": "127.0.0.1:8000", "model": "m"}}, r"asr.url: expected http://HOST"),
        ({"asr": "a/b", "extra": {"x": 1}}, "extra: is a setting of an endpoint"),
        ({"asr": "a/b", "spellings": "nowhere.json"}, "spellings nowhere.json: expected a JSON file"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, told):
    with pytest.raises(UserError, match=told):
        validated(stage_class("verify"), settings, "test").check()


def test_a_model_that_hears_but_does_not_transcribe(tmp_path):
    student = Path(__file__).parents[3] / "recipes/tiny/student"
    with pytest.raises(UserError, match=f"asr {student}: (is no|cannot be loaded as a) speech recogniser"):
        run_stage(
            validated(stage_class("verify"), {"asr": str(student)}, "t"), manifest(tmp_path), tmp_path / "o.jsonl"
        )


def test_a_folder_that_holds_no_recogniser(tmp_path):
    source = manifest(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="cannot be loaded as a speech recogniser"):
        run_stage(
            validated(stage_class("verify"), {"asr": str(tmp_path / "model")}, "test"), source, tmp_path / "out.jsonl"
        )
