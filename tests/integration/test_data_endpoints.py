"""Stages that ask endpoints, against real vLLM: a Whisper that transcribes, the tiny teacher that answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from live import STUDENT, TEACHER, config_of, opd, serving
from safetensors.torch import load_file
from tiny_whisper import MOST_TOKENS, write_tiny_whisper

from opd.data.engine.runner import Summary, run_stage
from opd.data.stages import stage_class
from opd.models.base import family_of
from opd.processes.commands import teacher_server
from opd.processes.layout import Place
from opd.prompts.audio import load
from opd.prompts.manifest import read_manifest
from opd.settings import UserError, validated
from opd.teachers.server import ServerTeacher

ANY = 1e9  # a word error rate that nothing exceeds


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper") / "model"
    write_tiny_whisper(folder)
    return folder


@pytest.fixture(scope="module")
def whisper_url(data: Path, whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("whisper_server")
    lengths = f"rollout.server.max_model_len={MOST_TOKENS}", "rollout.max_tokens=8"
    config = config_of("2_xopd", data, folder, f"student.path={STUDENT}", *lengths)
    config = config.changed({"teacher.path": str(whisper)})
    with serving(teacher_server(config, Place.here("teacher")), folder) as url:
        yield f"{url}/v1"


def run(name: str, source: Path, out: Path, **settings: Any) -> tuple[Summary, list[dict[str, Any]]]:
    summary = run_stage(validated(stage_class(name), settings, "test"), str(source), out)
    return summary, [json.loads(line) for line in out.read_text().splitlines()]


def test_whisper_hears_the_same_served_and_here(data: Path, whisper: Path, whisper_url: str, tmp_path: Path) -> None:
    there = {"url": whisper_url, "model": "teacher"}
    source = data / "test.jsonl"
    summary, served = run("verify", source, tmp_path / "a/served.jsonl", asr=there, language="en", max_wer=ANY)
    assert summary.written == 16 and not summary.failed
    heard = [r["heard"] for r in served]
    assert len(set(heard)) > 12 and all(len(text.split()) >= 4 for text in heard)  # its ears tell clips apart
    assert all(r["wer"] >= 0.9 for r in served)  # random weights know no English
    _, here = run("verify", source, tmp_path / "a/here.jsonl", asr=str(whisper), language="en", max_wer=ANY)
    assert [r["heard"] for r in here] == heard

    # what it says it hears is what every second clip is now said to say
    for i, record in enumerate(served):
        record["messages"][0]["content"][0]["transcript"] = heard[i if i % 2 else i - 1].upper() + "!"
    (tmp_path / "a/said.jsonl").write_text("".join(json.dumps(r) + "\n" for r in served))
    command = ["data", "verify", str(tmp_path / "a/said.jsonl"), "--out", str(tmp_path / "a/kept.jsonl")]
    done = opd(*command, f"asr.url={whisper_url}", "asr.model=teacher", "language=en")
    assert done.returncode == 0, done.stderr
    assert "8 of 16 records, 8 dropped (8 misheard)" in done.stdout
    kept = [json.loads(line) for line in (tmp_path / "a/kept.jsonl").read_text().splitlines()]
    assert [r["id"] for r in kept] == [r["id"] for r in served[1::2]]
    assert all((r["wer"], r["weight"]) == (0, 1) for r in kept)


def test_a_recording_longer_than_a_window_is_heard_to_its_end(
    data: Path, whisper: Path, whisper_url: str, tmp_path: Path
) -> None:
    clips = [load(str(path), 16000, 60) for path in sorted((data / "audio").glob("test-*.wav"))]
    soundfile.write(tmp_path / "long.flac", np.tile(np.concatenate(clips), 2), 16000)
    record = {"id": "long", "audio": "long.flac", "transcript": "anything"}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    assert soundfile.info(tmp_path / "long.flac").duration > 60
    for i, asr in enumerate(({"url": whisper_url, "model": "teacher"}, str(whisper))):
        _, (made,) = run(
            "verify", tmp_path / "long.jsonl", tmp_path / f"{i}.jsonl", asr=asr, language="en", max_wer=ANY
        )
        assert len(made["heard"].split()) > MOST_TOKENS  # more than one window's words


def test_a_recogniser_with_pickled_weights_is_not_loaded(data: Path, whisper: Path, tmp_path: Path) -> None:
    shutil.copytree(whisper, tmp_path / "model")
    (weights,) = tmp_path.glob("model/*.safetensors")
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"model: expected weights as \*.safetensors, found none"):
        run("verify", data / "test.jsonl", tmp_path / "out.jsonl", asr=str(tmp_path / "model"))


def test_a_server_that_does_not_know_the_model_is_told(data: Path, whisper_url: str, tmp_path: Path) -> None:
    command = ["data", "verify", str(data / "test.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    done = opd(*command, f"asr.url={whisper_url}", "asr.model=nobody")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"opd: error: {whisper_url}: HTTP 404: ")


def test_the_teacher_answers_as_the_teacher_of_a_run(data: Path, teacher_url: str, tmp_path: Path) -> None:
    there = {"url": f"{teacher_url}/v1", "model": "teacher"}
    source = data / "retention.jsonl"  # an instruction follows each clip: parts are joined the same way
    for name, manifest in (("questions", data / "test.jsonl"), ("instructions", source)):
        summary, made = run("respond", manifest, tmp_path / f"{name}.jsonl", endpoint=there, max_tokens=48)
        prompts, _ = read_manifest(str(manifest))
        config = config_of("2_xopd", data, tmp_path, f"student.path={STUDENT}", "teacher.kind=server")
        config = config.changed({"teacher.urls": [teacher_url]})
        family = family_of(STUDENT)
        replies = ServerTeacher(config, family, torch.device("cpu")).respond(prompts, 48)
        by_id = {r["id"]: r["response"] for r in made}
        assert len(by_id) == sum(not truncated for _, truncated in replies) >= 8
        for prompt, (ids, truncated) in zip(prompts, replies, strict=True):
            if not truncated:
                assert by_id[prompt.id] == family.tokenizer.decode(ids, skip_special_tokens=True), prompt.id
    assert config.teacher.path == TEACHER


def test_answers_that_are_cut_off_are_left_out(data: Path, teacher_url: str, tmp_path: Path) -> None:
    there = {"url": f"{teacher_url}/v1", "model": "teacher"}
    settings = {"endpoint": there, "max_tokens": 3}
    _, kept = run("respond", data / "test.jsonl", tmp_path / "kept.jsonl", truncated="keep", **settings)
    assert len(kept) == 16
    done = opd(
        *("data", "respond", str(data / "test.jsonl"), "--out", str(tmp_path / "left.jsonl"), "max_tokens=3"),
        *(f"endpoint.url={there['url']}", "endpoint.model=teacher"),
    )
    assert done.returncode == 2 and "no record is left" in done.stderr and "answer truncated" in done.stderr
