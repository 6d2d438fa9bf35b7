"""Stages `rewrite` and `respond`: what they ask a chat endpoint, and what they make of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_openai import Call, FakeOpenAI, Reply, said, serving, tone

from opd.data.engine.runner import Summary, run_stage
from opd.data.stages import stage_class
from opd.settings import UserError, validated

TEXTS = ["Compute 3^5 + 2.", "List 3 rivers, e.g. in the UK", "Who wrote {Faust}?"]


def texts(folder: Path) -> str:
    rows = [{"id": f"q{i}", "messages": [{"role": "user", "content": t}], "group": "g"} for i, t in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "texts.jsonl")


def run(name: str, fake: FakeOpenAI, source: str, folder: Path, **settings: Any) -> tuple[Summary, list[Any]]:
    stage = validated(
        stage_class(name), {"endpoint": {"url": fake.url, "model": "chat", "retries": 1}, **settings}, "test"
    )
    summary = run_stage(stage, source, folder / f"{name}.jsonl")
    return summary, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def aloud(call: Call) -> Reply:
    return said(f'"{call.body["messages"][0]["content"].removeprefix("Say: ").upper()} "\n')


def test_rewrite(tmp_path):
    with serving(FakeOpenAI(aloud)) as fake:
        summary, records = run(
            "rewrite", fake, texts(tmp_path), tmp_path, template="Say: {text}", temperature=0.7, extra={"min_p": 0.1}
        )
    assert summary.written == 3
    for record, text in zip(records, TEXTS, strict=True):
        assert record["messages"] == [{"role": "user", "content": text.upper()}]
        assert (record["written"], record["group"]) == (text, "g")
    assert {call.path for call in fake.calls} == {"/v1/chat/completions"}
    body = fake.calls[0].body
    assert (body["model"], body["temperature"], body["top_p"], body["max_completion_tokens"]) == ("chat", 0.7, 1.0, 512)
    assert body["min_p"] == 0.1 and "top_k" not in body
    assert len({call.body["seed"] for call in fake.calls}) == 3


def test_the_shipped_template_holds_the_question(tmp_path):
    with serving(FakeOpenAI(lambda call: said("spoken"))) as fake:
        run("rewrite", fake, texts(tmp_path), tmp_path)
    asked = {call.body["messages"][0]["content"].splitlines()[-1] for call in fake.calls}
    assert asked == set(TEXTS)
    assert all(call.body["top_k"] == 0 and call.body["repetition_penalty"] == 1.0 for call in fake.calls)


@pytest.mark.parametrize(
    "answer, kind, reason",
    [
        (said(" \n"), "failed", "empty answer"),
        (said('""'), "failed", "empty answer"),
        (said(None), "failed", "no answer"),
        (said("half a", "length"), "dropped", "rewritten too long"),
        (said("x" * (2 * 16 + 81)), "dropped", "rewritten too long"),
        (said("refused", "content_filter"), "failed", "no answer"),
        (Reply({"choices": []}), "failed", "nonsense"),
        (Reply(b"<html>"), "failed", "nonsense"),
        (Reply({"error": {"message": "too long"}}, 400), "failed", "refused"),
    ],
)
def test_answers_that_are_none(tmp_path, answer, kind, reason):
    with serving(FakeOpenAI(lambda call: answer if "3^5" in str(call.body) else said("say it"))) as fake:
        summary, records = run("rewrite", fake, texts(tmp_path), tmp_path)
        assert dict(getattr(summary, kind)) == {reason: 1}
        assert [r["id"] for r in records] == ["q1", "q2"]
        fake.answer = lambda call: said("now said")
        summary, records = run("rewrite", fake, texts(tmp_path), tmp_path)
        assert summary.made == len(records) - 2 == (kind == "failed")


def test_as_long_as_allowed(tmp_path):
    with serving(FakeOpenAI(lambda call: said("x" * (2 * 16 + 80)))) as fake:
        summary, _ = run("rewrite", fake, texts(tmp_path), tmp_path)
    assert summary.written == 3


def test_a_template_without_a_place_for_the_question():
    with pytest.raises(UserError, match=r"template: expected \{text\} in it"):
        validated(
            stage_class("rewrite"), {"endpoint": {"url": "http://x/v1", "model": "m"}, "template": "Say it."}, "test"
        )


def spoken(folder: Path) -> str:
    """Chats that end in speech: one with an instruction behind it, one of several turns, one of text alone."""
    (folder / "a.wav").write_bytes(tone(1))
    clip = {"type": "audio", "path": "a.wav", "transcript": "who wrote Faust"}
    chats = [
        [{"role": "user", "content": [clip, {"type": "text", "text": "\nrepeat"}]}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [clip]},
        ],
        [{"role": "user", "content": "Name a river."}],
    ]
    rows = [{"id": f"s{i}", "messages": chat, "voice": "anna"} for i, chat in enumerate(chats)]
    (folder / "spoken.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / "spoken.jsonl")


def test_the_teacher_reads_the_text_view(tmp_path):
    with serving(FakeOpenAI(lambda call: said(f"on {call.body['messages'][-1]['content']}"))) as fake:
        summary, records = run("respond", fake, spoken(tmp_path), tmp_path, max_tokens=64)
    assert [r["response"] for r in records] == ["on who wrote Faust\nrepeat", "on who wrote Faust", "on Name a river."]
    assert records[0]["messages"][0]["content"][0]["transcript"] == "who wrote Faust" and records[0]["voice"] == "anna"
    assert (tmp_path / records[0]["messages"][0]["content"][0]["path"]).is_file()
    chats = sorted((call.body["messages"] for call in fake.calls), key=len)
    assert chats[-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "who wrote Faust"},
    ]
    assert {(c.body["temperature"], c.body["max_completion_tokens"]) for c in fake.calls} == {(0.0, 64)}


def test_truncated_answers(tmp_path):
    with serving(FakeOpenAI(lambda call: said("and so", "length" if "river" in str(call.body) else "stop"))) as fake:
        summary, records = run("respond", fake, spoken(tmp_path), tmp_path)
        assert dict(summary.dropped) == {"answer truncated": 1} and len(records) == 2
        _, records = run("respond", fake, spoken(tmp_path), tmp_path, truncated="keep")
        assert len(records) == 3 and records[2]["response"] == "and so"


def test_chats_without_a_question_or_an_answer(tmp_path):
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    rows = [{"id": "x", "messages": chat}, {"id": "y", "messages": chat[:1]}, {"id": "z", "messages": chat[:1] * 2}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with serving(FakeOpenAI(lambda call: said(" " if len(call.body["messages"]) == 1 else "Hello."))) as fake:
        summary, records = run("respond", fake, str(tmp_path / "in.jsonl"), tmp_path)
    assert dict(summary.dropped) == {"no question": 1, "empty answer": 1} and [r["id"] for r in records] == ["z"]


def test_a_server_that_is_down_is_told_in_one_line(tmp_path):
    with serving(FakeOpenAI(aloud)) as fake:
        pass
    with pytest.raises(UserError, match=rf"^{fake.url}: cannot be reached"):
        run("respond", fake, spoken(tmp_path), tmp_path)
