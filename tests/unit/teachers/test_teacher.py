"""The teacher reads: no audio reaches it, its scores are its own log-probs, and it must share the student's tokens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import opd.teachers.local
import opd.teachers.server
from opd.config.deepspeed import inference_settings
from opd.config.load import load_config
from opd.config.needs import asks_teacher, asks_teacher_servers, starts_teacher
from opd.config.schema import Config
from opd.inference.client import Answer
from opd.models.base import Family, family_of
from opd.settings import UserError
from opd.teachers.base import check_tokenizers
from opd.teachers.local import LocalTeacher
from opd.teachers.server import ServerTeacher
from opd.types import Prompt, Rollout

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _at_root() -> None:
    os.chdir(ROOT)


@pytest.fixture(scope="module")
def family() -> Family:
    return family_of(str(ROOT / "recipes/tiny/student"))


@pytest.fixture
def config() -> Config:
    return load_config("recipes/tiny/2_xopd.yaml", ["student.path=recipes/tiny/student"])


def spoken(path: str, text: str = "what is one plus two plus three") -> Prompt:
    part = {"type": "audio", "path": path, "transcript": text}
    return Prompt("p", ({"role": "user", "content": [part, {"type": "text", "text": "\nman or woman"}]},))


def test_no_audio_reaches_a_local_teacher(family: Family, config: Config) -> None:
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    teacher.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    teacher.model.base_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    rollouts = [Rollout(spoken(f"{i}.wav"), "speech", (300, 301, 2), None, 0, False) for i in range(3)]
    teacher.score(rollouts)
    teacher.respond([r.prompt for r in rollouts], 4)
    assert seen and not {int(i) for ids in seen for i in ids.flatten()} & set(family.banned_ids)
    assert len({tuple(teacher.prompt_ids(r.prompt)) for r in rollouts}) == 1  # whatever clip it is
    read = teacher.tokenizer.decode(teacher.prompt_ids(rollouts[0].prompt))
    assert "what is one plus two plus three\nman or woman" in read


def test_no_audio_reaches_a_server_teacher(family: Family, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def answer(urls: list[str], requests: list[Any], *_: Any) -> list[Any]:
        sent.extend(requests)
        out = []
        for request in requests:
            ids = request.body["prompt"]
            logprobs = [None, *({str(i): {"logprob": -0.5}} for i in ids[1:])]
            out.append(Answer(urls[0], {"choices": [{"prompt_logprobs": logprobs}]}))
        return out

    monkeypatch.setattr(opd.teachers.server, "post_all", answer)
    config = config.changed({"teacher.urls": ["http://127.0.0.1:9"]})
    teacher = ServerTeacher(config, family, torch.device("cpu"))
    (scored,) = teacher.score([Rollout(spoken("secret.wav"), "speech", (300, 2), None, 0, False)])
    assert scored.teacher_logprobs.tolist() == [-0.5, -0.5]
    ((_, body, tokens),) = sent
    assert tokens == len(body["prompt"]) + 1
    assert all(isinstance(i, int) and i not in family.banned_ids for i in body["prompt"])
    assert "audio" not in json.dumps(body) and "secret" not in json.dumps(body)


def test_what_a_server_may_not_write(family: Family, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def answer(urls: list[str], requests: list[Any], *_: Any) -> list[Answer]:
        sent.extend(r.body for r in requests)
        return [Answer(urls[0], {"choices": [{"token_ids": [300, 2]}]}) for _ in requests]

    monkeypatch.setattr(opd.teachers.server, "post_all", answer)
    monkeypatch.setattr(family, "banned_ids", [*family.banned_ids, 503, 504])  # vLLM refuses ids that its model lacks
    config = config.changed({"teacher.urls": ["http://127.0.0.1:9"]})
    teacher = ServerTeacher(config, family, torch.device("cpu"))
    assert teacher.respond([spoken("a.wav")], 5) == [((300, 2), False)]
    banned = {str(i): -100.0 for i in family.banned_ids if i < 503}
    assert sent[0]["logit_bias"] == banned and 0 < len(banned) < len(family.banned_ids)


def test_scores_are_the_models_log_probs(family: Family, config: Config) -> None:
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    rollouts = [
        Rollout(spoken("a.wav"), "speech", (300, 301, 302, 2), None, 0, False),
        Rollout(spoken("b.wav", "reverse cat red dog water"), "text", (310, 2), None, 0, False),
    ]
    allowed = torch.ones(family.vocab_size, dtype=torch.bool)
    allowed[family.banned_ids] = False
    for scored in teacher.score(rollouts):
        r = scored.rollout
        ids = [*teacher.prompt_ids(r.prompt), *r.token_ids]
        with torch.no_grad():
            logits = teacher.model(torch.tensor([ids])).logits[0, -len(r.token_ids) - 1 : -1]
        logits = logits.masked_fill(~allowed, -torch.inf)
        want = torch.log_softmax(logits, -1)[range(len(r.token_ids)), list(r.token_ids)]
        assert np.abs(scored.teacher_logprobs - want.numpy()).max() < 1e-5


def test_greedy_responses_are_the_argmax(family: Family, config: Config) -> None:
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    prompts = [
        Prompt("p", ({"role": "user", "content": t},)) for t in ("sort nine two five one", "reverse cat red dog fish")
    ]
    for prompt, (ids, truncated) in zip(prompts, teacher.respond(prompts, 24), strict=True):
        context = teacher.prompt_ids(prompt)
        for token in ids:
            with torch.no_grad():
                assert int(teacher.model(torch.tensor([context])).logits[0, -1].argmax()) == token
            context.append(token)
        assert not truncated and ids[-1] in family.eos_ids
    assert teacher.respond(prompts[:1], 2)[0][1]  # cut short: says so


def test_what_a_local_teacher_may_not_write(family: Family, config: Config) -> None:
    """Banned ids, however much it likes them."""
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    ((plain, _),) = teacher.respond([spoken("a.wav")], 8)
    teacher._knows(family.vocab_size, [*family.banned_ids, plain[0]], family.eos_ids, family.vocab_size)
    ((other, _),) = teacher.respond([spoken("a.wav")], 8)
    assert other and plain[0] not in other


def test_greedy_is_not_bent_by_the_checkpoints_own_settings(family: Family, config: Config, tmp_path: Path) -> None:
    prompts = [spoken("a.wav")]
    want = LocalTeacher(config, family, torch.device("cpu")).respond(prompts, 8)
    shutil.copytree("recipes/tiny/teacher", tmp_path / "teacher")
    bent = {"repetition_penalty": 9.0, "min_new_tokens": 8, "eos_token_id": family.eos_ids}
    (tmp_path / "teacher/generation_config.json").write_text(json.dumps(bent))
    config = config.changed({"teacher.path": str(tmp_path / "teacher")})
    assert LocalTeacher(config, family, torch.device("cpu")).respond(prompts, 8) == want


def test_another_tokenizer_is_refused(family: Family) -> None:
    class Swapped:
        def get_vocab(self) -> dict[str, int]:
            vocab = dict(family.tokenizer.get_vocab())
            a, b = [t for t, i in vocab.items() if i in (300, 301)]
            return vocab | {a: vocab[b], b: vocab[a]}

    with pytest.raises(UserError, match=r"differs from the student's in 2 ids \(id: student / teacher\): 300: "):
        check_tokenizers(family, Swapped(), "somewhere")


@pytest.mark.parametrize("file", ["zero3_offload", "zero2"])
def test_settings_of_a_sharded_teacher(config: Config, file: str) -> None:
    config = config.changed({"train.deepspeed": f"deepspeed_configs/{file}.json"})
    settings = inference_settings(config, "bfloat16")
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3 and "offload_optimizer" not in zero and settings["bf16"] == {"enabled": True}
    assert zero.get("offload_param", {}).get("device") == ("cpu" if file == "zero3_offload" else None)


WARM, ROWLESS = ["objective.name=kd", "rollout.source=teacher"], ["objective.mu=0"]
URLS, HELD_OUT, NONE_HELD_OUT = ["teacher.urls=[http://a]"], ["eval.test=t.jsonl"], ["eval.test=", "eval.retention="]
DATASET = ["objective.name=kd", "rollout.source=dataset", *NONE_HELD_OUT]
PLACED = ["launch.placement=recipes/placements/4gpu_1r_1t_2l.yaml"]


@pytest.mark.parametrize(
    ("overrides", "kind", "needed", "asked", "started"),
    [
        ([], "local", True, False, False),
        (PLACED, "server", True, True, True),
        (URLS, "server", True, True, False),
        (WARM, "local", True, False, False),
        (WARM + PLACED, "local", True, True, True),  # servers write, the ranks give rows
        (WARM + URLS, "local", True, True, False),
        (WARM + PLACED + ROWLESS, "server", True, True, True),
        (WARM + ROWLESS + ["teacher.kind=server"], "server", True, True, True),
        (DATASET, "local", True, False, False),
        (DATASET + PLACED, "local", True, False, False),  # nobody to write for
        (DATASET + PLACED + ROWLESS, "server", False, False, False),
        (DATASET + ROWLESS, "local", False, False, False),
        (DATASET + PLACED + ROWLESS + HELD_OUT, "server", True, True, True),
    ],
)
def test_where_the_teacher_is(overrides: list[str], kind: str, needed: bool, asked: bool, started: bool) -> None:
    c = load_config("recipes/tiny/2_xopd.yaml", ["teacher.kind=", *overrides])
    assert c.teacher.kind == kind
    assert (bool(asks_teacher(c)), asks_teacher_servers(c), starts_teacher(c)) == (needed, asked, started)


SFT = ["objective.name=sft", "rollout.source=dataset"]


@pytest.mark.parametrize(
    "more",
    [SFT, [*SFT, "teacher.kind=server"], [*SFT, *PLACED], [*SFT, "eval.end=false"], DATASET + ROWLESS]
    + [[*SFT, "teacher.kind=server", "launch.placement=recipes/placements/2gpu_1r_1l.yaml"]],
)
def test_a_run_that_asks_no_teacher_names_none(more: list[str]) -> None:
    quiet = NONE_HELD_OUT if "eval.end=false" not in more else []
    c = load_config("recipes/tiny/2_xopd.yaml", ["teacher.path=", *more, *quiet])
    assert not asks_teacher(c) and not c.teacher.path and not starts_teacher(c)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ([], "; objective.name xopd reads it"),
        ([*WARM, *ROWLESS], "; with rollout.source teacher it writes responses"),
        ([*SFT, *HELD_OUT], r"; evaluations ask it; without any \(eval.test= eval.retention=\) it need not be there"),
    ],
)
def test_a_teacher_is_demanded_with_the_reason(more: list[str], why: str) -> None:
    with pytest.raises(
        UserError, match=f"teacher.path is required: the checkpoint folder or hub id of the text LLM{why}"
    ):
        load_config("recipes/tiny/2_xopd.yaml", ["teacher.path=", *more])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.kind=server", "teacher.shard=true"], "is for a local teacher, found kind server"),
        (["teacher.kind=", "teacher.shard=true", *PLACED], "is for a local teacher, found kind server"),
        ([*WARM, "teacher.kind=server"], "unless objective.mu is 0: teacher.kind must be local or self, found server"),
    ],
)
def test_a_teacher_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("recipes/tiny/2_xopd.yaml", overrides)


@pytest.mark.parametrize(("kind", "settings"), [("granite", {"logits_scaling": 4.0}), ("gemma2", {})])
def test_what_an_llm_does_to_its_logits(
    family: Family, config: Config, tmp_path: Path, kind: str, settings: dict[str, float]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **settings))
    model.get_input_embeddings().weight.data.normal_(0, 40)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(config.teacher.path).save_pretrained(tmp_path)
    config = config.changed({"teacher.path": str(tmp_path)})
    teacher = LocalTeacher(config, family, torch.device("cpu"))
    ids = torch.tensor([[300, 301, 302]])
    rows = teacher._project(teacher._states(ids, torch.ones_like(ids), torch.tensor([[0, 0], [0, 1], [0, 2]])))[None]
    expected = teacher.model(input_ids=ids).logits[..., : rows.shape[-1]]
    kept = ~teacher.banned[: expected.shape[-1]]
    torch.testing.assert_close(rows[..., : len(kept)][..., kept], expected[..., kept].float())
    raw = teacher.model.get_output_embeddings()(teacher.model.base_model(input_ids=ids).last_hidden_state)
    assert not torch.allclose(raw[..., : len(kept)], expected, atol=0.1)  # Granite scales, Gemma squeezes into a range
