"""What the student's server is asked for: the very distribution that the learner computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import opd.inference.client
import opd.rollout.sampler
import opd.rollout.sources
from opd.config.load import load_config
from opd.inference.client import Answer, ServerError
from opd.models.base import Family, family_of
from opd.rollout.sampler import VllmSampler
from opd.types import VIEWS, Prompt, Rollout

PART = {"type": "audio", "path": "a.wav", "transcript": "what is one plus two"}
PROMPT = Prompt("q", ({"role": "user", "content": [PART]},))
CLIPS = {"a.wav": np.zeros(16000, np.float32)}


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of("recipes/tiny/student")


def ask(
    family: Family, monkeypatch: pytest.MonkeyPatch, temperature: float, seed: int = 4, **changed: Any
) -> tuple[list[Any], Any]:
    """The requests that two jobs make, and their rollouts; `changed` goes into the answers' choices."""
    sent: list[Any] = []

    def answer(urls: list[str], requests: list[Any], *_: Any) -> list[Any]:
        sent.extend(requests)
        entries = [{"token": f"token_id:{i}", "logprob": -0.25} for i in (300, family.eos_ids[0])]
        choice = {"index": 0, "token_ids": [300, family.eos_ids[0]], "logprobs": {"content": entries}} | changed
        ids = [family.prompt_ids([{"role": "user", "content": c}], n) for c, n in ((PART, [16000]), (TEXT, []))]
        return [Answer(urls[0], {"prompt_token_ids": i + changed.get("read", []), "choices": [choice]}) for i in ids]

    PART, TEXT = [{"type": "audio"}], PROMPT.messages[0]["content"][0]["transcript"]
    monkeypatch.setattr(opd.rollout.sampler, "post_all", answer)
    config = load_config("recipes/tiny/2_xopd.yaml", [f"run.seed={seed}"])
    sampler = VllmSampler(config, family, ["http://127.0.0.1:9"])
    jobs: Any = [(PROMPT, "speech", "3/0"), (PROMPT, "text", "3/0")]
    return sent, sampler.sample(jobs, CLIPS, 1, temperature, check=False)


def test_requests_spell_out_the_distribution(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, rollouts = ask(family, monkeypatch, 0.7)
    bodies = [request.body for request in sent]
    for body in bodies:
        assert body["temperature"] == 0.7 and body["n"] == 1
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
        assert (
            body["logit_bias"] == {str(i): -100.0 for i in family.banned_ids} and family.audio_id in family.banned_ids
        )
        assert body["stop_token_ids"] == family.eos_ids and body["return_token_ids"] and body["logprobs"]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    assert [r.body["seed"] for r in ask(family, monkeypatch, 1.0)[0]] == [b["seed"] for b in bodies]
    assert not {r.body["seed"] for r in ask(family, monkeypatch, 1.0, seed=5)[0]} & {b["seed"] for b in bodies}
    speech, text = (str(body["messages"]) for body in bodies)
    assert "input_audio" in speech and "one plus two" not in speech
    assert "input_audio" not in text and "one plus two" in text
    assert [r.token_ids for r in rollouts] == [(300, family.eos_ids[0])] * 2 and not rollouts[0].truncated
    assert rollouts[0].logprobs is not None and rollouts[0].logprobs.tolist() == [-0.25, -0.25]


def test_an_answer_without_a_log_prob_for_each_token_is_refused(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServerError, match="prompt q: expected token ids with a log-prob each"):
        ask(family, monkeypatch, 1.0, token_ids=[300])


def test_an_answer_without_an_end_of_turn_is_truncated(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"token": "token_id:300", "logprob": -0.25}
    _, rollouts = ask(family, monkeypatch, 1.0, token_ids=[300], logprobs={"content": [entry]})
    assert all(r.truncated for r in rollouts)


def test_a_prompt_that_the_server_reads_otherwise_is_refused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerError, match=r"prompt q \(speech view\): .* first difference at \d+: \[7\], \[\]"):
        ask(family, monkeypatch, 1.0, read=[7])


def test_scoring_sends_ids_or_the_beginning_of_an_answer(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    word = family.tokenizer("one two.", add_special_tokens=False).input_ids
    ids = (*word, family.eos_ids[0])
    prompt = {"speech": family.prompt_ids([{"role": "user", "content": [{"type": "audio"}]}], [16000])}
    prompt["text"] = family.prompt_ids([{"role": "user", "content": PART["transcript"]}], [])
    sent: list[Any] = []
    change: list[int] = []  # ids that the server reads besides

    def answer(urls: list[str], requests: list[Any], *_: Any) -> list[Any]:
        sent.extend(requests)
        answers = []
        for view in ("speech", "text"):
            read = [*prompt[view], *ids, *(change if view == "speech" else [])]
            told = [None, *({str(y): {"logprob": -float(t)}} for t, y in enumerate(read[1:], 1))]
            content = {"prompt_logprobs": told, "prompt_token_ids": read}
            answers.append(Answer(urls[0], content if view == "speech" else {"choices": [content]}))
        return answers

    monkeypatch.setattr(opd.rollout.sampler, "post_all", answer)
    sampler = VllmSampler(load_config("recipes/tiny/2_xopd.yaml"), family, ["http://127.0.0.1:9"])
    rollouts = [Rollout(PROMPT, view, ids, None, -1, False) for view in VIEWS]
    speech, text = sampler.score(rollouts, CLIPS)
    for found, view in ((speech, "speech"), (text, "text")):
        first = len(prompt[view])
        assert found is not None and found.tolist() == [-float(t) for t in range(first, first + len(ids))]
    speech, text = sent
    assert text.path == "/v1/completions" and text.body["prompt"] == [*prompt["text"], *ids]
    assert speech.path == "/v1/chat/completions" and speech.body["continue_final_message"]
    assert not speech.body["add_generation_prompt"] and "logit_bias" not in speech.body
    end = family.tokenizer.decode(family.eos_ids[0])  # is part of what is scored
    assert speech.body["messages"][-1] == {"role": "assistant", "content": f"one two.{end}"}
    assert all(r.body["prompt_logprobs"] == 0 for r in sent)
    change.append(7)
    speech, text = sampler.score(rollouts, CLIPS)
    assert speech is None and text is not None


def test_prompt_log_probs_must_be_one_for_each_id() -> None:
    with pytest.raises(ServerError, match="teacher: expected 3 prompt log-probs, found 1"):
        opd.inference.client.given([None], [1, 2, 3], 1, "teacher")
    with pytest.raises(ServerError, match="student: expected 2 prompt log-probs, found 0"):
        opd.inference.client.given(None, [1, 2], 1, "student")
