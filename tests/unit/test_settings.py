"""What users write: byte-order marks, what is no stored file, what need not be there; settings are copied."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from opd.config.load import load_config
from opd.config.schema import Config
from opd.data.card.page import write_card
from opd.data.engine.runner import run_stage
from opd.data.stages.benchmark import LoadBenchmark
from opd.data.stages.natural import Natural
from opd.data.stages.prompts import Prompts
from opd.data.stages.verify import Verify
from opd.prompts import audio
from opd.prompts.manifest import read_manifest
from opd.settings import (
    Fatal,
    Section,
    UserError,
    attempt,
    override,
    plain_text,
    read_text,
    read_yaml,
    text_lines,
    validated,
)
from opd.storage.journal import digest
from opd.types import BadAudio, transcript

MARK = b"\xef\xbb\xbf"
RECORD = {"audio": "a.wav", "transcript": "caf\u00e9", "id": "x"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.jsonl", json.dumps(RECORD, ensure_ascii=False) + "\n"),
        ("m.json", json.dumps([RECORD], ensure_ascii=False)),
        ("m.csv", "audio,transcript,id\r\na.wav,caf\u00e9,x\r\n"),
    ],
)
def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path: Path, name: str, text: str) -> None:
    for mark in (b"", MARK):
        (tmp_path / name).write_bytes(mark + text.encode())
        (prompt,), bad = read_manifest(str(tmp_path / name))
        assert (prompt.id, transcript(prompt), bad) == ("x", "user: caf\u00e9", [])


def test_yaml_and_lines_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(MARK + b"run: {seed: 1}\n")
    assert read_yaml(file) == {"run": {"seed": 1}} and read_text(file) == "run: {seed: 1}\n"
    file.write_bytes(MARK + b"one\r\n \n" + b"\xff\n" + MARK + b"two")
    lines = list(text_lines(file))
    assert [(p, str(t)) for p, t in lines] == [
        (f"{file}:1", "one"),
        (f"{file}:3", "not valid UTF-8 at byte 1"),
        (f"{file}:4", "two"),  # also where files were joined
    ]
    file.write_bytes(MARK + b"what is this\n")
    run_stage(Prompts(mapping="text"), str(file.rename(file.with_suffix(".txt"))), tmp_path / "p.jsonl", workers=1)
    assert json.loads((tmp_path / "p.jsonl").read_text())["messages"][0]["content"] == "what is this"


@pytest.fixture(params=["device", "pipe", "socket", "proc", "folder", "none", "long"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A path that is no stored file, and what is said of it."""
    path = tmp_path / "x"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
            yield path, "but a socket"
        return
    other = {"device": "/dev/zero", "proc": "/proc/self/mem", "long": "n" * 300}
    said = {"device": "but a device", "pipe": "but a pipe", "folder": "but a folder", "none": "no such"}
    said |= {"proc": "makes up when it is read", "long": "File name too long"}
    yield other.get(request.param, path), said[request.param]


def test_what_is_no_stored_file_is_refused_wherever_one_is_read(no_file: tuple[Any, str], tmp_path: Path) -> None:
    path, said = str(no_file[0]), no_file[1]

    def refused(call: Any, error: type[Exception] = UserError) -> None:
        with pytest.raises(error, match=said):
            call()

    refused(lambda: read_manifest(path))
    refused(lambda: read_yaml(Path(path)))
    refused(lambda: list(text_lines(path)))
    refused(lambda: audio.load(path, 16000, 30), BadAudio)
    refused(lambda: Verify(asr="a/b", spellings=path).check())
    refused(lambda: write_card([Path(path)], tmp_path / "card"))
    assert digest(path) == path  # and does not wait for a pipe's other end


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "txt", "tsv", "tar"])
def test_stages_refuse_a_pipe_and_do_not_wait_for_it(tmp_path: Path, suffix: str) -> None:
    pipe, before = tmp_path / f"x.{suffix}", threading.active_count()
    os.mkfifo(pipe)
    stage: Any = Natural() if suffix in ("tsv", "tar") else Prompts(mapping="text")
    for run in (stage, LoadBenchmark(subset="alpacaeval", source=str(pipe))):
        source = "voicebench" if run is not stage else str(pipe)
        with pytest.raises(UserError, match=rf"x\.{suffix}: (no (manifest|text file) but a pipe|expected )"):
            run_stage(run, source, tmp_path / "out" / "m.jsonl", workers=1)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "key",
    [
        *("run.dir", "run.stage", "student.family", "teacher.path", "eval.test", "eval.retention", "data.weight"),
        *("launch.placement", "data.augment.noise.files", "eval.start", "eval.every", "teacher.kind", "eval.best"),
    ],
)
def test_empty_is_none_however_it_is_written(key: str) -> None:
    def made(*extra: str, **values: Any) -> Config:
        raw: dict[str, Any] = {"student": {"path": "s"}, "data": {"train": "t"}, "train": {"steps": 1}}
        raw["data"]["augment"] = {"noise": {"share": 0.0}}
        for item in extra:
            override(raw, item)
        return validated(Config, raw, "r.yaml")

    assert made(f"{key}=") == made(f'{key}=""') == made(f"{key}=null") == made()


def test_what_is_required_is_not_none() -> None:
    class Some(Section):
        path: str
        other: str = "kept"

    assert Some(path="").path == ""
    for raw in ({"path": None}, {"path": "x", "other": None}):
        with pytest.raises(UserError, match="should be a valid string"):
            validated(Some, raw, "s.yaml")


def test_a_changed_recipe_is_a_copy() -> None:
    config = load_config("recipes/tiny/2_xopd.yaml")
    before = config.model_dump()
    other = config.changed({"rollout.server.threads": 7, "rollout.urls": ["http://a"], "student.lora": None})
    assert (other.rollout.server.threads, other.rollout.urls, other.student.lora) == (7, ["http://a"], None)
    assert config.model_dump() == before and other.teacher is config.teacher


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\ufeffwhat is this", "what is this"),
        (" \ufeff\ufeff what\ufeff is this\u3000\n", "what\ufeff is this"),  # only at the beginning it is a mark
        ("\u0926\u093f\u0928", "\u0926\u093f\u0928"),  # a vowel sign on its letter
        ("\u2026?", "\u2026?"),
        ("\U0001f44d\ufe0f", "\U0001f44d\ufe0f"),
        ("\ud83d", "\ud83d"),  # no text, which is for others to say
        ("", ""),
        ("\ufeff", ""),
        (" \u200b\u200d\u2060\u00ad\ufeff\t", ""),
        ("\u0301\u093f", ""),
        ("\u3164\u115f\u2800\x00\u202e\U000e0041", ""),  # fillers, blank Braille, controls, tags
    ],
)
def test_a_text_has_something_to_read(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_a_record_ends_no_run_and_hides_no_fault_of_the_machine() -> None:
    def fails(e: BaseException) -> Any:
        raise e

    class OutOfMemoryError(RuntimeError):
        """As torch calls it."""

    assert attempt(int, "7") == 7
    for error, told in (
        (ValueError("one\ntwo"), "one"),
        (TypeError("not a str"), "TypeError: not a str"),
        (
            UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
            "half a surrogate pair, which is no text",
        ),
        (
            OSError(13, "Permission denied"),
            "OSError: [Errno 13] Permission denied".replace("OSError", "PermissionError"),
        ),
    ):
        found = attempt(fails, error)
        assert isinstance(found, ValueError) and str(found) == told
    for error in (Fatal("x"), MemoryError(), OSError(28, "No space"), OutOfMemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            attempt(fails, error)
