"""`opd data run`: stages one after another, from one recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd.cli import main
from opd.data.command import settings_of
from opd.data.pipeline import Pipeline

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
SPOKEN = """
source: {source}
prompts: {{mapping: text, min_words: 2}}
speak: {{voices: [en-us, en-gb-x-rp]}}
"""


def run(recipe: Path, out: Path, *more: str) -> int:
    return main(["data", "run", str(recipe), "--out", str(out), *more])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    questions = ["what is one plus two", "who wrote this book", "name", "how far is the moon"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": q}) + "\n" for q in questions))
    path = tmp_path / "recipe.yaml"
    path.write_text(SPOKEN.format(source=tmp_path / "texts.jsonl"))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages_follow_one_another_and_go_on(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, tmp_path / "out", "--workers", "1") == 0
    told = capsys.readouterr().out
    assert told.index("1 of 2: prompts") < told.index("2 of 2: speak")
    assert f"wrote {tmp_path}/out/prompts.jsonl: 3 of 4 records, 1 dropped" in told
    spoken = records(tmp_path / "out/speak.jsonl")
    clips = [r["messages"][0]["content"][0] for r in spoken]
    assert [c["transcript"] for c in clips] == ["what is one plus two", "who wrote this book", "how far is the moon"]
    made = {c["path"]: (tmp_path / "out" / c["path"]).stat().st_mtime_ns for c in clips}
    (tmp_path / "out/speak.jsonl").unlink()
    assert run(recipe, tmp_path / "out", "--workers", "1") == 0
    assert records(tmp_path / "out/speak.jsonl") == spoken
    assert {p: (tmp_path / "out" / p).stat().st_mtime_ns for p in made} == made


def test_a_stage_can_be_left_out_and_the_source_limited(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, tmp_path / "out", "speak=", "limit=2") == 0
    assert len(records(tmp_path / "out/prompts.jsonl")) == 2
    assert not (tmp_path / "out/speak.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["speak=", "prompts="], "expected stages, such as prompts: {} and speak: {}; found none"),
        (["natural={}"], "natural: recordings are spoken already, found prompts beside it"),
        (["speak.voicez=[a]"], "unknown key speak.voicez (did you mean voices?)"),
        (["speak.voices=[xx-none]"], "speak: voices: "),
        (["verify={asr: {url: nowhere, model: m}}"], "verify: asr.url: expected http"),
        (["source=none.jsonl"], "none.jsonl"),
        (
            ['verify={asr: {url: "http://127.0.0.1:9/v1", model: m}}'],
            "verify: http://127.0.0.1:9/v1: cannot be reached",
        ),
        (["prompts.max_words=1"], "prompts: min_words: expected at most max_words (1), found 2"),
        (["prompts.min_words=9"], "prompts: no record is left: 0 of 4 records, 4 dropped (4 too short)"),
        (["--workers", "0"], "--workers: expected a number above 0, found 0"),
    ],
)
def test_mistakes_are_one_line(
    recipe: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, tmp_path / "out", *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("opd: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out/speak.jsonl").exists()


def test_every_shipped_recipe_is_one() -> None:
    found = sorted(ROOT.glob("recipes/data/*.yaml"))
    assert len(found) >= 2
    for path in found:
        for stage in settings_of(Pipeline, path, [], "opd data run").stages:
            stage.check()
