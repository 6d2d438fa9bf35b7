"""Stage `benchmark`: public benchmarks, here small files of the Hub's schema, become manifests for `opd eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from fake_openai import tone

from opd import cli
from opd.data.engine.runner import Summary, run_stage
from opd.data.stages.benchmark import BENCHMARKS, LoadBenchmark
from opd.prompts.manifest import read_manifest
from opd.settings import UserError, validated
from opd.types import Prompt, audio_paths, render

DOMAINS = BENCHMARKS["voicebench"].parts["mmsu"].splits
WAVES = [tone(0.2 + 0.1 * i, 8000, 1) for i in range(6)]


def clip(i: int) -> dict[str, Any]:
    return {"bytes": WAVES[i], "path": f"{i}.wav"}


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table as the Hub has it: Audio columns as structs of bytes and path, with the features in the file's head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    for name in data.column_names:
        if name.endswith("audio"):
            data = data.cast_column(name, datasets.Audio(decode=False)).cast_column(name, datasets.Audio())
    data.to_parquet(path)
    return path


class Threads(LoadBenchmark):
    """Without the seconds that a process needs to start; what goes through `opd` has processes."""

    workers: ClassVar[Any] = "thread"


def load(name: str, source: Path, out: Path, **settings: Any) -> tuple[Summary, list[Prompt], list[str]]:
    stage = Threads(source=str(source), **settings)
    summary = run_stage(stage, name, out, workers=1)
    prompts, bad = read_manifest(str(out))
    assert not bad
    assert all(Path(p).is_file() for prompt in prompts for p in audio_paths(prompt))
    dropped = (out.with_suffix(".stage") / "dropped.jsonl").read_text().splitlines()
    return summary, prompts, [json.loads(line)["reason"] for line in dropped]


def read(prompt: Prompt) -> str:
    (message,) = render(prompt, "text")
    return "".join(part["text"] for part in message["content"])


def test_voicebench(tmp_path: Path) -> None:
    root = tmp_path / "voicebench"
    asked = [{"prompt": f"question {i}", "audio": clip(i)} for i in range(3)]
    parquet(root / "alpacaeval" / "test-00000-of-00002.parquet", asked[:2])
    parquet(root / "alpacaeval" / "test-00001-of-00002.parquet", asked[2:])
    summary, prompts, _ = load("voicebench", root, tmp_path / "a.jsonl", subset="alpacaeval")
    assert [(p.id, read(p), p.match, p.answer) for p in prompts] == [
        (f"alpacaeval/test/{i}", f"question {i}", "rating", None) for i in range(3)
    ]
    assert Path(audio_paths(prompts[0])[0]).read_bytes() == WAVES[0]
    assert (
        prompts[0].other == {"benchmark": "voicebench", "subset": "alpacaeval"} and prompts[0].numbers["seconds"] == 0.2
    )
    again, _, _ = load("voicebench", root, tmp_path / "a.jsonl", subset="alpacaeval")
    assert (summary.made, again.made) == (3, 0)  # nothing is made twice

    for accent, i in (("usa", 0), ("zaf", 1)):  # accents are splits
        row = {"prompt": "who wrote it", "reference": "Ann", "audio": clip(i)}
        parquet(root / "sd-qa" / f"{accent}-00000-of-00001.parquet", [row])
    _, prompts, _ = load("voicebench", root, tmp_path / "b.jsonl", subset="sd-qa", split="usa")
    assert [(p.id, p.match, p.answer, p.group) for p in prompts] == [("sd-qa/usa/0", "judge", "Ann", "usa")]
    sampling = "system: voicebench, samples: 3, temperature: 0.5, top_p: 0.95}'"
    told = LoadBenchmark(subset="sd-qa").advice("voicebench", tmp_path / "b.jsonl")
    assert f"'eval.judge={{url: …, model: …, prompt: voicebench_qa, {sampling}" in told[0]
    assert f"model: …, {sampling}" in LoadBenchmark(subset="wildvoice").advice("voicebench", tmp_path / "a.jsonl")[0]
    alone = root / "sd-qa" / "usa-00000-of-00001.parquet"
    with pytest.raises(UserError, match="is one file: say of which split it is, split= one of aus, "):
        load("voicebench", alone, tmp_path / "d.jsonl", subset="sd-qa")
    assert len(load("voicebench", alone, tmp_path / "d.jsonl", subset="sd-qa", split="usa")[1]) == 1
    with pytest.raises(UserError, match="sd-qa: expected tables .* of the split aus, found none"):
        load("voicebench", root, tmp_path / "c.jsonl", subset="sd-qa")

    rows = [
        {"id": f"{name}_7", "prompt": "p", "reference": reference, "audio": clip(i)}
        for i, (name, reference) in enumerate(
            [("navigate", "Yes"), ("hyperbaton", "(A)"), ("dyck", "x"), ("web_of_lies", "?")]
        )
    ]
    _, prompts, dropped = load(
        "voicebench", parquet(tmp_path / "bbh.parquet", rows), tmp_path / "d.jsonl", subset="bbh"
    )
    assert [(p.match, p.group, p.answer) for p in prompts] == [
        ("voicebench_bbh", "navigate", "Yes"),
        ("voicebench_bbh", "hyperbaton", "(A)"),
    ]
    assert dropped == ["unknown task: dyck_7", "answer: web_of_lies needs yes or no, found '?'"]

    told = {"instruction_id_list": ["a:b", "c:d"], "kwargs": [{"n": 3, "m": None}, {"n": None, "m": "x"}]}
    rows = [
        {"prompt": "p", "audio": clip(0), **told},
        {"prompt": "q", "audio": clip(1), **told, "kwargs": told["kwargs"][:1]},
    ]
    _, prompts, dropped = load(
        "voicebench", parquet(tmp_path / "if.parquet", rows), tmp_path / "e.jsonl", subset="ifeval"
    )
    assert [(p.match, json.loads(p.answer or "")) for p in prompts] == [
        ("ifeval", [{"id": "a:b", "kwargs": {"n": 3}}, {"id": "c:d", "kwargs": {"m": "x"}}])
    ]
    assert dropped[0].startswith("instructions: expected instruction_id_list and as many kwargs")


def test_big_bench_audio(tmp_path: Path) -> None:
    rows = [
        {"category": "navigate", "official_answer": "No", "id": i, "audio": clip(i), "transcript": text}
        for i, text in enumerate(["do you return", None])
    ]
    _, (prompt,), dropped = load("big_bench_audio", parquet(tmp_path / "b.parquet", rows), tmp_path / "m.jsonl")
    assert (prompt.id, prompt.match, prompt.answer, prompt.group) == ("0", "judge", "No", "navigate")
    assert read(prompt) == "do you return" and dropped == ["no transcript"]
    # the data set of the benchmark's own authors, a folder of clips with metadata.jsonl, has no transcripts
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "question_0.wav").write_bytes(WAVES[0])
    row = {"category": "navigate", "official_answer": "No", "file_name": "data/question_0.wav", "id": 0}
    (tmp_path / "own" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="metadata.jsonl:1: big_bench_audio needs a column transcript, found category,"):
        load("big_bench_audio", tmp_path / "own", tmp_path / "n.jsonl")
    (tmp_path / "own" / "metadata.jsonl").write_text(json.dumps(row | {"transcript": "do you return"}))
    _, (prompt,), _ = load("big_bench_audio", tmp_path / "own", tmp_path / "n.jsonl")
    assert read(prompt) == "do you return" and Path(audio_paths(prompt)[0]).read_bytes() == WAVES[0]


def test_long_clips_are_told(tmp_path: Path) -> None:
    row = {"category": "navigate", "official_answer": "No", "id": 0, "transcript": "do you return"}
    rows = [row | {"audio": clip(0)}, row | {"id": 1, "audio": {"bytes": tone(31.5, 8000, 1), "path": None}}]
    table, out = parquet(tmp_path / "b.parquet", rows), tmp_path / "m.jsonl"
    _, prompts, _ = load("big_bench_audio", table, out)
    told = LoadBenchmark().advice("big_bench_audio", out)
    assert told[0].startswith("clips up to 32 s: for a family that takes 30 s, load it with max_seconds=30")
    assert len(prompts) == 2 and "data.max_audio_seconds=32" in told[1] and "prompt: big_bench_audio}" in told[1]
    _, (short,), dropped = load("big_bench_audio", table, out, max_seconds=30)
    assert short.id == "0" and dropped[0].startswith("too long: 1: 31.5 s long, at most 30 s expected")


@pytest.mark.parametrize(
    ("name", "settings", "asked"),
    [
        ("voicebench", {"subset": "bbh"}, [("hlt-lab/voicebench", "bbh", "test")]),
        ("voicebench", {"subset": "sd-qa", "split": "usa"}, [("hlt-lab/voicebench", "sd-qa", "usa")]),
        (
            "voicebench",
            {"subset": "mmsu"},
            [("hlt-lab/voicebench", "mmsu", s) for s in DOMAINS],
        ),
        ("voicebench", {"subset": "bbh", "source": "hub:a/b:x"}, [("a/b", "bbh", "x")]),
        ("big_bench_audio", {}, [("fixie-ai/big_bench_audio", None, "train")]),
        ("mmau", {}, [("lmms-lab-audio/mmau", None, "test_mini")]),
        ("mmau", {"source": "hub:a/b", "split": "mini"}, [("a/b", None, "mini")]),
        ("audio_multichallenge", {}, [("ScaleAI/audiomc", None, "test")]),
    ],
)
def test_what_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], asked: list[tuple[str, str | None, str]]
) -> None:
    found: list[tuple[str, str | None, str]] = []
    columns = ("prompt", "reference", "id", "official_answer", "transcript", "question", "choices", "answer", "rubric")
    table = {c: ["x"] for c in (*columns, "audio", "user_turn_1_transcript")}

    def stored(path: str, part: str | None, split: str, streaming: bool) -> datasets.Dataset:
        found.append((path, part, split))
        return datasets.Dataset.from_dict(table)

    monkeypatch.setattr(datasets, "load_dataset", stored)
    rows = [row for _, row in LoadBenchmark(**settings).rows(name)]
    assert found == asked and len(rows) == len(asked)


def test_mmar_and_mmau(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "MMAR"  # as its authors' archive unpacks
    (own / "audio").mkdir(parents=True)
    (own / "audio" / "x.wav").write_bytes(WAVES[0])
    about = {"question": "Where?", "modality": "speech", "category": "Semantic Layer", "sub-category": "Content"}
    row = {"id": "x", "audio_path": "./audio/x.wav", "choices": ["At home", "A park"], "answer": "A park", **about}
    (own / "MMAR-meta.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (row, row | {"id": "y", "answer": "no"}))
    )
    _, (prompt,), dropped = load("mmar", own, tmp_path / "m.jsonl")
    assert (prompt.match, prompt.choices, prompt.answer, prompt.group) == (
        "tokens",
        ("At home", "A park"),
        "A park",
        "speech",
    )
    assert prompt.other["sub_category"] == "Content" and dropped == ["answer: 'no' is none of the choices"]
    assert read(prompt) == "(a recording)Where?\n- At home\n- A park\nAnswer with one of these options, word for word."
    (tmp_path / "private.wav").write_bytes(WAVES[1])
    stolen = [row | {"id": n, "audio_path": p} for n, p in (("a", "../private.wav"), ("b", f"{tmp_path}/private.wav"))]
    (own / "MMAR-meta.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, *stolen)))
    _, (prompt,), dropped = load("mmar", own, tmp_path / "p.jsonl")
    assert [d.partition(" lies")[0] for d in dropped] == [f"no audio: {r['audio_path']}" for r in stolen]
    # with letters, as the copy that lmms-eval reads
    lettered = {"id": "x", "choices": ["A. At home", "B. A park"], "answer": "B", "audio": clip(0), **about}
    table = parquet(tmp_path / "l.parquet", [lettered])
    _, (prompt,), _ = load("mmar", table, tmp_path / "n.jsonl", instruction="{question} {options}")
    assert (prompt.choices, prompt.answer) == (("At home", "A park"), "A park") and read(prompt).endswith("- A park")
    # MMAU's choices are written as JSON in the one copy, and its own file is one list
    row = {
        "id": "z",
        "question": "Who?",
        "choices": '["Man", "A. child"]',
        "answer": "Man",
        "task": "sound",
        "audio": clip(1),
    }
    _, (prompt,), _ = load("mmau", parquet(tmp_path / "u.parquet", [row]), tmp_path / "o.jsonl")
    assert (prompt.choices, prompt.answer, prompt.group) == (("Man", "A. child"), "Man", "sound")
    own_row = {**row, "choices": ["Man", "Woman"], "audio_id": "./MMAR/audio/x.wav"}
    del own_row["audio"]
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps([own_row]))
    argv = ["data", "benchmark", "mmau", f"source={tmp_path}/mmau-test-mini.json", "--out", str(tmp_path / "p.jsonl")]
    assert cli.main([*argv, "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert f"wrote {tmp_path}/p.jsonl: 1 of 1 records" in told
    assert (
        f"eval.retention={tmp_path}/p.jsonl eval.test= data.max_audio_seconds=30" in told
        and "in the speech view only" in told
    )


def conversation(turns: int, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"c{turns}", "axis": "VOICE_EDITING", "rubric": '["Says it.", " Is brief."]'}
    for k in range(1, 9):
        row[f"user_turn_{k}_audio"] = clip(k - 1) if k <= turns else None
        row[f"user_turn_{k}_transcript"] = f"turn {k}" if k <= turns else None
        if k < 8:
            row[f"assistant_turn_{k}_transcript"] = f"reply {k}" if k < turns else None
    return row | more


def test_audio_multichallenge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        conversation(3),
        conversation(2, rubric="say it"),
        conversation(4, assistant_turn_2_transcript=None),
        conversation(5, user_turn_5_transcript=" "),
        conversation(6, user_turn_3_audio=None, user_turn_3_transcript=None),
        conversation(1, rubric="[]"),
    ]
    table = parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    _, (prompt,), dropped = load("audio_multichallenge", tmp_path, tmp_path / "m.jsonl")
    assert (prompt.id, prompt.group, prompt.match) == ("c3", "VOICE_EDITING", "rubric")
    assert json.loads(prompt.answer or "") == ["Says it.", "Is brief."]
    assert [m["role"] for m in prompt.messages] == ["user", "assistant"] * 2 + ["user"]  # the last turn is answered
    assert [Path(p).read_bytes() for p in audio_paths(prompt)] == WAVES[:3]
    assert [m["content"] for m in render(prompt, "text")[1::2]] == ["reply 1", "reply 2"]
    assert [m["content"] for m in render(prompt, "text")[::2]] == [
        [{"type": "text", "text": f"turn {k}"}] for k in (1, 2, 3)
    ]
    heard = render(prompt, "speech")
    assert [p["type"] for m in heard[::2] for p in m["content"]] == ["audio"] * 3 and heard[1]["content"] == "reply 1"
    assert dropped[0].startswith("rubric: answer: match rubric needs a JSON list of criteria, found 'say it'")
    assert dropped[1:4] == [
        "no assistant_turn_2_transcript",
        "no user_turn_5_transcript",
        "user turns: expected turns from 1 on without a gap",
    ]
    assert dropped[4].startswith(
        "rubric: answer: match rubric needs a JSON list of criteria, each a string, found '[]'"
    )
    argv = ["data", "benchmark", "audio_multichallenge", f"source={table}", "--out", str(tmp_path / "m.jsonl")]
    assert cli.main([*argv, "--limit", "1"]) == 0
    told = capsys.readouterr().out
    assert "rollout.max_tokens=2048 'eval.judge={url: …, model: …}' --out FOLDER" in told


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("voicebank", {}, "opd data benchmark voicebank: expected one of voicebench, big_bench_audio, mmar,"),
        ("voicebench", {}, "voicebench: subset: expected alpacaeval, .*advbench, found ''"),
        ("voicebench", {"subset": "mtbench"}, "subset: expected alpacaeval, .*, found 'mtbench'"),
        ("mmar", {"subset": "sound"}, "mmar: subset: expected none, for it has no subsets, found 'sound'"),
        ("voicebench", {"subset": "sd-qa", "split": "mars"}, "split: expected one of aus, .*zaf, found 'mars'"),
        ("mmar", {"source": "nowhere"}, "source nowhere: expected hub:owner/name, a folder or a file"),
    ],
)
def test_what_is_no_benchmark(tmp_path: Path, name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        run_stage(Threads(**settings), name, tmp_path / "m.jsonl", workers=1)


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    table = parquet(tmp_path / "m.parquet", [{"prompt": "p", "audio": clip(0)}])
    with pytest.raises(
        UserError, match="m.parquet: `datasets` cannot read it: voicebench needs a column reference, found prompt"
    ):
        load("voicebench", table, tmp_path / "m.jsonl", subset="openbookqa")
    silent = parquet(tmp_path / "s.parquet", [{"prompt": "p", "reference": "B"}])
    with pytest.raises(UserError, match="voicebench needs a column audio, found prompt, reference"):
        load("voicebench", silent, tmp_path / "m.jsonl", subset="openbookqa")
    rows = [{"prompt": p, "audio": a} for p, a in (("", clip(0)), ("p", None), ("q", {"bytes": b"x", "path": None}))]
    with pytest.raises(
        UserError, match="no record is left: 0 of 3 records, 3 dropped .1 no prompt, 1 no audio, 1 bad audio"
    ):
        load("voicebench", parquet(tmp_path / "b.parquet", rows), tmp_path / "b.jsonl", subset="advbench")
    (tmp_path / "l.json").write_text("{}")
    with pytest.raises(UserError, match="l.json:1: mmau needs a column question, found"):
        load("mmau", tmp_path / "l.json", tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="instruction: expected {question} and {options}"):
        validated(LoadBenchmark, {"instruction": "{question}"}, "opd data benchmark")
