"""Stage `natural` on recordings as people have them: cut off, from pipes and telephones, in every container."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from natural_data import noise, run
from sound_files import BY_FFMPEG, RATE, encoded, speech, wav

from opd.prompts import audio

SHORT = speech(1.2)
LONG = speech(3.0, 1)
PCM = (SHORT * 32767).astype("<i2").tobytes()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.with_suffix(".txt").write_text(f"this is {path.stem}")


def test_headers_of_pipes_and_of_what_was_cut(tmp_path: Path) -> None:
    put(tmp_path / "in/whole.wav", wav(PCM, len(PCM)))
    put(tmp_path / "in/sox_pipe.wav", wav(PCM, 0x7FFFF000, 0x7FFFF024))
    put(tmp_path / "in/int_max.wav", wav(PCM, 0x7FFFFFFF - 36, 0x7FFFFFFF))
    put(tmp_path / "in/killed.wav", wav(PCM, 0, 36))
    put(tmp_path / "in/cut_riff36.wav", wav(PCM, 2 * len(PCM), 36))
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert {r["id"]: r["seconds"] for r in rows} == dict.fromkeys(["int_max", "killed", "sox_pipe", "whole"], 1.2)
    assert [r["path"].suffix for r in rows] == [".wav", ".flac", ".wav", ".wav"]  # byte by byte what soundfile reads
    (reason,) = dropped
    assert reason.startswith("bad audio: ") and f"truncated: {2 * len(PCM)} bytes declared, {len(PCM)} found" in reason


def test_what_is_cut_is_dropped_where_it_would_be_converted(tmp_path: Path) -> None:
    for kind, suffix in (("24 bits", "wav"), ("rf64", "wav"), ("aiff", "AIF"), ("w64", "w64"), ("caf", "caf")):
        whole = encoded(kind, LONG)
        put(tmp_path / f"in/cut_{kind}.{suffix}", whole[: len(whole) // 2])
        put(tmp_path / f"in/whole_{kind}.{suffix}", whole)
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert len(rows) == len(dropped) == 5 and {r["seconds"] for r in rows} == {3.0}
    assert {r["path"].suffix for r in rows} == {".flac"} and all(": truncated" in reason for reason in dropped)


def test_telephone_and_messenger_recordings_are_heard(tmp_path: Path) -> None:
    kinds = {"gsm": "wav", "g721": "WAV", "bare mp3": "mp3", "m4a": "m4a", "webm": "webm", "amr": "AMR", "opus": "opus"}
    for kind, suffix in kinds.items():
        put(tmp_path / f"in/{kind}.{suffix}", encoded(kind, SHORT))
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert not dropped and {r["id"] for r in rows} == kinds.keys()
    assert [r["seconds"] for r in rows] == pytest.approx([1.2] * len(rows), abs=0.25)  # frames of AAC have 0.13 s
    kept = {r["id"] for r in rows if r["path"].suffix != ".flac"}
    assert kept == {"bare mp3", "opus"} and {r["path"].suffix for r in rows} == {".flac", ".mp3", ".ogg"}


def test_nothing_beside_a_transcript_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "in/a.wav", encoded("wav", SHORT))
    put(tmp_path / "in/b.xyz", b"what is this")
    (tmp_path / "in/c.srt").write_text("")
    (tmp_path / "in/README.txt").write_text("what these are")
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert [r["id"] for r in rows] == ["a"] and len(dropped) == 2
    assert "no recording beside it (.wav, .flac" in dropped[0] and dropped[0].endswith(", only b.xyz")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in (("a.M4A", encoded("m4a", SHORT)), ("a.txt", b"one"), ("b.xyz", b"x"), ("b.txt", b"two")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    _, rows, dropped = run(tmp_path / "in.tar", tmp_path / "tar.jsonl")
    assert [r["id"] for r in rows] == ["a"] and dropped[0].endswith(", only b.xyz")


def test_capitals_in_names_are_no_other_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/A.WAV").write_bytes(encoded("wav", SHORT))
    (tmp_path / "in/A.TXT").write_text("what is one")
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert [(r["id"], r["text"]) for r in rows] == [("A", "what is one")] and not dropped
    put(tmp_path / "libri/1-2-3.FLAC", encoded("flac", SHORT))
    (tmp_path / "libri/1-2.trans.txt").write_text("1-2-3 WHAT IS TWO\n")
    _, rows, dropped = run(tmp_path / "libri", tmp_path / "l.jsonl")
    assert [(r["id"], r["text"]) for r in rows] == [("1-2-3", "what is two")] and not dropped


def test_loud_floats_are_scaled_down_and_other_scales_dropped(tmp_path: Path) -> None:
    loud = np.stack([SHORT * 3, SHORT * 3], 1)
    buffer = io.BytesIO()
    soundfile.write(buffer, loud, RATE, format="WAVEX", subtype="FLOAT")
    put(tmp_path / "in/loud.wav", buffer.getvalue())
    put(tmp_path / "in/integers.wav", encoded("float", SHORT * 32768))
    _, (row,), dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    wave, _ = soundfile.read(row["path"], dtype="float32")
    assert np.abs(wave - SHORT / np.abs(SHORT).max()).max() < 1e-4
    assert len(dropped) == 1 and "expected within ±1; divide by 32768" in dropped[0]


@pytest.mark.parametrize("kind", ["wav", "mp3", "m4a"])
def test_long_recordings_give_pieces_only_if_they_are_whole(tmp_path: Path, kind: str) -> None:
    quiet = np.zeros(RATE, np.float32)
    whole = encoded(kind, np.concatenate([noise(2, 1), quiet, noise(2, 2), quiet, noise(2, 3)]))
    assert kind not in BY_FFMPEG or audio.seconds(whole) > 7
    told = "".join(
        f"00:00:0{t},000 --> 00:00:0{t + 2},000\n{word}\n\n" for t, word in ((0, "one"), (3, "two"), (6, "six"))
    )
    for name, content in (("cut", whole[: len(whole) // 2]), ("whole", whole)):
        put(tmp_path / f"in/{name}.{kind}", content)
        (tmp_path / f"in/{name}.srt").write_text(told)
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl", max_seconds=3.0)
    assert [r["id"] for r in rows] == ["whole/1", "whole/2", "whole/3"]
    assert [r["seconds"] for r in rows] == pytest.approx([2.2, 2.4, 2.2], abs=0.2)
    assert len(dropped) == 1 and "cut" in dropped[0] and "truncated" in dropped[0]
