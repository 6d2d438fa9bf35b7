"""Requests to several servers: spread by outstanding tokens, only to those that hold the learner's weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_servers import FakeServer, serving

from opd.config.load import load_config
from opd.inference.client import Load, Request, Server, ServerError, post_all, together
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family, family_of
from opd.rollout.sampler import VllmSampler
from opd.teachers.server import ServerTeacher
from opd.train import loop as train
from opd.train.verdict import Verdict
from opd.types import Prompt, Rollout

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of("recipes/tiny/student")


def test_equals_take_turns_from_the_first_and_the_least_busy_comes_before_them() -> None:
    load = Load(3, first=1)
    assert [load.take(10) for _ in range(4)] == [1, 2, 0, 1]
    load.give_back(2, 10)
    assert load.tokens == [10, 20, 0]
    assert [load.take(5) for _ in range(3)] == [2, 2, 0]  # 0+5, 5+5; then 0 and 2 are equal, and 2 had its turn


def test_a_large_request_weighs_what_it_weighs_and_answers_keep_their_order() -> None:
    fakes = [FakeServer(), FakeServer()]
    for fake in fakes:
        fake.delay = 0.3  # all are outstanding together
    sizes = [90, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    requests = [Request(CHAT, {"n": i}, size) for i, size in enumerate(sizes)]
    with serving(*fakes) as urls:
        answers = post_all(urls, requests, 64, 5)
    assert [a.content["asked"]["n"] for a in answers] == list(range(10))
    assert [a.url for a in answers] == [urls[0]] + [urls[1]] * 9  # in rotation it would have been five each
    assert sum(sizes[1:]) == sizes[0]


def test_a_slow_server_is_asked_less() -> None:
    slow, quick = FakeServer(), FakeServer()
    slow.delay, quick.delay = 1.0, 0.02
    with serving(slow, quick) as urls:
        answers = post_all(urls, [Request(CHAT, {"n": i}, 10) for i in range(12)], 2, 5)
    assert [a.content["asked"]["n"] for a in answers] == list(range(12))
    assert len(slow.calls) == 1 and len(quick.calls) == 11


def test_ranks_begin_with_servers_of_their_own() -> None:
    fakes = [FakeServer(), FakeServer(), FakeServer()]
    with serving(*fakes) as urls:
        for rank in range(4):
            assert post_all(urls, [Request(CHAT, {}, 1)], 8, 5, rank)[0].url == urls[rank % 3]


def test_together_gives_results_in_order_and_the_first_failure_at_once() -> None:
    import threading

    barrier, never = threading.Barrier(3), threading.Event()
    assert together([lambda i=i: (barrier.wait(5), i)[1] for i in range(3)]) == [0, 1, 2]  # all three at once

    def fail() -> None:
        raise ServerError("this one")

    with pytest.raises(ServerError, match="this one"):
        together([never.wait, fail])
    never.set()


# ---- the student's servers ------------------------------------------------------------------------------------------


class Student(FakeServer):
    """Answers every chat with one token and the end of turn; may change its weights after its first answer."""

    def __init__(self, family: Family, version: str, then: str = "") -> None:
        super().__init__()
        self.family, self.version, self.then = family, version, then

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        status, content = super().answer(method, path, body)
        if path == CHAT:
            ids = [300, self.family.eos_ids[0]]
            entries = [{"token": f"token_id:{i}", "logprob": -0.25} for i in ids]
            choices = [{"index": k, "token_ids": ids, "logprobs": {"content": entries}} for k in range(body["n"])]
            read = self.family.prompt_ids(body["messages"], [])
            content = {"prompt_token_ids": read, "choices": choices}
            self.version = self.then or self.version
        return status, content


def sampler_of(family: Family, urls: list[str], rank: int = 0) -> VllmSampler:
    sampler = VllmSampler(load_config("recipes/tiny/2_xopd.yaml"), family, urls, rank)
    sampler.version = 3
    return sampler


def jobs(count: int) -> Any:
    texts = [f"what is one plus {i}" for i in range(count)]
    return [(Prompt(str(i), ({"role": "user", "content": t},)), "text", str(i)) for i, t in enumerate(texts)]


def asked(fake: FakeServer) -> int:
    return fake.paths.count(CHAT)


def test_a_server_at_another_version_is_left_out_with_one_warning_and_comes_back(
    family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, stale = Student(family, "3"), Student(family, "default")
    with serving(fit, stale) as urls:
        sampler, second = sampler_of(family, urls), sampler_of(family, urls, rank=1)
        for some in (sampler, sampler, second):
            rollouts = some.sample(jobs(4), {}, 2, 1.0)
            assert [r.prompt.id for r in rollouts] == ["0", "0", "1", "1", "2", "2", "3", "3"]
        assert (asked(fit), asked(stale)) == (12, 0)
        warning = f"{urls[1]}: holds weights of version default, the learner is at 3: left out until the next push"
        assert capsys.readouterr().err == f"opd: warning: {warning}\n"
        fit.version = stale.version = "4"
        sampler.version = 4
        sampler.sample(jobs(4), {}, 2, 1.0)
        assert asked(stale) == 2
        stale.version = "5"
        sampler.sample(jobs(1), {}, 1, 1.0)
        assert "holds weights of version 5, the learner is at 4" in capsys.readouterr().err
        fit.version = "6"
        with pytest.raises(ServerError, match=f"{urls[0]}: holds weights of version 6, the learner is at 4"):
            sampler.sample(jobs(1), {}, 1, 1.0)


def test_answers_of_a_server_whose_weights_changed_meanwhile_are_asked_for_again(family: Family) -> None:
    fit, changing = Student(family, "3"), Student(family, "3", then="default")
    with serving(changing, fit) as urls:
        rollouts = sampler_of(family, urls).sample(jobs(6), {}, 1, 1.0)
    assert [r.prompt.id for r in rollouts] == [str(i) for i in range(6)] and {r.version for r in rollouts} == {3}
    assert asked(changing) == 3 and asked(fit) == 6


def test_a_server_that_is_gone_ends_it(family: Family) -> None:
    gone = "http://127.0.0.1:9"
    with serving(Student(family, "3")) as urls, pytest.raises(ServerError, match=f"{gone}/.*: the server is gone"):
        sampler_of(family, [*urls, gone]).sample(jobs(1), {}, 1, 1.0)


def test_a_request_weighs_its_prompt_and_all_its_answers(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Request] = []

    def post(urls: list[str], requests: list[Request], *rest: Any) -> Any:
        sent.extend(requests)
        raise ServerError(f"{rest}")

    monkeypatch.setattr("opd.rollout.sampler.post_all", post)
    part = {"type": "audio", "path": "a.wav", "transcript": "two"}
    spoken = Prompt("p", ({"role": "user", "content": [part]},))
    clips = {"a.wav": np.zeros(32000, np.float32)}
    config = load_config("recipes/tiny/2_xopd.yaml")
    with pytest.raises(ServerError, match=rf"\({config.rollout.concurrency}, {config.rollout.timeout_s}, 2\)"):
        sampler = sampler_of(family, ["http://127.0.0.1:9"], rank=2)
        sampler.sample([(spoken, "speech", "a"), (spoken, "text", "a")], clips, 5, 1.0, check=False)
    heard, read = (r.tokens - 5 * config.rollout.max_tokens for r in sent)
    content = [{"type": "audio"}]
    assert heard == len(family.prompt_ids([{"role": "user", "content": content}], [32000]))
    assert 0 < read < heard


# ---- the teacher's servers ------------------------------------------------------------------------------------------


def test_teacher_servers_share_by_tokens(family: Family) -> None:
    class Teacher(FakeServer):
        def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
            super().answer(method, path, body)
            rows = [None, *({str(i): {"logprob": -float(i)}} for i in body["prompt"][1:])]
            return 200, {"choices": [{"prompt_logprobs": rows}]}

    fakes = [Teacher(), Teacher()]
    for fake in fakes:
        fake.delay = 0.3
    prompt = Prompt("p", ({"role": "user", "content": "one"},))
    lengths = [200, 20, 20, 20, 20]
    rollouts = [Rollout(prompt, "text", tuple(range(300, 300 + n)), None, 0, False) for n in lengths]
    with serving(*fakes) as urls:
        config = load_config("recipes/tiny/2_xopd.yaml", [f"teacher.urls={urls}", "objective.lambda=0.5"])
        scored = ServerTeacher(config, family, torch.device("cpu")).score(rollouts)
    assert [len(fake.calls) for fake in fakes] == [1, 4]
    for s, n in zip(scored, lengths, strict=True):
        assert s.teacher_logprobs is not None and s.teacher_logprobs.tolist() == [
            -float(i) for i in range(300, 300 + n)
        ]


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_servers_sleep_between_the_answers_and_the_push(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeServer()

    def note(name: str, result: Any = None) -> Any:
        return lambda *a, **k: (fake.calls.append((name, None)), result)[1]

    for name in ("load_clips", "make_batch", "make_samples", "report_step"):
        monkeypatch.setattr(train, name, lambda *a: ([], {}))
    monkeypatch.setattr(train.checkpoint, "save", note("save"))
    with serving(fake) as urls:
        overrides = ["rollout.sleep=true", f"rollout.urls={urls}", f"rollout.transfer_dir={tmp_path}"]
        config = load_config("recipes/tiny/2_xopd.yaml", [*overrides, "train.steps=2", "train.checkpoint_every=9"])
        sync = WeightSync([Server(urls[0], 5)], family, config, 0)
        parts: Any = SimpleNamespace(
            config=config,
            learner=SimpleNamespace(rank=0, world=1, family=family, step=note("step", {}), gathered=note("gather", [])),
            stream=SimpleNamespace(shard=note("prompts", []), epoch=lambda step: 0),
            source=SimpleNamespace(respond=note("respond", [])),
            teacher=SimpleNamespace(score=note("score", [])),
            sync=sync,
            sampler=SimpleNamespace(version=0),
            evaluator=SimpleNamespace(run=note("evaluate", {})),
            log=None,
            seconds=0.0,
            verdict=Verdict(),
        )
        sync.sleep()  # as at the start, before the learner is loaded
        train.push(parts, 0)
        train.loop(parts, 0)
        train.sleep_servers(parts)
        train.evaluate(parts, "xopd", 2)
    finish = ["gather", "/start_weight_update", "/finish_weight_update", "/wake_up?tags=kv_cache"]
    asleep, wake = "/sleep?level=1", "/wake_up?tags=weights"
    first = [asleep, wake, "/init_weight_transfer_engine", *finish, "/reset_prefix_cache"]
    push = [wake, "/weight_info", *finish, "/reset_prefix_cache"]
    step = ["prompts", "respond", asleep, "score", "step", *push]
    assert fake.paths == [*first, *step, *step, "save", asleep, *push, "evaluate"]
    assert parts.sampler.version == 2
    sync.close()
