"""Layouts that recordings with transcripts come in: tables of others, and what lies beside a recording."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from natural_data import RATE, noise, run, save

from opd.settings import UserError


def told(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["id"], row["text"]) for row in rows]


def test_audio_folders(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "in" / "train" / "clips" / f"{i}.wav", noise(1, i))
    head = "file_name,transcription,speaker_id\n"
    (tmp_path / "in/train/metadata.csv").write_text(
        head + 'clips/0.wav,"one, two",007\nclips/1.wav,,8\n../x.wav,no,9\n'
    )
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert told(rows) == [("clips/0", "one, two")] and rows[0]["speaker"] == "007"
    assert dropped[0] == "no transcript" and "../x.wav lies outside of" in dropped[1]
    (tmp_path / "in/train/metadata.csv").unlink()
    (tmp_path / "in/train/metadata.jsonl").write_text('{"file_name": "clips/2.wav", "text": "three"}\n')
    assert told(run(tmp_path / "in", tmp_path / "n.jsonl")[1]) == [("clips/2", "three")]


def test_ljspeech(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "in" / "wavs" / f"LJ-{i}.wav", noise(1, i))
    (tmp_path / "in/metadata.csv").write_text('LJ-0|In 1455 "so.|In fourteen fifty-five "so.\nLJ-1|only one|\nLJ-2\n')
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert told(rows) == [("LJ-0", 'In fourteen fifty-five "so.'), ("LJ-1", "only one")] and dropped == [
        "no transcript"
    ]


def test_manifests_of_nemo(tmp_path: Path) -> None:
    whole = noise(4)
    save(tmp_path / "a.wav", whole)
    lines = [
        {"audio_filepath": "a.wav", "duration": 4.0, "text": "all of it"},
        {"audio_filepath": str(tmp_path / "a.wav"), "duration": 1.5, "offset": 2.0, "text": "a part", "id": "part"},
        {"audio_filepath": "/etc/a.wav", "duration": 1.0, "text": "no"},
    ]
    source = tmp_path / "train_manifest.json"
    source.write_text("\n".join(map(json.dumps, lines)))
    _, rows, dropped = run(source, tmp_path / "out" / "m.jsonl")
    assert [(*told([r])[0], r["seconds"]) for r in rows] == [("a", "all of it", 4.0), ("part", "a part", 1.5)]
    assert "/etc/a.wav lies outside of" in dropped[0]


def test_tables_with_names_of_their_own(tmp_path: Path) -> None:
    save(tmp_path / "0.wav", noise(1))
    table = tmp_path / "t.csv"
    table.write_text("wav,said\n0.wav,0\n")
    with pytest.raises(UserError, match="t.csv: no column audio, only wav, said; say columns.audio=NAME"):
        run(table, tmp_path / "m.jsonl")
    assert told(run(table, tmp_path / "m.jsonl", columns={"audio": "wav", "transcript": "said"})[1]) == [("0", "0")]


def test_a_json_about_other_things_hides_no_transcript(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for i, name in enumerate("abcd"):
        save(source / f"{name}.wav", noise(1, i))
        (source / f"{name}.txt").write_text(f"said {name}")
    (source / "a.json").write_text('{"editor": "x", "gain": 3}')
    (source / "b.json").write_text("[1, 2")
    (source / "c.json").write_text('{"segments": [{"start": 0, "end": 1, "text": "with times"}]}')
    (source / "d.txt").unlink()
    (source / "d.json").write_text('{"editor": "x"}')
    _, rows, dropped = run(source, tmp_path / "m.jsonl")
    assert told(rows) == [("a", "said a"), ("b", "said b"), ("c", "with times")]
    assert len(dropped) == 1 and 'd.json: expected {"segments"' in dropped[0]


def test_linked_recordings_stay_where_they_are(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.wav", noise(1))
    (tmp_path / "elsewhere" / "a.txt").write_text("said")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "clips").symlink_to(tmp_path / "elsewhere")
    _, (row,), _ = run(tmp_path / "set", tmp_path / "set" / "m.jsonl")
    assert row["path"] == tmp_path / "set" / "clips" / "a.wav" and row["seconds"] == len(noise(1)) / RATE


def test_a_folder_without_transcripts_says_what_was_looked_for(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.wav", noise(1))
    (tmp_path / "in" / "b.txt").write_text("of another")
    with pytest.raises(
        UserError, match=r"in: 1 recordings .*no transcript; looked for: x.txt, .*metadata.csv.*LJSpeech"
    ):
        run(tmp_path / "in", tmp_path / "m.jsonl")
