"""Faults of folders as people have them: one is one dropped row, and hides no recording or transcript but itself."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from natural_data import encoded, noise, run, save

from opd.settings import UserError

DEEP = "[" * 100_000


def folder(root: Path, **files: str) -> Path:
    """Recordings and texts: `a_txt="x"` is the text a.txt beside a.wav."""
    for i, (name, text) in enumerate(files.items()):
        path = root / name.replace("_", ".")
        if not path.with_suffix(".wav").exists():
            save(path.with_suffix(".wav"), noise(1, i))
        path.write_text(text)
    return root


def told(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["id"], row["text"]) for row in rows]


def test_relative_links_to_files(tmp_path: Path) -> None:
    blob = save(tmp_path / "e/blobs/f1.wav", noise(1))
    (tmp_path / "e/s").mkdir()
    (tmp_path / "e/s/a.wav").symlink_to("../blobs/f1.wav")
    (tmp_path / "e/s/a.txt").write_text("hello")
    _, (row,), dropped = run(tmp_path / "e/s", tmp_path / "o/m.jsonl")
    assert row["path"].read_bytes() == blob.read_bytes() and not row["path"].is_symlink() and not dropped


def test_a_transcript_that_cannot_be_read_is_one_row(tmp_path: Path) -> None:
    def segments(start: str, text: str) -> str:
        return f'{{"segments": [{{"start": {start}, "end": 1, "text": {text}}}]}}'

    texts = {"a_json": DEEP, "b_json": segments("9" * 400, '"x"'), "c_json": segments("0", "null"), "e_txt": "ok"}
    source = folder(tmp_path / "in", **texts, d_json=segments("0", "[1]"))
    _, rows, dropped = run(source, tmp_path / "m.jsonl")
    assert told(rows) == [("e", "ok")] and len(dropped) == 4
    found = ("a.json: RecursionError: ", "b.json: OverflowError: ", "expected a string, found NoneType", "found list")
    assert all(why in reason for why, reason in zip(found, dropped, strict=True))


def test_what_tells_no_transcript_hides_none(tmp_path: Path) -> None:
    texts = {"a_json": '{"segments": 3}', "a_txt": "a", "b_json": "[]", "b_txt": "b", "c_srt": "", "c_txt": "c"}
    _, rows, dropped = run(folder(tmp_path / "in", **texts), tmp_path / "m.jsonl")
    assert told(rows) == [("a", "a"), ("b", "b"), ("c", "c")] and not dropped
    members = {"o.json": DEEP, "v.txt": "v", "v.json": '{"text": "", "speaker": "me"}', "w.json": "[1]", "w.txt": "w"}
    members |= {"x.json": '{"text": 5}', "x.txt": ""}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in sorted([*members, *(f"{stem}.wav" for stem in "ovwx")]):
            data = members[name].encode() if name in members else encoded(noise(1, ord(name[0])), "WAV")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, rows, dropped = run(tmp_path / "s.tar", tmp_path / "t.jsonl")
    assert [(row["text"], row.get("speaker")) for row in rows] == [("v", "me"), ("w", None)]
    assert "o.json: RecursionError" in dropped[0] and "found int" in dropped[1]


def test_bad_first_lines_of_a_manifest_are_rows(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", noise(1))
    lines = [{"audio": "a.wav"}, "audio text", ["audio"], {"audio": "a.wav", "text": "said"}]
    source = tmp_path / "m.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    _, rows, dropped = run(source, tmp_path / "o/m.jsonl")
    assert told(rows) == [("a", "said")]
    assert "no column transcript, only audio" in dropped[0]
    assert [d.partition("expected ")[2] for d in dropped[1:]] == ["an object, found str", "an object, found list"]
    assert len(run(source, tmp_path / "n/m.jsonl", columns={"audio": "audio"})[2]) == 3
    source.write_text('[1]\n{"audio": "a.wav"}\n')
    with pytest.raises(UserError, match="m.jsonl: no column transcript, only audio; say columns.transcript=NAME"):
        run(source, tmp_path / "p/m.jsonl")


def test_all_layouts_of_a_folder_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "in" / "other", a_txt="beside")
    source = source.parent
    for i, name in enumerate(("train/x", "train/z", "libri/8-1-0", "libri/8-1-1")):
        save(source / f"{name}.wav", noise(1, 9 + i))
    (source / "train/metadata.csv").write_text("file_name,text\nx.wav,listed\n")
    (source / "libri/8-1.trans.txt").write_text("8-1-0\tAFTER A TAB\n")
    (source / "same").symlink_to("train")
    _, rows, dropped = run(source, tmp_path / "m.jsonl")
    assert told(rows) == [("8-1-0", "after a tab"), ("x", "listed"), ("other/a", "beside")]
    assert dropped == ["no transcript"] * 2
    names = [json.loads(line)["id"] for line in (tmp_path / "m.stage/dropped.jsonl").read_text().splitlines()]
    assert names == ["libri/8-1-1", "train/z"]


def test_each_real_folder_is_visited_once(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a_txt="said")
    (source / "self").symlink_to(".")
    summary, rows, _ = run(source, tmp_path / "m.jsonl")
    assert told(rows) == [("a", "said")] and summary.read == 1


@pytest.mark.parametrize("sign", ["|", ";", "\t"])
def test_tables_parted_by_other_signs(tmp_path: Path, sign: str) -> None:
    save(tmp_path / "in/a.wav", noise(1))
    (tmp_path / "in/metadata.csv").write_text(f"file_name{sign}transcription\na.wav{sign}said, so\n")
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert told(rows) == [("a", "said, so")] and not dropped


def test_capitals_in_the_name_of_a_table(tmp_path: Path) -> None:
    import datasets

    rows = {"audio": [{"bytes": encoded(noise(1)), "path": None}], "text": ["said"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "X.PARQUET")
    assert [row["text"] for row in run(tmp_path / "X.PARQUET", tmp_path / "m.jsonl")[1]] == ["said"]


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> None:
        Path("/proc/1/nohome").mkdir()

    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/1/nohome/.cache/huggingface/datasets")
    with pytest.raises(UserError, match="/proc/1/nohome'; HF_HOME or HF_DATASETS_CACHE names another folder"):
        run(tmp_path / "x.parquet", tmp_path / "m.jsonl")
