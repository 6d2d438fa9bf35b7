"""`opd eval` before and after its servers: what makes a record the same, whose folder it is, where servers go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd.evaluate import command
from opd.evaluate.command import main
from opd.evaluate.records import claim, eval_config, read_items, settings
from opd.processes.layout import Place
from opd.processes.with_servers import places
from opd.settings import UserError
from opd.storage.journal import Journal

RECIPE = """
student: {{path: {dir}/student, dtype: float32}}
teacher: {{path: {dir}/teacher}}
data: {{train: {dir}/train.jsonl}}
train: {{steps: 3, prompts_per_step: 4}}
eval: {{test: {dir}/test.jsonl, retention: {dir}/retention.jsonl, kl_limit: 2}}
"""


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def asked(i: int, **more: Any) -> dict[str, Any]:
    return {"id": f"q{i}", "audio": f"{i % 2}.wav", "transcript": f"what is {i}", "answer": "a.", **more}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2_audio"}')
        (tmp_path / name / "model.safetensors").write_text("weights")
    for i in range(2):
        (tmp_path / f"{i}.wav").write_bytes(bytes([i]) * 100)
    write(tmp_path / "test.jsonl", [asked(i, voice="ann", snr=5) for i in range(4)])
    write(tmp_path / "retention.jsonl", [asked(9)])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(dir=tmp_path))
    return str(path)


def keys(recipe: str, *overrides: str) -> dict[str, str]:
    return {i.prompt.id: i.key for i in read_items(eval_config(recipe, list(overrides), Path("out"), True))}


def test_a_record_is_the_same_until_something_it_depends_on_changes(recipe: str, tmp_path: Path) -> None:
    before = keys(recipe)
    assert len(before) == 5 and keys(recipe) == before
    # what is only tabulated or only says how it is asked changes nothing
    same = ("eval.groups=[voice]", "rollout.concurrency=3", "eval.limit=3", "rollout.urls=[http://127.0.0.1:9]")
    assert keys(recipe, *same).items() <= before.items()
    write(tmp_path / "test.jsonl", [asked(i, voice="bob") for i in range(4)])
    assert keys(recipe) == before
    # a record whose divergences are not asked for any more is another; so is one with other words, or another clip
    assert {k for k, v in keys(recipe, "eval.kl_limit=1").items() if before[k] != v} == {"q1"}
    write(tmp_path / "test.jsonl", [asked(i, transcript="what now") if i == 3 else asked(i) for i in range(4)])
    assert {k for k, v in keys(recipe).items() if before[k] != v} == {"q3"}
    (tmp_path / "1.wav").write_bytes(b"another clip")
    assert {k for k, v in keys(recipe).items() if before[k] != v} == {"q1", "q3", "q9"}
    for one in ("rollout.max_tokens=9", "run.seed=1", "eval.match=regex", "student.dtype=bfloat16"):
        assert not set(keys(recipe, one).values()) & set(keys(recipe).values()), one
    os.utime(tmp_path / "student" / "model.safetensors", (1, 1))  # other weights
    assert not set(keys(recipe).values()) & set(before.values())


def test_a_folder_is_one_evaluations(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    found = settings(eval_config(recipe, [], out, True))
    claim(out, found)
    claim(out, found)
    assert yaml.safe_load((out / "settings.yaml").read_text())["settings"] == found
    (out / "measured").mkdir()
    journal = out / "measured/journal-0.jsonl"
    journal.touch()
    claim(out, found | {"max_tokens": 7})  # which nothing was measured under
    assert yaml.safe_load((out / "settings.yaml").read_text())["settings"]["max_tokens"] == 7
    claim(out, found)
    journal.write_text("{}\n")
    with pytest.raises(
        UserError, match=r"other settings: teacher \(.*teacher -> None\), max_tokens \(512 -> 9\); name an"
    ):
        claim(out, settings(eval_config(recipe, ["rollout.max_tokens=9"], out, False)))
    (out / "settings.yaml").write_text("{")
    with pytest.raises(UserError, match="not readable as an evaluation's settings"):
        claim(out, found)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match="holds a run"):
        claim(run, found)


def test_a_group_that_names_the_rule_is_part_of_the_record(recipe: str, tmp_path: Path) -> None:
    def records(group: str, match: str, *overrides: str) -> list[str]:
        write(tmp_path / "test.jsonl", [asked(0, answer="yes", group=group, match=match)])
        items = read_items(eval_config(recipe, ["eval.retention=", *overrides], tmp_path, True))
        return [i.record for i in items]

    assert records("navigate", "voicebench_bbh") != records("web_of_lies", "voicebench_bbh")
    assert records("navigate", "exact") == records("web_of_lies", "exact")  # only tabulated
    of_all = "eval.match=voicebench_bbh"
    assert records("navigate", "exact", of_all) != records("web_of_lies", "exact", of_all)


def test_a_judge_may_move(recipe: str, tmp_path: Path) -> None:
    def config(url: str, **more: Any) -> Any:
        judge = json.dumps({"url": f"http://127.0.0.1:{url}/v1", "model": "m", **more})
        return eval_config(recipe, [f"eval.judge={judge}", "eval.match=judge"], tmp_path / "out", True)

    def known(c: Any) -> list[str]:
        return [i.key for i in read_items(c)]

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.jsonl").write_text("{}\n")
    before = known(config("8000"))
    claim(tmp_path / "out", settings(config("8000")))
    claim(tmp_path / "out", settings(config("9000")))
    assert known(config("9000")) == known(config("8000")) == before
    long = "Is it right? {question} {answer} {response} " + "Say yes or no. " * 9
    with pytest.raises(UserError, match=r"other settings: judge.prompt \(.+ -> .*Is it right.*\); name another folder"):
        claim(tmp_path / "out", settings(config("8000", prompt=long)))
    with pytest.raises(UserError, match=r"judge.system \(None -> s\), judge.top_p \(None -> 0.9\); name"):
        claim(tmp_path / "out", settings(config("8000", top_p=0.9, system="s")))
    # a folder of an older version names the judge's address: it is read, and what it measured is not measured again
    path = tmp_path / "out" / "settings.yaml"
    older = yaml.safe_load(path.read_text())
    older["settings"]["judge"] = {"url": "http://127.0.0.1:7000/v1", **older["settings"]["judge"]}
    path.write_text(yaml.safe_dump(older, sort_keys=False))
    claim(tmp_path / "out", settings(config("9000")))
    kept = known(config("7000"))
    assert kept == known(config("9000")) and not set(kept) & set(before)


def test_what_is_measured_is_tabulated_without_servers(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    items = read_items(eval_config(recipe, [], out, False))
    done = {"seconds": 1.5, "views": {}}
    answer = {"text": "a.", "right": True, "tokens": 3, "truncated": False}

    def measure(*_: Any) -> int:
        journal = Journal(out / "measured", 0)
        for i, item in enumerate(items):
            views = {"speech": answer | {"right": i % 2 == 0}} | ({"text": answer} if item.part == "test" else {})
            name = "misalignment/sampled" if i else "misalignment"  # as an older version called it
            kl = {name: {"nats": 1.0, "tokens": 4}} if item.divergences else {}
            journal.add(item.key, {"record": done | {"views": views} | kl})
        journal.close()
        return 0

    monkeypatch.setattr(command, "ask", measure)
    assert main(recipe, [], out, teacher=False) == 0
    assert "5 of 5 records to measure" in capsys.readouterr().out
    monkeypatch.setattr(command, "ask", lambda *_: pytest.fail("all is measured"))
    assert main(recipe, ["eval.groups=[snr]"], out, teacher=False) == 0
    told = capsys.readouterr().out
    assert "to measure" not in told and "by snr" in told
    found = json.loads((out / "eval.jsonl").read_text())
    assert found["accuracy/speech"]["mean"] == 0.5 and found["accuracy/text"]["mean"] == 1.0
    assert found["misalignment/sampled"] == {"mean": 0.25, "stderr": 0.0, "n": 2} and "misalignment" not in found
    assert found["retention"]["mean"] == 1.0
    lines = [json.loads(x) for x in (out / "records.jsonl").read_text().splitlines()]
    assert [x["id"] for x in lines] == ["q0", "q1", "q2", "q3", "q9"]
    assert lines[0]["fields"] == {"voice": "ann"} and lines[0]["numbers"] == {"seconds": 1.5, "snr": 5.0}
    assert "accuracy, spoken" in (out / "eval.html").read_text()


def test_without_a_teacher_the_recipe_needs_none(recipe: str, tmp_path: Path) -> None:
    assert eval_config(recipe, ["teacher.path="], tmp_path, False).teacher.kind == "local"
    with pytest.raises(UserError, match="teacher.path is required"):
        eval_config(recipe, ["teacher.path="], tmp_path, True)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["eval.test=", "eval.retention="], "nothing to evaluate"),
        (["teacher.kind=self", "teacher.path="], "found teacher.kind self; .*--no-teacher"),
        (["student.path=runs/none"], "student.path runs/none"),
        (["eval.match=number"], r"eval.test: .*test.jsonl:1: answer: match number needs .*, found 'a\.'"),
        (["eval.groups=[accent]"], "no record of eval.test has a field 'accent'; they have seconds, snr, voice"),
        (["eval.bins={pitch: [1.0]}"], "no record of eval.test has a field 'pitch'"),
        (["eval.match=judge"], "test.jsonl:1: match judge needs eval.judge"),
        (["eval.match=judge", "eval.judge={url: nowhere, model: m}"], "eval.judge.url: expected http"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    recipe: str, tmp_path: Path, overrides: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "ask", lambda *_: pytest.fail("it started"))
    with pytest.raises(UserError, match=reason):
        main(recipe, overrides, tmp_path / "out")
    assert not (tmp_path / "out" / "settings.yaml").exists()


def test_a_missing_clip_is_named(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "0.wav").unlink()
    with pytest.raises(UserError, match=r"eval.test: .*test.jsonl:1: .*0.wav: no such audio file"):
        main(recipe, [], tmp_path / "out")


def placed(found: list[Place]) -> list[tuple[str, tuple[int, ...], float | None]]:
    return [(p.name, p.devices, p.memory) for p in found]


def test_servers_go_where_a_learner_would_be(recipe: str, tmp_path: Path) -> None:
    def of(placement: str, *more: str, teacher: bool = True) -> list[Any]:
        overrides = [f"launch.placement=recipes/placements/{placement}.yaml", "train.prompts_per_step=64", *more]
        return placed(places(eval_config(recipe, overrides, tmp_path, teacher)))

    assert placed(places(eval_config(recipe, [], tmp_path, True))) == [("student", (), None), ("teacher", (), None)]
    # a placement's own teacher servers; else the learner's devices; else half of the student's
    assert of("4gpu_1r_1t_2l") == [("student", (0,), None), ("teacher", (1,), None)]
    assert of("2gpu_1r_1l") == [("student", (0,), None), ("teacher", (1,), None)]
    shared = of("1gpu_shared")
    assert [d for _, d, _ in shared] == [(0,), (0,)] and sum(m for *_, m in shared) == pytest.approx(0.9)
    assert of("1gpu_shared", teacher=False) == [("student", (0,), 0.4)]
    assert of("1gpu_shared", "teacher.urls=[http://127.0.0.1:9]") == [("student", (0,), 0.4)]
    assert [n for n, *_ in of("2gpu_1r_1l", "rollout.urls=[http://127.0.0.1:9]")] == ["teacher"]
