"""Stage `natural`: recordings in every layout become spoken prompts; long ones are cut at silence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from natural_data import RATE, SRT, encoded, noise, run, save

from opd.data.stages.natural import Natural
from opd.settings import UserError


def test_recordings_with_transcripts_beside_them(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out" / "m.jsonl"
    first = save(source / "ann" / "a.wav", noise(1))
    save(source / "bob" / "b.flac", noise(2, 1))
    (source / "bob" / "c.mp3").write_bytes(encoded(noise(1, 2), "MP3"))
    save(source / "bob" / "long.wav", noise(5, 3))
    save(source / "bob" / "short.wav", noise(0.1, 4))
    save(source / "bob" / "mute.wav", np.zeros(RATE, np.float32))
    save(source / "untold.wav", noise(1, 5))
    save(source / "latin.wav", noise(1, 6))
    (source / "cut.wav").write_bytes(first.read_bytes()[:9000])
    (source / "none.wav").write_bytes(b"nothing")
    for name in ("ann/a", "bob/b", "bob/c", "bob/long", "bob/short", "bob/mute", "cut", "none"):
        (source / f"{name}.txt").write_text(
            f"WHAT IS\n {name[-1].upper()}?\n" if name == "ann/a" else f"What is {name}"
        )
    (source / "latin.txt").write_bytes(b"caf\xe9")
    summary, rows, dropped = run(source, out, folder_is="speaker", max_seconds=4.0)
    assert [(r["id"], r["text"], r["speaker"]) for r in rows] == [
        ("ann/a", "what is a?", "ann"),
        ("bob/b", "What is bob/b", "bob"),
        ("bob/c", "What is bob/c", "bob"),
    ]
    assert rows[0]["path"].read_bytes() == first.read_bytes() and rows[2]["path"].suffix == ".mp3"
    assert [r["seconds"] for r in rows] == [1, 2, pytest.approx(1, abs=0.1)]
    assert summary.dropped == {"too long": 1, "bad audio": 3, "too short": 1, "not usable": 1, "no transcript": 1}
    assert "its transcript has no times to cut by" in next(d for d in dropped if d.startswith("too long"))
    assert any("truncated: 16000 bytes declared, 8956 found" in d for d in dropped)
    assert any("latin.txt: not valid UTF-8 at byte 4" in d for d in dropped)
    assert run(source, out, folder_is="speaker", max_seconds=4.0)[0].made == 0
    source.rename(
        tmp_path / "moved"
    )  # the same bytes elsewhere are the same work, but for the row that names its place
    assert run(tmp_path / "moved", out, folder_is="speaker", max_seconds=4.0)[0].made == 1
    assert run(tmp_path / "moved", out, max_seconds=4.0, keep_capitals=True)[1][0]["text"] == "WHAT IS A?"


def test_librispeech(tmp_path: Path) -> None:
    chapter = tmp_path / "in" / "84" / "121123"
    save(chapter / "84-121123-0000.flac", noise(1))
    save(chapter / "84-121123-0001.flac", noise(1, 1))
    (chapter / "84-121123.trans.txt").write_text(
        "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT\n84-121123-0002 IN\n"
    )
    summary, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl")
    assert [(r["id"], r["speaker"], r["text"]) for r in rows] == [
        ("84-121123-0000", "84", "go do you hear"),
        ("84-121123-0001", "84", "but"),
    ]
    assert dropped == [f"no audio: {chapter / '84-121123-0002.flac'}"] and summary.read == 3


def test_common_voice(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "x.mp3").write_bytes(encoded(noise(1), "MP3"))
    head = "client_id\tpath\tsentence\tup_votes\taccents\n"
    table = tmp_path / "validated.tsv"
    table.write_text(head + 's1\tx.mp3\tHe said "so.\t2\tScottish English\ns2\ty.mp3\tGone\t2\t\n')
    _, rows, dropped = run(table, tmp_path / "m.jsonl")
    (row,) = rows
    assert (row["id"], row["speaker"], row["accent"], row["text"]) == ("x", "s1", "Scottish English", 'He said "so.')
    assert dropped == [f"no audio: {tmp_path / 'clips' / 'y.mp3'}"]
    with pytest.raises(UserError, match=f"holds tables of Common Voice: name one of them, such as {table}"):
        run(tmp_path, tmp_path / "f.jsonl")
    table.write_text("path\tsaid\na\tb\n")
    with pytest.raises(
        UserError, match="validated.tsv: no column transcript, only path, said; say columns.transcript="
    ):
        run(table, tmp_path / "n.jsonl")


def test_data_sets_with_an_audio_column(tmp_path: Path) -> None:
    import datasets

    rows = {
        "audio": [{"bytes": encoded(noise(1, i)), "path": f"{i}.flac"} for i in range(2)]
        + [{"bytes": encoded(noise(1, 3), "AIFF"), "path": "x.aiff"}, {"bytes": b"nothing", "path": None}],
        "sentence": ["one", None, "three", "four"],
        "speaker_id": [5, 6, 7, 8],
        "words": ["eins", "zwei", "drei", "vier"],
    }
    table = tmp_path / "in.parquet"
    data = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    data.cast_column("audio", datasets.Audio()).to_parquet(table)
    summary, found, _ = run(table, tmp_path / "m.jsonl")
    assert [(r["text"], r["speaker"], r["path"].suffix) for r in found] == [
        ("one", "5", ".flac"),
        ("three", "7", ".flac"),
    ]
    assert found[0]["path"].read_bytes() == encoded(noise(1, 0)) and len(found[0]["id"]) == 16
    assert summary.dropped == {"no transcript": 1, "bad audio": 1}
    wave, _ = soundfile.read(found[1]["path"], dtype="float32")
    assert np.abs(wave - noise(1, 3)).max() < 1e-4
    _, german, _ = run(table, tmp_path / "n.jsonl", columns={"transcript": "words"})
    assert [r["text"] for r in german] == ["eins", "zwei", "drei"]
    with pytest.raises(
        UserError, match="no column wort, only audio, sentence, speaker_id, words; say columns.transcript="
    ):
        run(table, tmp_path / "o.jsonl", columns={"transcript": "wort"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recordings that `hub:o/n` is, as it lies in the cache, and that hf://datasets/o/n@main/ leads to."""
    import datasets
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.registry import _registry as registry

    folder = tmp_path / "cache" / "o"
    load = datasets.load_dataset

    class Hub(LocalFileSystem):
        protocol = "hf"

        def __init__(self, **_: object) -> None:
            super().__init__()

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.replace("hf://datasets/o/n@main", str(folder))

        def open(self, path: str, mode: str = "rb", **more: object) -> io.BufferedReader:
            return open(path, "rb")

    monkeypatch.setitem(registry, "hf", Hub)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda of, part, split, streaming: load("audiofolder", data_dir=str(folder), split=split, streaming=streaming),
    )
    for i in range(2):
        save(folder / f"{i}.wav", noise(1, i))
    (folder / "metadata.csv").write_text("file_name,transcription,speaker\n0.wav,one,5\n1.wav,two,6\n")
    return folder


def test_an_audio_folder_of_the_hub_is_read_without_a_decoder(tmp_path: Path, hub: Path) -> None:
    _, rows, _ = run("hub:o/n", tmp_path / "out" / "m.jsonl")
    assert [(r["text"], r["speaker"]) for r in rows] == [("one", "5"), ("two", "6")]
    assert [r["path"].read_bytes() for r in rows] == [(hub / f"{i}.wav").read_bytes() for i in range(2)]


def test_recordings_are_read_from_their_place_on_the_hub_and_nowhere_else(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    secret = save(tmp_path / "secret.wav", noise(1, 7))
    paths = ["hf://datasets/o/n@main/1.wav", "hf://datasets/o/n@main/9.wav", str(secret), "http://127.0.0.1:9/1.wav"]
    paths += [f"file://{secret}", str(hub / ".." / ".." / "secret.wav")]

    def rows(**_: object) -> list[dict]:
        return [{"audio": p, "text": f"number {i}"} for i, p in enumerate(paths)]

    features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
    data = datasets.IterableDataset.from_generator(lambda: iter(rows()), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    summary, found, dropped = run("hub:o/n", tmp_path / "out" / "m.jsonl")
    assert [r["text"] for r in found] == ["number 0"] and summary.dropped == {"not usable": 5}
    assert found[0]["path"].read_bytes() == (hub / "1.wav").read_bytes()
    assert "9.wav: cannot be read" in dropped[0]
    assert all("expected the bytes of a recording or its place on the Hub, found" in d for d in dropped[1:])


def test_texts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    clip, mark = encoded(noise(1)), b"\xef\xbb\xbf"
    said = {"beside/a.txt": b"what is one", "libri/8-1.trans.txt": b"8-1-0 WHAT IS ONE\n"}
    said |= {"cv.tsv": b"path\tsentence\nclips/a.flac\twhat is one\n", "times/a.srt": SRT.encode()}
    for name, text in said.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(mark + text)
    for name in ("beside/a", "libri/8-1-0", "clips/a", "times/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.flac").write_bytes(clip)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.flac", clip), ("a.txt", mark + b"what is one")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source in ("beside", "libri", "cv.tsv", "times", "x.tar"):
        _, (row,), dropped = run(tmp_path / source, tmp_path / "out" / source / "m.jsonl")
        assert row["text"] == ("one two and a half three" if source == "times" else "what is one") and not dropped
    (tmp_path / "beside/a.txt").write_bytes(mark)
    with pytest.raises(UserError, match="1 dropped .1 no transcript"):
        run(tmp_path / "beside", tmp_path / "n.jsonl")


def test_transcripts_that_are_no_text_are_dropped(tmp_path: Path) -> None:
    import datasets

    rows = {"audio": [{"bytes": encoded(noise(1, i)), "path": None} for i in range(2)], "label": [0, 7]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "in.parquet")
    with pytest.raises(UserError, match="0 of 2 records, 2 dropped .2 transcript"):
        run(tmp_path / "in.parquet", tmp_path / "m.jsonl", columns={"transcript": "label"})


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_webdataset_shards(tmp_path: Path, name: str) -> None:
    members = {
        "x/1.flac": encoded(noise(1)), "x/1.json": b'{"text": "one", "speaker": "s"}', "x/1.cls": b"3",
        "x/2.txt": b"two", "x/2.wav": encoded(noise(1, 1), "WAV"), "3.txt": b"three",
        "4.flac": encoded(noise(1, 2)), "4.json": b"{", "5.flac": encoded(noise(1, 3)),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    shard = tmp_path / "in" / name
    with tarfile.open(shard, "w:gz" if name.endswith("gz") else "w") as tar:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source in (shard, tmp_path / "in"):
        summary, rows, dropped = run(source, tmp_path / "m.jsonl")
        assert [(r["id"], r["text"], r.get("speaker")) for r in rows] == [("x/1", "one", "s"), ("x/2", "two", None)]
        assert rows[1]["path"].read_bytes() == members["x/2.wav"]
        assert summary.dropped == {"not usable": 2, "no transcript": 1}
        assert "3: no recording" in dropped[0] and "4.json: Expecting property name" in dropped[1]
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    cuts = [0, 100, end // 2, end - 100]
    for cut in cuts + [end - end % 512 + 512] if name == "a.tar" else cuts:  # the last one is between two members
        shard.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{name}: not readable as a tar file"):
            run(shard, tmp_path / "n.jsonl")


def test_what_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: expected a folder, a table"):
        run(tmp_path / "none", tmp_path / "m.jsonl")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="in: 0 recordings .*, no transcript; looked for: x.txt, .*LJSpeech.*NeMo"):
        run(tmp_path / "in", tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="columns: unknown voice"):
        Natural(columns={"voice": "x"})


@pytest.mark.parametrize("name", ["../private.flac", "{root}/private.flac", "a/../../private.flac"])
def test_a_data_set_names_no_file_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    from pyarrow import parquet, table

    save(tmp_path / "private.flac", noise(1))
    own, named = tmp_path / "set", name.format(root=tmp_path)
    own.mkdir()
    parquet.write_table(table({"audio": [{"bytes": None, "path": named}], "sentence": ["one"]}), own / "in.parquet")
    (own / "in.tsv").write_text(f"path\tsentence\n{named}\tone\n")
    chapter = own / "libri"
    chapter.mkdir()
    (chapter / "x.trans.txt").write_text(f"{named.removesuffix('.flac')} ONE\n")
    for source in (own / "in.parquet", own / "in.tsv", chapter):
        out = tmp_path / "out" / source.name
        with pytest.raises(UserError, match="no record is left: 0 of 1 records, 1 dropped"):
            run(source, out / "m.jsonl")
        assert f"{named} lies outside of {own}" in (out / "m.stage/dropped.jsonl").read_text()
        assert not list(out.rglob("*.flac"))


def test_the_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/abc").write_bytes(encoded(noise(1)))
    (tmp_path / "snapshot/clips").mkdir(parents=True)
    (tmp_path / "snapshot/clips/x.flac").symlink_to(tmp_path / "blobs/abc")
    (tmp_path / "snapshot/in.tsv").write_text("path\tsentence\nx.flac\tone\n")
    _, rows, dropped = run(tmp_path / "snapshot/in.tsv", tmp_path / "m.jsonl")
    assert len(rows) == 1 and not dropped
