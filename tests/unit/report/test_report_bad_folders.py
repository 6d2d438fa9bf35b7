"""Folders and files that a report cannot be made of: one error that names the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import evaluation, make_run, sample, written

from opd.cli import main
from opd.report.page import write_report
from opd.settings import UserError

pytestmark = pytest.mark.processes


def error_of(*args: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *map(str, args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opd: error: ")
    return line.removeprefix("opd: error: ")


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, file, bare = tmp_path / "missing", tmp_path / "file", tmp_path / "bare"
    file.write_text("")
    bare.mkdir()
    assert error_of(missing, capsys=capsys) == f"{missing}: expected a run folder, found nothing"
    assert error_of(file, capsys=capsys) == f"{file}: expected a run folder, found a file"
    assert error_of(bare, capsys=capsys) == f"{bare}: not a run folder (no config.yaml)"


def test_a_run_with_nothing_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = {"phase": "failed", "detail": "", "step": 0, "steps": 3, "error": "no GPU"}
    run = make_run(tmp_path / "r", [], steps=0, status=status)
    for name in ("metrics", "eval", "samples"):
        (run / f"{name}.jsonl").unlink()
    message = error_of(run, capsys=capsys)
    assert message.startswith("nothing to report yet") and f"{run}: failed after step 0 of 3: no GPU" in message
    assert not (run / "report.html").exists()


GOOD = json.dumps(evaluation("xopd", 3))
CASES = [
    ("config.yaml", "a: [1\nb: 2\n", ":2: expected YAML"),
    ("config.yaml", "- 1\n", ": expected an object, found list"),
    ("config.yaml", "", ": expected an object, found NoneType"),
    ("config.yaml", "config: {}\nversions: {}\ngit_commit: x\n", ": expected a key config.student, found none"),
    ("config.yaml", "config: 3\nversions: {}\ngit_commit: x\n", ": config: Input should be a valid dictionary"),
    ("config.yaml", b"config: {}\n# \xff\n", ":2: expected UTF-8, found byte 0xff"),
    ("status.json", "{", ":1: expected a JSON object"),
    ("status.json", "[]", ": expected an object, found list"),
    ("status.json", '{"step": 1}', ": expected a key phase, found none"),
    ("status.json", b"\xff", ":1: expected UTF-8"),
    ("eval.jsonl", f'{GOOD}\n{{"stage": \n{GOOD}\n', ":2: expected a JSON object, found"),
    ("eval.jsonl", f"{GOOD}\n\n17\n", ":3: expected an object, found int"),
    ("eval.jsonl", '{"step": 1, "stage": "base"}\n', ":1: expected a key train_seconds, found none"),
    ("eval.jsonl", GOOD.replace('"stage": "xopd", ', "") + "\n", ":1: expected a key stage, found none"),
    (
        "eval.jsonl",
        json.dumps(evaluation("x", 1, "0.5")) + "\n",
        ":1: accuracy/speech.mean: Input should be a valid numb",
    ),  # type: ignore[arg-type]
    ("eval.jsonl", json.dumps(evaluation("x", 1, retention=0.5)) + "\n", ":1: retention: "),
    ("eval.jsonl", json.dumps(evaluation("x", 1, groups={"speech": 1})) + "\n", ":1: groups.speech: "),
    ("metrics.jsonl", '{"loss": 1.0, "seconds": 1.0}\n', ":1: expected a key step, found none"),
    ("metrics.jsonl", '{"step": 1}\n', ":1: expected a key seconds, found none"),
    ("metrics.jsonl", '{"step": 1, "seconds": 1, "loss": "nan"}\n', ":1: loss: Input should be a valid number"),
    ("metrics.jsonl", b'{"step": 1, "seconds": 1}\n\xfe\xff\n', ":2: expected a JSON object, found '\\\\xfe"),
    ("samples.jsonl", json.dumps(sample(1, advantage=[0.5])) + "\n", ":1: expected an advantage per token, 2, found 1"),
    ("samples.jsonl", json.dumps(sample(1, tokens="four")) + "\n", ":1: tokens: Input should be a valid list"),
]


@pytest.mark.parametrize(("name", "content", "message"), CASES)
def test_bad_files_are_named_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes, message: str
) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0)])
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_of(run, capsys=capsys).startswith(f"{run / name}{message}")
    assert not (run / "report.html").exists()


def test_a_folder_in_place_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0)])
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert error_of(run, capsys=capsys).startswith(f"{run}/metrics.jsonl: expected a readable file")


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "samples.jsonl"])
def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0), evaluation("xopd", 3)])
    with open(run / name, "ab") as f:
        f.write('{"step": 9, "stage": "hä'.encode()[:-1])
    report, _ = written(run, out=tmp_path / "out")
    assert [s["name"] for s in report["stages"]] == ["base", "xopd"]


def test_an_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "r", [evaluation("base", 0)])
    file = tmp_path / "file"
    file.write_text("")
    taken = tmp_path / "taken"
    (taken / "report.html").mkdir(parents=True)
    for out in (file, file / "below", taken):
        message = error_of(run, "--out", out, capsys=capsys)
        assert message.startswith(f"{out}: cannot write the report there (") and message.endswith(
            "choose another --out"
        )
    assert sorted(p.name for p in taken.iterdir()) == ["report.html", "report.json"], "no file left aside"


def test_the_default_out_is_the_last_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / n, [evaluation("base", 0)]) for n in ("a", "b")]
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out == f"wrote {runs[1]}/report.json\nwrote {runs[1]}/report.html\n"
    with pytest.raises(UserError, match="expected a run folder"):
        write_report([tmp_path / "c"], tmp_path / "out")
