"""Records and endpoints that fail, and what a stage's command says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_stages import Ask, Tone, Unready, made, questions

from opd import cli
from opd.data.command import describe
from opd.data.engine.runner import run_stage
from opd.data.engine.stage import ClipStore, Stage
from opd.data.stages import STAGES, stage_class
from opd.settings import Fatal, UserError, attempt


def test_failures_are_tried_again_alone(tmp_path: Path) -> None:
    source, log, out, ill = (
        questions(tmp_path / "in.jsonl", 60),
        tmp_path / "log",
        tmp_path / "out.jsonl",
        tmp_path / "ill",
    )
    stage = Ask(log=str(log), ill=str(ill))
    few = [f"q{i}" for i in range(10)]
    ill.write_text(json.dumps(dict.fromkeys(few, "failed")))
    summary = run_stage(stage, source, out, workers=2)
    assert (summary.written, summary.failed.total(), summary.made) == (50, 10, 50)
    assert "50 of 60 records, 10 failed (10 failed on purpose)" in str(summary)
    made(log)
    ill.write_text(json.dumps(dict.fromkeys([f"q{i}" for i in range(60)], "failed")))
    assert run_stage(stage, source, out, workers=2).failed.total() == 10  # the others are done
    ill.write_text("{}")
    assert run_stage(stage, source, out, workers=2).written == 60 and made(log) == sorted(few)


def test_too_many_failures_stop_a_run(tmp_path: Path) -> None:
    source, log, out, ill = (
        questions(tmp_path / "in.jsonl", 60),
        tmp_path / "log",
        tmp_path / "out.jsonl",
        tmp_path / "ill",
    )
    ill.write_text(json.dumps({f"q{i}": "failed" for i in range(20, 40)}))
    with pytest.raises(
        UserError, match=r"^ask: 11 of 31 records failed, the last one: failed on purpose: q30; what is"
    ):
        run_stage(Ask(log=str(log), ill=str(ill)), source, out, workers=1)
    done = made(log)
    assert len(done) >= 20 and not out.exists()
    ill.write_text("{}")
    assert run_stage(Ask(log=str(log), ill=str(ill)), source, out).written == 60
    assert sorted(done + made(log)) == sorted(f"q{i}" for i in range(60))


@pytest.mark.parametrize(("count", "stops"), [(1010, True), (1110, False)])
def test_a_hundredth_may_fail(tmp_path: Path, count: int, stops: bool) -> None:
    """The last eleven records fail: 11 of 1010 are more than a hundredth, 11 of 1110 are not."""
    source, out, ill = questions(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl", tmp_path / "ill"
    ill.write_text(json.dumps({f"q{i}": "failed" for i in range(count - 11, count)}))
    if stops:
        with pytest.raises(UserError, match="11 of 1010 records failed"):
            run_stage(Ask(ill=str(ill)), source, out, workers=1)
    else:
        assert run_stage(Ask(ill=str(ill)), source, out, workers=1).failed.total() == 11


def test_an_endpoint_that_goes_away_costs_nothing_that_is_done(tmp_path: Path) -> None:
    source, log, out, ill = (
        questions(tmp_path / "in.jsonl", 30),
        tmp_path / "log",
        tmp_path / "out.jsonl",
        tmp_path / "ill",
    )
    ill.write_text(json.dumps({f"q{i}": "down" for i in range(12, 30)}))
    with pytest.raises(UserError, match="down on purpose: q1"):
        run_stage(Ask(log=str(log), ill=str(ill)), source, out, workers=4)
    assert made(log) == sorted(f"q{i}" for i in range(12)) and not out.exists()
    ill.write_text("{}")
    assert run_stage(Ask(log=str(log), ill=str(ill)), source, out).made == 18
    assert made(log) == sorted(f"q{i}" for i in range(12, 30))


def test_processes_that_die_or_cannot_begin(tmp_path: Path) -> None:
    source, out, ill = questions(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl", tmp_path / "ill"
    ill.write_text('{"q4": "die"}')
    with pytest.raises(UserError, match="tone: a worker process died; was memory short. Try --workers 1"):
        run_stage(Tone(ill=str(ill)), source, out, workers=2)
    with pytest.raises(UserError, match="^no such voice$"):
        run_stage(Unready(), source, out, workers=1)
    ill.write_text("{}")
    assert run_stage(Tone(ill=str(ill)), source, out, workers=1).written == 6


def test_what_is_no_text_fails_alone(tmp_path: Path) -> None:
    class Odd(Ask):
        def change(self, record: dict, store: object) -> dict:
            return record | ({"answer": "\ud83d"} if record["id"] == "q1" else {})

    summary = run_stage(Odd(), questions(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl")
    assert summary.written == 2 and summary.failed == {"nonsense": 1}


def test_whatever_a_record_raises_drops_it_alone(tmp_path: Path) -> None:
    class Odd(Ask):
        def change(self, record: dict, store: object) -> dict:
            raised = {
                "q1": AttributeError("no lower\nin int"),
                "q2": OSError(36, "File name too long"),
                "q3": ValueError(),
            }
            if record["id"] in raised:
                raise raised[record["id"]]
            return record

    source, out = questions(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    summary = run_stage(Odd(), source, out)
    assert (summary.written, summary.dropped) == (2, {"not usable": 3})
    rows = [json.loads(line) for line in (tmp_path / "out.stage/dropped.jsonl").read_text().splitlines()]
    assert [(r["id"], r["reason"]) for r in rows] == [
        ("q1", "not usable: AttributeError: no lower"),
        ("q2", "not usable: OSError: [Errno 36] File name too long"),
        ("q3", "not usable: ValueError"),
    ]
    assert run_stage(Odd(), source, out).made == 0


def test_a_store_that_cannot_be_written_is_no_records_fault(tmp_path: Path) -> None:
    (tmp_path / "audio").write_text("in the way")
    with pytest.raises(Fatal, match="audio.*: Not a directory; what is done is kept"):
        attempt(ClipStore(tmp_path).put, b"x", ".wav")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "a.txt"}, "ends in .jsonl or .parquet"),
        ({"out": "in.jsonl"}, "is the manifest that is read"),
        ({"shard": (2, 2)}, "--shard 2/2: expected I/N"),
        ({"source": "none.jsonl"}, "none.jsonl: no such manifest"),
        ({"out": "in.jsonl/a.jsonl"}, "expected a folder that can be written"),
    ],
)
def test_wrong_calls(tmp_path: Path, change: dict, message: str) -> None:
    questions(tmp_path / "in.jsonl", 2)
    call: dict = {"source": "in.jsonl", "out": "out.jsonl"} | change
    call |= {"source": str(tmp_path / call["source"]), "out": tmp_path / call["out"]}
    with pytest.raises(UserError, match=message):
        run_stage(Ask(), **call)


def test_every_stage_tells_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for name in STAGES:
        assert issubclass(stage_class(name), Stage) and stage_class(name).name == name
        with pytest.raises(SystemExit, match="0"):
            cli.main(["data", name, "--help"])
        told = capsys.readouterr().out
        assert all(f"\n  {key} " in told for key in stage_class(name).model_fields)
    assert "folder_is        what the folder of a recording names (speaker|accent|group; default None)" in describe(
        "natural"
    )
    assert "(dict[str, str]; default {})" in describe("natural")
