"""Manifests, prompts, views and clips: what is read, refused, seen and heard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opd import types
from opd.config.schema import Config
from opd.prompts import audio
from opd.prompts.clips import ClipLoader, list_bad, listed
from opd.prompts.manifest import PromptStream, parse_record, read_manifest
from opd.settings import UserError
from opd.types import Prompt, audio_paths, render, transcript

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)).astype(np.float32)


def audio_part(path: str = "a.wav", text: str = "what is one plus two") -> dict:
    return {"type": "audio", "path": path, "transcript": text}


def test_views_differ_only_in_the_audio_parts(tmp_path: Path) -> None:
    typed = {"type": "text", "text": "and"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [audio_part("a.wav", "hello "), typed, audio_part("b.wav", " bye")]},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": [audio_part("c.wav", "again")]},
    ]  # fmt: skip
    prompt = parse_record({"id": 7, "messages": messages}, tmp_path, "m:1")
    assert prompt.id == "7" and [Path(p).name for p in audio_paths(prompt)] == ["a.wav", "b.wav", "c.wav"]
    speech, text = render(prompt, "speech"), render(prompt, "text")
    assert "transcript" not in json.dumps(speech) and "hello" not in json.dumps(speech)
    assert "audio" not in json.dumps(text) and "path" not in json.dumps(text)
    assert text[1]["content"] == [{"type": "text", "text": t} for t in ("hello ", "and", " bye")]
    assert speech[0] == text[0] == messages[0] and speech[2] == text[2]
    assert transcript(prompt).splitlines() == [
        "system: Be brief.",
        "user: hello and bye",
        "assistant: hi",
        "user: again",
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"audio": "a.wav"}, "no transcript"),
        ({"audio": "a.wav", "transcript": "  "}, "no transcript"),
        (
            {"transcript": "x"},
            "no audio: expected `messages`, or `audio` with `transcript`, found transcript; `opd data natural`",
        ),
        ({"audio": "../a.wav", "transcript": "x"}, "../a.wav lies outside of"),
        ({"audio": "/etc/a.wav", "transcript": "x"}, "/etc/a.wav lies outside of"),
        ({"messages": []}, "expected a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content[0]: expected a text part"),
        ({"audio": "a.wav", "transcript": "x", "match": "fuzzy"}, "exact, regex, choice, number, tokens, judge, "),
        ({"audio": "a.wav", "transcript": "x", "answer": 5}, "answer: expected a string"),
        (
            {"audio": "a.wav", "transcript": "x", "tolerance": "few"},
            "tolerance: expected a number of 0 or more, found 'few'",
        ),
        ("text", "expected an object, found str"),
        *(
            ({"audio": "a.wav", "transcript": "x", "id": name}, f"id: expected a string or a number, found {found}")
            for name, found in (([7], "list"), ({"a": 7}, "dict"), (True, "bool"))
        ),
        ({"audio": "a.wav", "transcript": "x", "id": float("nan")}, "found float"),
    ],
)
def test_bad_records_say_why(tmp_path: Path, record: object, reason: str) -> None:
    with pytest.raises(ValueError) as e:
        parse_record(record, tmp_path, "m:1")
    assert reason in str(e.value)


def test_manifest_keeps_good_records_and_lists_bad_ones(tmp_path: Path) -> None:
    good = {"audio": "a.wav", "transcript": "x", "id": "a"}
    (tmp_path / "m.jsonl").write_text(
        "\n".join([json.dumps(good), "not json", json.dumps({**good, "id": "b"}), json.dumps(good), ""])
    )
    prompts, bad = read_manifest(str(tmp_path / "m.jsonl"))
    assert [p.id for p in prompts] == ["a", "b"] and not any(p.numbered for p in prompts)
    assert [(b["place"].rpartition(":")[2], b["reason"][:8]) for b in bad] == [("2", "not vali"), ("4", "id 'a' w")]


def test_numbers_for_ids_are_their_decimal_text(tmp_path: Path) -> None:
    good, long = {"audio": "a.wav", "transcript": "x"}, 10**400  # more than a float can hold
    rows = [{**good, "id": 7}, {**good, "id": 7.5}, {**good, "id": "7"}, {**good, "id": [7]}, {**good, "n": long}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts, bad = read_manifest(str(tmp_path / "m.jsonl"))
    assert [(p.id, p.numbered) for p in prompts[:2]] == [("7", True), ("7.5", True)] and prompts[2].numbers == {}
    assert [b["reason"] for b in bad] == [
        f"id '7' was used before, at {tmp_path}/m.jsonl:1",
        "id: expected a string or a number, found list",
    ]


def test_parquet_through_datasets(tmp_path: Path) -> None:
    import datasets

    rows = [{"audio": f"{i}.wav", "transcript": f"t{i}", "response": None} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "m.parquet")
    prompts, bad = read_manifest(str(tmp_path / "m.parquet"))
    assert [transcript(p) for p in prompts] == ["user: t0", "user: t1", "user: t2"] and not bad


def test_stream_is_a_function_of_seed_and_step() -> None:
    prompts = [Prompt(str(i), ()) for i in range(10)]
    stream = PromptStream(prompts, 4, seed=1)
    seen = [p.id for step in range(5) for p in stream.batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [str(i) for i in range(10)] and seen[:10] != seen[10:]
    late = PromptStream(prompts, 4, seed=1)
    assert [p.id for p in late.batch(4)] == seen[16:]  # without the steps before
    assert [p.id for p in PromptStream(prompts, 4, seed=2).batch(0)] != seen[:4]
    shards = [stream.shard(3, r, 2) for r in range(2)]
    assert sorted(i for s in shards for i, _ in s) == [0, 1, 2, 3]
    assert {p.id for s in shards for _, p in s} == {p.id for p in stream.batch(3)}


def test_lines_that_are_no_utf8_or_no_json_are_bad(tmp_path: Path) -> None:
    good = json.dumps({"audio": "a.wav", "transcript": "caf\u00e9"}, ensure_ascii=False)
    path = tmp_path / "m.jsonl"
    path.write_bytes(good.encode() + b"\r\n" + good.encode("latin-1") + b"\n" + good[:19].encode() + b"\n")
    prompts, bad = read_manifest(str(path))
    assert [transcript(p) for p in prompts] == ["user: caf\u00e9"]
    assert [b["reason"] for b in bad] == [
        f"not valid UTF-8 at byte {good.index(chr(233)) + 1}",
        "not valid JSON: Expecting property name enclosed in double quotes at column 19",
    ]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_rates_and_channels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([TONE, TONE], 1), 44100)
    wave = audio.load(str(path), 16000, 30)
    assert wave.dtype == np.float32 and wave.ndim == 1 and abs(len(wave) - 16000) < 1500
    middle = wave[4000:12000]
    peak = np.abs(np.fft.rfft(middle)).argmax() * 16000 / len(middle)
    assert abs(peak - 440) < 3 and abs(np.abs(middle).max() - 0.3) < 0.05


def test_base64_wav_is_exact() -> None:
    import base64
    import io

    wave = np.random.default_rng(0).normal(0, 0.1, 999).astype(np.float32)
    back, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.to_base64_wav(wave, 16000))), dtype="float32")
    assert rate == 16000 and np.array_equal(back, wave)


def test_too_long_says_how_long(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.tile(TONE, 3), 44100)
    with pytest.raises(types.BadAudio, match=r"a.wav: 3.0 s long, at most 2 s expected"):
        audio.load(str(tmp_path / "a.wav"), 16000, 2)


# Of an mp3 the last frame, 26 ms, may be missing unnoticed: nothing in the file tells.
SHARES = (0.1, 0.5, 0.9)
CUT = [(suffix, share) for suffix in ("wav", "flac", "ogg", "mp3") for share in SHARES]
CUT += [(suffix, 0.999) for suffix in ("wav", "flac", "ogg")]


@pytest.mark.parametrize(("suffix", "share"), CUT)
def test_a_file_that_was_cut_off_is_bad(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, np.tile(TONE, 5), 44100)
    audio.load(str(path), 16000, 30)
    whole = path.read_bytes()
    cut = tmp_path / f"short.{suffix}"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(types.BadAudio, match=r"short\.\w+: (truncated|not readable)"):
        audio.load(str(cut), 16000, 30)


def test_bad_records_are_listed_once_and_counted_over_ranks(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path)},
            "data": {"train": "m.jsonl", "max_bad_share": 0.2},
            "student": {"path": "s"},
            "teacher": {"path": "t"},
            "train": {"steps": 1},
        }
    )
    part = {"type": "audio", "path": "/nowhere.wav", "transcript": "t"}
    prompts = [Prompt(str(i), ({"role": "user", "content": [part]},), place=f"m.jsonl:{i}") for i in range(4)]
    list_bad(config, [{"place": "m.jsonl:9", "id": "", "reason": "no transcript"}])
    loader = ClipLoader(config, 16000, records=20, bad_before=1)
    assert loader.load(prompts[0]) is None and loader.load(prompts[0]) is None
    again = ClipLoader(config, 16000, records=20, bad_before=1)  # as after a resume
    assert again.load(prompts[0]) is None and again.load(prompts[1]) is None
    lines = [json.loads(line)["place"] for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert lines == ["m.jsonl:9", "m.jsonl:0", "m.jsonl:1"] and listed(config) == set(lines)
    again.check({"m.jsonl:0", "m.jsonl:2"})  # of another rank: three in all, and the one before them
    with pytest.raises(UserError, match="5 of 20 records are bad.*m.jsonl:0: /nowhere.wav: no such audio file"):
        again.check({"m.jsonl:2", "m.jsonl:3"})


def test_whatever_a_clip_raises_makes_the_record_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"run": {"dir": str(tmp_path)}, "data": {"train": "m.jsonl", "max_bad_share": 0.5}}
    sections |= {"student": {"path": "s"}, "teacher": {"path": "t"}, "train": {"steps": 1}}
    loader = ClipLoader(Config.model_validate(sections), 16000, records=4)
    part = {"type": "audio", "path": "a.wav", "transcript": "t"}
    raised = [TypeError("no tokenizer takes it"), ValueError("frames must be specified"), OSError(36, "too long")]
    for i, error in enumerate(raised):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(audio, "load", fails)
        prompt = Prompt(str(i), ({"role": "user", "content": [part]},), place=f"m.jsonl:{i}")
        if i < 2:
            assert loader.load(prompt) is None
    assert loader.bad == {"m.jsonl:0": "TypeError: no tokenizer takes it", "m.jsonl:1": "frames must be specified"}
    with pytest.raises(UserError, match="3 of 4 records are bad"):
        loader.load(prompt)
