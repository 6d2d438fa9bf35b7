"""Running stages: interruptions at any byte, kills, full disks, shards, bad rows; one manifest."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from data_stages import Ask, Tone, made, questions

from opd.data.engine import runner
from opd.data.engine.pool import Pool
from opd.data.engine.runner import run_stage
from opd.data.engine.stage import ClipStore, content_id
from opd.prompts.manifest import read_manifest
from opd.settings import UserError
from opd.storage.journal import Journal

pytestmark = pytest.mark.processes

UNIT = Path(__file__).parents[1]


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of a manifest and its clips by path, and of anything else that lies beside them."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_relative_to(folder / "out.stage")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def command(source: str, out: Path, stage: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "data_stages", "data", stage, source, "--out", str(out), *more]


def start(args: list[str], limit: int | None = None) -> subprocess.Popen[str]:
    """A process of its own group; `limit`: bytes that a file may have, as on a disk that is full from there on."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(UNIT), str(UNIT.parents[1])])}

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job, and so its children, ignore
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(args, env=env, process_group=0, preexec_fn=prepare, **pipe)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def wait_for(log: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().split()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_cut_at_any_byte_only_the_lost_is_made_again(tmp_path: Path) -> None:
    source, out, log = questions(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl", tmp_path / "log"
    stage = Ask(log=str(log))
    run_stage(stage, source, out, workers=1)
    manifest, journal = out.read_bytes(), (tmp_path / "out.stage" / "journal-0.jsonl").read_bytes()
    assert made(log) == ["q0", "q1", "q2"]
    for cut in range(len(journal) + 1):
        out.unlink()
        (tmp_path / "out.stage" / "journal-0.jsonl").write_bytes(journal[:cut])
        run_stage(stage, source, out, workers=1)
        assert out.read_bytes() == manifest
        assert len(made(log)) == 3 - journal[:cut].count(b"\n"), cut
        after = (tmp_path / "out.stage" / "journal-0.jsonl").read_bytes()
        assert sorted(after.splitlines()) == sorted(journal.splitlines())


def test_a_journal_damaged_elsewhere_is_named(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run_stage(Ask(), source, out)
    file = tmp_path / "out.stage" / "journal-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for bad in (b"\0\0\0\n", b"[1]\n", b'{"key": []}\n', b'{"key": "k", "record": 1}\n', b"\n"):
        file.write_bytes(lines[0] + bad + lines[1])
        with pytest.raises(UserError, match=f"journal-0.jsonl: at byte {len(lines[0])}: expected a stage's result"):
            run_stage(Ask(), source, out)


def test_an_interrupted_line_is_overwritten_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.add("a", {"drop": "x", "id": None})
    end = (tmp_path / "journal-0.jsonl").stat().st_size
    os.pwrite(journal._fd, b'{"key": "b", "drop": "' + b"y" * 200 + b'"}\n', end)  # and no more: Ctrl-C in between
    journal.add("c", {"drop": "z", "id": None})
    journal.close()
    again = Journal(tmp_path, 0)
    assert "a" in again and "b" not in again and again["c"] == {"key": "c", "drop": "z", "id": None}
    again.close()


def test_killed_and_interrupted_runs_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    source, log = questions(tmp_path / "in.jsonl", 80), tmp_path / "log"
    (tmp_path / "whole").mkdir()
    run_stage(Tone(), source, tmp_path / "whole" / "out.jsonl", workers=1)
    whole = content(tmp_path / "whole")
    assert len(whole) == 81
    cut = tmp_path / "cut"
    run = command(source, cut / "out.jsonl", "tone", f"log={log}", "sleep_s=0.02", "--workers", "2")

    process = start(run)
    wait_for(log, 20)
    workers = _children(process.pid)
    process.kill()
    finish(process, -signal.SIGKILL)
    before = len(made(log))
    assert 20 <= before < 80 and not (cut / "out.jsonl").exists()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # none waits for work for ever
        assert time.monotonic() < deadline
        time.sleep(0.05)

    process = start(run)
    wait_for(log, 20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = finish(process, 130)
    assert "interrupted" in out and err == ""
    assert not (cut / "out.jsonl").exists()
    assert all(name.endswith(".flac") and data == whole[name] for name, data in content(cut).items())

    finish(start(run))
    assert content(cut) == whole
    assert not list((cut / "out.stage").glob("aside*"))
    finish(start(run))
    assert len(made(log)) <= 80 - before + 12 and content(cut) == whole  # a few were on their way, twice


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_leave_interrupts_to_their_parent(tmp_path: Path) -> None:
    pool = Pool(Tone(sleep_s=1), ClipStore(tmp_path), 1)
    before = set(multiprocessing.active_children())
    future = pool.submit({"id": "a", "messages": [{"role": "user", "content": "what"}]})
    (child,) = set(multiprocessing.active_children()) - before
    for _ in range(10):  # while it starts, and while it works
        os.kill(child.pid or 0, signal.SIGINT)
        time.sleep(0.2)
    assert future.result()[0] == "record"
    pool.end([])


def test_interrupt_does_not_wait_for_a_slow_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, log, out = questions(tmp_path / "in.jsonl", 8), tmp_path / "log", tmp_path / "out.jsonl"
    finish(start(command(source, out, "ask", f"log={log}", "--limit", "3")))
    assert made(log) == ["q0", "q1", "q2"]
    process = start(command(source, out, "ask", "sleep_s=300"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.stage/aside-0").is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # by now it has asked
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # impatient
    _, err = finish(process, 130)
    assert time.monotonic() - began < runner.GRACE_S and err == ""
    finish(start(command(source, out, "ask", f"log={log}")))
    assert made(log) == [f"q{i}" for i in range(3, 8)]


@pytest.mark.parametrize(("limit", "where"), [(1000, "audio"), (6000, "journal")])
def test_full_disk(tmp_path: Path, limit: int, where: str) -> None:
    source, log = questions(tmp_path / "in.jsonl", 30), tmp_path / "log"
    (tmp_path / "whole").mkdir()
    run_stage(Tone(seconds=0.05), source, tmp_path / "whole" / "out.jsonl", workers=1)
    full = tmp_path / "full"
    run = command(source, full / "out.jsonl", "tone", f"log={log}", "seconds=0.05", "--workers", "1")
    _, err = finish(start(run, limit), 2)
    assert err.count("\n") == 1 and "File too large; what is done is kept, the same command goes on" in err
    done = (full / "out.stage" / "journal-0.jsonl").read_bytes()
    assert done.endswith(b"\n") or not done
    assert (len(done) > 0) == (where == "journal")
    assert all(name.endswith(".flac") and soundfile.info(full / name).frames == 800 for name in content(full))
    made(log)
    finish(start(run))
    assert content(full) == content(tmp_path / "whole") and len(made(log)) == 30 - done.count(b"\n")


def test_full_disk_while_the_manifest_is_written(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 50), tmp_path / "x" / "out.jsonl"
    run_stage(Ask(), source, out)
    before = out.read_bytes()
    (tmp_path / "x" / "out.stage" / "journal-1.jsonl").write_bytes(b"")
    # everything is done: only the manifest is left to write
    _, err = finish(start(command(source, out, "ask"), len(before) - 100), 2)
    assert "File too large" in err and out.read_bytes() == before and set(content(tmp_path / "x")) == {"out.jsonl"}


def test_shards_at_once_make_the_same_manifest(tmp_path: Path) -> None:
    source, log = questions(tmp_path / "in.jsonl", 30), tmp_path / "log"
    (tmp_path / "whole").mkdir()
    run_stage(Tone(), source, tmp_path / "whole" / "out.jsonl", workers=1)
    out = tmp_path / "parts" / "out.jsonl"
    more = (f"log={log}", "--workers", "1")
    running = [start(command(source, out, "tone", *more, "--shard", f"{i}/3")) for i in range(3)]
    told = [finish(process)[0] for process in running]
    assert any("wrote" in t for t in told)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert made(log) == sorted(f"q{i}" for i in range(30))


def test_a_shard_sees_what_others_did_while_it_ran(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl"
    early = Journal(tmp_path / "out.stage", 1)
    first = run_stage(Ask(), source, out, shard=(0, 2))
    assert (first.open, first.made, out.exists()) == (2, 2, False)
    assert str(first) == f"{out}: not written yet, 2 of 4 records are left to other shards"
    assert len(early._places) == 0
    early.refresh()
    assert len(early._places) == 2
    early.close()
    assert run_stage(Ask(), source, out, shard=(1, 2)).written == 4


def test_two_runs_on_one_manifest_refuse_each_other(tmp_path: Path) -> None:
    source, log, out = questions(tmp_path / "in.jsonl", 8), tmp_path / "log", tmp_path / "out.jsonl"
    first = start(command(source, out, "ask", f"log={log}", "sleep_s=4", "--workers", "4"))
    wait_for(log, 1)
    _, err = finish(start(command(source, out, "ask")), 2)
    assert "another `opd data ask` is at work there" in err and err.count("\n") == 1
    finish(first)


def test_lost_clips_are_made_again(tmp_path: Path) -> None:
    source, log, out = questions(tmp_path / "in.jsonl", 4), tmp_path / "log", tmp_path / "out.jsonl"
    stage = Tone(log=str(log))
    run_stage(stage, source, out, workers=1)
    made(log)
    before, clip = content(tmp_path), sorted((tmp_path / "audio").rglob("*.flac"))[1]
    clip.unlink()
    assert run_stage(stage, source, out, workers=1).made == 1
    made(log)
    assert content(tmp_path) == before
    prompts, bad = read_manifest(str(out))
    assert [p.id for p in prompts] == ["q0", "q1", "q2", "q3"] and not bad


def test_settings_and_back(tmp_path: Path) -> None:
    source, out = questions(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    one, other = Ask(suffix="!"), Ask(suffix="?")
    assert run_stage(one, source, out).made == 3
    first = out.read_bytes()
    assert run_stage(other, source, out).made == 3 and out.read_bytes() == first.replace(b"!", b"?")
    assert run_stage(one, source, out).made == 0 and out.read_bytes() == first
    assert run_stage(Ask(sleep_s=0.001), source, out).made == 0  # where or how fast is no matter
    questions(tmp_path / "in.jsonl", 4)
    assert run_stage(one, source, out).made == 1  # what came since


def dropped(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out.with_suffix(".stage") / "dropped.jsonl").read_text().splitlines()]


def test_bad_rows_and_repetitions_are_named(tmp_path: Path) -> None:
    def line(**fields: object) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": "a b"}], **fields}).encode()

    rows = [
        line(id="a"), b"{", line(id="a"), line(id="a", group="g"), b"[1]", b"\xff", line(id="c", messages=[]),
        b'{"id": "d", "messages": [{"role": "user", "content": "\\ud800"}]}', b'{"n": ' + b"1" * 5000 + b"}",
        b"[" * 100_000, line(), line(id=None), line(id=7), line(id="ill"),
    ]  # fmt: skip
    source, out, ill = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "ill"
    source.write_bytes(b"\n".join(rows))
    ill.write_text('{"ill": "drop"}')
    summary = run_stage(Ask(ill=str(ill)), str(source), out)
    assert [json.loads(x)["id"] for x in out.read_text().splitlines()] == ["a", content_id(json.loads(line())), "7"]
    assert [(d["record"], d["id"], d["reason"].replace(str(source), "IN")[:45]) for d in dropped(out)] == [
        (2, None, "not usable: IN:2: not valid JSON: Expecting p"),
        (3, "a", "twice in the input"),
        (4, "a", "id used before: a"),
        (5, None, "not usable: IN:5: expected an object, found l"),
        (6, None, "not usable: IN:6: not valid UTF-8 at byte 1"),
        (7, None, "not usable: IN:7: messages: expected a list o"),
        (8, None, "not usable: IN:8: half a surrogate pair, whic"),
        (9, None, "not usable: IN:9: not readable as JSON: Excee"),
        (10, None, "not usable: IN:10: not readable as JSON: maxi"),
        (12, content_id(json.loads(line())), "twice in the input"),
        (14, "ill", "drop on purpose: ill"),
    ]
    assert summary.dropped == {"not usable": 7, "twice in the input": 2, "id used before": 1, "drop on purpose": 1}
    assert str(summary).startswith(f"wrote {out}: 3 of 14 records, 11 dropped (7 not usable, 2 twice in the input")
    assert run_stage(Ask(ill=str(ill)), str(source), out).made == 0


def test_nothing_left_and_nothing_there(tmp_path: Path) -> None:
    source, out, ill = questions(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl", tmp_path / "ill"
    ill.write_text('{"q0": "drop", "q1": "drop"}')
    with pytest.raises(UserError, match=r"^ask: no record is left: 0 of 2 records, 2 dropped \(2 drop on purpose\); "):
        run_stage(Ask(ill=str(ill)), source, out)
    assert not out.exists() and [d["id"] for d in dropped(out)] == ["q0", "q1"]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: holds no record"):
        run_stage(Ask(), str(tmp_path / "empty.jsonl"), out)


def test_progress_tells_how_many_of_how_many_and_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner._Ticker, "EVERY_S", 0.0)
    now = iter(range(1000))
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(now)))  # a record a second
    source, ill = questions(tmp_path / "in.jsonl", 100), tmp_path / "ill"
    ill.write_text('{"q99": "failed"}')
    told: list[str] = []
    stage = Ask(ill=str(ill))
    run_stage(stage, source, tmp_path / "out.jsonl", workers=1, limit=80, say=told.append)
    assert told[0] == "ask: 1 of 80 records done, ETA 1:19, 1.0/s" and len(told) == 80
    assert told[-1] == "ask: 80 of 80 records done, ETA 0:00, 1.0/s"
    told.clear()
    run_stage(stage, source, tmp_path / "out.jsonl", workers=1, say=told.append)
    assert told[0].startswith("ask: 81 of 100 records done, ETA 0:19")  # 80 were there
    assert told[-1] == "ask: 100 of 100 records done, ETA 0:00, 1 failed, 1.0/s"
    told.clear()
    for shard in range(3):
        run_stage(stage, source, tmp_path / "s.jsonl", (shard, 3), workers=1, limit=10, say=told.append)
    assert [line.split(" records")[0] for line in told if "ETA 0:00" in line] == ["ask: 4 of 4", *["ask: 3 of 3"] * 2]
    told.clear()
    other = tmp_path / "in.json"  # which is not counted before it is read
    other.write_text(Path(source).read_text())
    run_stage(stage, str(other), tmp_path / "j.jsonl", workers=1, limit=20, say=told.append)
    assert told[0] == "ask: 1 records done, 1.0/s" and told[-1] == "ask: 20 of 20 records done, ETA 0:00, 1.0/s"


def test_parquet_out_and_in(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"id": f"r{i}", "messages": [system, {"role": "user", "content": f"what is {i}"}]} for i in range(1200)]
    rows[0]["wer"], rows[1100]["wer"], rows[1100]["about"] = 0, 0.25, {"voice": "f1"}  # type: ignore[assignment]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_stage(Tone(seconds=0.01), str(source), tmp_path / "a.jsonl", workers=2)
    run_stage(Tone(seconds=0.01), str(source), tmp_path / "a.parquet", workers=2)
    direct, bad = read_manifest(str(tmp_path / "a.jsonl"))
    through, bad2 = read_manifest(str(tmp_path / "a.parquet"))
    assert not bad and not bad2 and [p.messages for p in direct] == [p.messages for p in through]
    assert direct[0].messages[0] == system
    summary = run_stage(Ask(), str(_typed(through, tmp_path)), tmp_path / "b.parquet")
    assert summary.written == 1200
    # a Parquet file and the JSONL file of the same records are the same work
    first = run_stage(Ask(), str(tmp_path / "b.parquet"), tmp_path / "c.jsonl")
    questions_ = [json.loads(x) for x in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert first.made == 1200 and questions_[3]["messages"][1]["content"] == "WHAT IS 3!!"


def _typed(prompts: list, folder: Path) -> Path:
    path = folder / "typed.jsonl"
    rows = [
        {
            "id": p.id,
            "messages": [p.messages[0], {"role": "user", "content": p.messages[1]["content"][0]["transcript"]}],
        }
        for p in prompts
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_parquet_refuses_a_column_of_two_types(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "hi"}]
    rows = [{"id": "a", "messages": message, "level": 1}, {"id": "b", "messages": message, "level": "high"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=r"--out .*a.parquet: Parquet cannot hold these records \(.*name a .jsonl file"):
        run_stage(Ask(), str(source), tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists() and run_stage(Ask(), str(source), tmp_path / "a.jsonl").written == 2


def test_summary_and_exit_codes(tmp_path: Path) -> None:
    source, ill, out = questions(tmp_path / "in.jsonl", 4), tmp_path / "ill", tmp_path / "out.jsonl"
    ill.write_text('{"q1": "failed"}')
    told, _ = finish(start(command(source, out, "ask", f"ill={ill}")), 1)
    assert told == f"wrote {out}: 3 of 4 records, 1 failed (1 failed on purpose)\n"
    told, _ = finish(start(command(source, tmp_path / "b.jsonl", "ask", "--shard", "0/2")))
    assert "not written yet, 2 of 4 records are left to other shards" in told
    for args, message in (
        (("--shard", "x"), "--shard x: expected I/N"),
        (("--workers", "0"), "--workers: expected a number above 0, found 0"),
        (("sufix=x",), "opd data ask: unknown key sufix (did you mean suffix?)"),
    ):
        assert message in finish(start(command(source, out, "ask", *args)), 2)[1]
