"""Tables as manifests: text as it is written, Audio columns, links, and files that cannot be read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opd.data.stages.natural import Natural
from opd.data.stages.prompts import Prompts
from opd.prompts import audio
from opd.prompts.manifest import read_manifest
from opd.prompts.tables import records
from opd.settings import UserError
from opd.types import audio_paths, transcript

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)
MARK = "\ufeff"


def said(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def sound() -> bytes:
    made = io.BytesIO()
    soundfile.write(made, TONE, 16000, format="WAV")
    return made.getvalue()


@pytest.mark.parametrize(("name", "sign"), [("m.csv", ","), ("m.tsv", "\t"), ("M.CSV", ",")])
def test_tables_have_no_types(tmp_path: Path, name: str, sign: str) -> None:
    rows = [
        ("id", "audio", "transcript", "answer", "match", "tolerance", "weight", "note"),
        ("001", "0.wav", "0", "null", "", "", "0.5", "a"),
        ("002", "1.wav", f'"say ""yes""{sign} please"', "None", "", "", "nan", "b"),
        ("1e3", "2.wav", '"two\nlines"', "0123", "regex", "", "x", "c"),
        ("N/A", "3.wav", "four", "4", "number", "0.5", "", "d"),
    ]
    file = said(tmp_path / name, MARK + "\r\n".join(map(sign.join, rows)) + "\r\n\r\n")
    prompts, bad = read_manifest(str(file))
    assert not bad and [p.id for p in prompts] == ["001", "002", "1e3", "N/A"] and not any(p.numbered for p in prompts)
    texts = ["0", f'say "yes"{sign} please', "two\nlines", "four"]
    assert [transcript(p) for p in prompts] == [f"user: {t}" for t in texts]
    assert [p.answer for p in prompts] == ["null", "None", "0123", "4"]
    assert [p.tolerance for p in prompts] == [None, None, None, 0.5]
    assert [p.number("weight") for p in prompts if p.id != "002"] == [0.5, 0, 0] and prompts[3].other == {"note": "d"}
    assert [p.place.rpartition(":")[2] for p in prompts] == ["2", "3", "4", "6"]


def test_rows_of_a_table_are_bad_alone(tmp_path: Path) -> None:
    rows = [
        "audio,transcript",
        "a.wav,one",
        'b.wav,"so" he said',
        "c.wav,caf\u00e9",
        "d.wav,two,three",
        "e.wav",
        "f.wav,six",
    ]
    prompts, bad = read_manifest(str(said(tmp_path / "m.csv", "\n".join(rows), "latin-1")))
    assert [transcript(p) for p in prompts] == ["user: one", "user: six"]
    assert [(b["place"].rpartition(":")[2], b["reason"][:45]) for b in bad] == [
        ("3", "not readable as CSV: ',' expected after '\"'"),
        ("4", "not valid UTF-8"),
        ("5", "expected 2 cells, found 3"),
        ("6", "no transcript: expected `messages`, or `audio"),
    ]
    for text, found in (("a,a\n1,2\n", "the column a is there twice"), ("a\u00e9,b\n", "not valid UTF-8")):
        with pytest.raises(UserError, match=f"t.csv: .*{found}"):
            list(records(str(said(tmp_path / "t.csv", text, "latin-1"))))
    _, (one,) = read_manifest(str(said(tmp_path / "n.csv", "file,sentence\na.wav,x\n")))
    assert "found file, sentence; `opd data natural` reads tables by columns.audio=NAME" in one["reason"]


def test_json_is_one_list_or_lines(tmp_path: Path) -> None:
    rows = [{"audio": "a.wav", "transcript": MARK + "x", "id": "1"}, {"audio": "b.wav", "transcript": "y", "id": 2.5}]
    whole = said(tmp_path / "m.json", MARK + json.dumps(rows, indent=1))
    lines = said(tmp_path / "l.json", MARK + f"\n{MARK}".join(map(json.dumps, rows)))  # files that were joined
    for file in (whole, lines):
        prompts, bad = read_manifest(str(file))
        assert [(p.id, transcript(p)) for p in prompts] == [("1", "user: x"), ("2.5", "user: y")] and not bad
    with pytest.raises(UserError, match="m.json: not readable as JSON: "):
        read_manifest(str(said(whole, '[{"audio": ')))
    said(tmp_path / "p.parquet", "no parquet")
    with pytest.raises(UserError, match="p.parquet: `datasets` cannot read it: .+"):
        read_manifest(str(tmp_path / "p.parquet"))


def test_what_no_tokenizer_takes_is_found_when_it_is_read(tmp_path: Path) -> None:
    rows = [{"audio": "4.wav", "transcript": "half \ud83d here", "id": "q4"}, {"audio": "4.wav", "transcript": MARK}]
    rows += [{"audio": "4.wav", "transcript": "whole \U0001f600"}, {"audio": "4.wav", "transcript": "\u200b\u0301"}]
    prompts, bad = read_manifest(str(said(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))))
    assert len(prompts) == 1 and (bad[0]["id"], bad[0]["reason"]) == ("q4", "half a surrogate pair, which is no text")
    assert all("the audio part has no transcript" in b["reason"] for b in bad[1:]) and len(bad) == 3


def test_audio_columns_are_files_of_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from pyarrow import parquet, table

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_dict({"audio": [{"bytes": sound(), "path": "x.wav"}], "transcript": [1]})
    data = data.cast_column("transcript", datasets.ClassLabel(names=["yes", "no"]))
    data = data.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())
    data.to_parquet(tmp_path / "m.parquet")
    ((prompt,), bad) = read_manifest(str(tmp_path / "m.parquet"))
    (kept,) = audio_paths(prompt)
    assert transcript(prompt) == "user: no" and not bad and len(audio.load(kept, 16000, 30)) == 16000
    assert (
        Path(kept).read_bytes() == sound() and Path(kept).is_relative_to(tmp_path / "cache") and kept.endswith(".wav")
    )
    before = Path(kept).stat().st_mtime_ns
    assert audio_paths(read_manifest(str(tmp_path / "m.parquet"))[0][0]) == [kept]
    assert Path(kept).stat().st_mtime_ns == before  # it is made once
    paths = [{"bytes": None, "path": p} for p in ("own.wav", "../own.wav", None)]
    parquet.write_table(table({"audio": paths, "transcript": ["x"] * 3}), tmp_path / "own.parquet")
    (own,), bad = read_manifest(str(tmp_path / "own.parquet"))
    assert audio_paths(own) == [str(tmp_path / "own.wav")]
    assert [b["reason"].rpartition(": ")[2] for b in bad] == [
        f"../own.wav lies outside of {tmp_path}",
        "expected a recording's path or bytes, found 'None'",
    ]
    (tmp_path / "cache" / "opd_clips").rename(tmp_path / "away")
    said(tmp_path / "cache" / "opd_clips", "in the way")
    with pytest.raises(UserError, match="opd_clips.*HF_DATASETS_CACHE names another folder"):
        read_manifest(str(tmp_path / "m.parquet"))


def test_links_are_judged_by_where_they_are(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    (tmp_path / "elsewhere").mkdir()
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_bytes(sound())
    (tmp_path / "elsewhere" / "1.wav").write_bytes(sound())
    rows = [{"audio": f, "transcript": "x"} for f in ("0.wav", "clips/1.wav", "clips/../../1.wav", str(blobs / "abc"))]
    said(blobs / "def", "\n".join(map(json.dumps, rows)))
    for name, to in (("0.wav", "../../blobs/abc"), ("m.jsonl", "../../blobs/def"), ("clips", tmp_path / "elsewhere")):
        (snapshot / name).symlink_to(to)
    prompts, bad = read_manifest(str(snapshot / "m.jsonl"))
    assert [audio_paths(p) for p in prompts] == [[str(snapshot / "0.wav")], [str(snapshot / "clips" / "1.wav")]]
    assert all(len(audio.load(*audio_paths(p), 16000, 30)) == 16000 for p in prompts)
    assert [b["reason"].rpartition(": ")[2] for b in bad] == [
        f"{r['audio']} lies outside of {snapshot}" for r in rows[2:]
    ]


@pytest.mark.parametrize("clip", ["n" * 300 + ".wav", "UklGR" * 2000, "a\0b.wav", "é" * 200])
def test_paths_that_no_file_can_have(tmp_path: Path, clip: str) -> None:
    file = said(tmp_path / "m.jsonl", json.dumps({"audio": clip, "transcript": "x"}))
    _, ((bad),) = read_manifest(str(file))
    assert bad["reason"].endswith("no such audio file") and len(bad["reason"]) < 350 and "\0" not in bad["reason"]


@contextmanager
def shut(path: Path) -> Iterator[None]:
    """While it may not be read: for the root user as another one."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("m.jsonl", "m.json", "m.csv", "m.tsv", "m.parquet"):
        file = said(folder / name, "a\n")
        with shut(file), pytest.raises(UserError, match=f"{name}: no manifest.*: Permission denied"):
            read_manifest(str(file))
    with shut(folder), pytest.raises(UserError, match=f"{folder}: .*(Permission denied|expected a folder)"):
        Natural().rows(str(folder))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for path in (tmp_path / "loop.jsonl", f"{tmp_path}/{'n' * 300}.jsonl", f"{tmp_path}/a\0.csv"):
        with pytest.raises(UserError) as e:
            read_manifest(str(path))
        assert "no manifest" in str(e.value) and len(str(e.value)) < 250
        for stage in (Natural(), Prompts()):
            with pytest.raises(UserError):
                list(stage.rows(str(path)))
