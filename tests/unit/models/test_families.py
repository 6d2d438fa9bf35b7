"""Every family's learner side against transformers' own forward pass, on small random checkpoints."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel

from opd.config.load import load_config
from opd.config.schema import LoraConfig
from opd.models.base import family_of
from opd.models.lora import adapted, adapters, pieces, save_adapter
from opd.models.registry import FAMILIES, family_entry
from opd.models.speech_lm import SpeechLM
from opd.models.tiny import build
from opd.prompts.audio import whole_frames
from opd.prompts.clips import ContextLimit
from opd.settings import UserError
from opd.teachers.reference import ReferenceModel, SelfTeacher
from opd.train.batch import collate
from opd.types import BadAudio, Message, Prompt, Rollout, Sample, ScoredRollout

RNG = np.random.default_rng(0)
CLIPS = {
    name: whole_frames(RNG.standard_normal(n).astype(np.float32) / 10, 16000)
    for name, n in (("a", 32037), ("b", 16500), ("long", 16000 * 31))
}
ONE_CLIP_A_TEXT = ("audioflamingo3", "glmasr", "qwen3_asr")  # their processors take no more
ALONE = ("granite_speech",)  # transformers pads clips to each other, and its tower hears the padding
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
EIGHT = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, its Hugging Face model) by name; each is built once."""
    found: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            build(name, folder)
            family = family_of(str(folder / "student"))
            found[name] = family, family.load(torch.float32, "sdpa").eval()
        return found[name]

    return make


def user(*parts: str) -> Message:
    content = [{"type": "audio", "path": p} if p in CLIPS else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


CHATS: dict[str, tuple[list[Message], list[str]]] = {
    "a clip": ([user("a")], ["a"]),
    "a clip and a text": ([user("b", "what is this?")], ["b"]),
    "two clips": ([user("a", "b", "which?")], ["a", "b"]),
    "two turns": ([user("b"), {"role": "assistant", "content": "one"}, user("a")], ["b", "a"]),
    "no clip": ([{"role": "user", "content": "who wrote this?"}], []),
    "longer than a window": ([user("long")], ["long"]),
}


def reference(family: Any, messages: list[Message], keys: list[str]) -> dict[str, torch.Tensor]:
    """The processor's own inputs."""
    if family.entry.name == "voxtral":
        return dict(family.processor.apply_chat_template(_spoken(messages), tokenize=True, return_dict=True))
    text = family.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not keys:
        return dict(family.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    rate = {} if family.entry.name == "granite_speech" else {"sampling_rate": 16000}
    return dict(family.processor(text=text, audio=[CLIPS[k] for k in keys], return_tensors="pt", **rate))


def _spoken(messages: list[Message]) -> list[Message]:
    def part(p: dict[str, str]) -> dict[str, str]:
        if p["type"] != "audio":
            return p
        buffer = io.BytesIO()
        soundfile.write(buffer, CLIPS[p["path"]], 16000, format="wav", subtype="FLOAT")
        return {"type": "audio", "base64": base64.b64encode(buffer.getvalue()).decode()}

    plain = [m for m in messages if isinstance(m["content"], str)]
    return [m if m in plain else {**m, "content": [part(p) for p in m["content"]]} for m in messages]


def sample(family: Any, chat: str) -> Sample:
    messages, keys = CHATS[chat]
    answer = (70, 71, 72, family.eos_ids[0])
    rollout = Rollout(Prompt(chat, tuple(messages)), "speech", answer, None, 0, False)
    ids = family.prompt_ids(messages, [len(CLIPS[k]) for k in keys])
    return Sample(ScoredRollout(rollout, None), ids, keys, 1.0)


@EIGHT
def test_log_probs_are_those_of_transformers(made: Any, name: str) -> None:
    family, hf = made(name)
    chats = [c for c, (_, keys) in CHATS.items() if len(keys) <= (1 if name in ONE_CLIP_A_TEXT + ALONE else 8)]
    samples = [sample(family, c) for c in chats]
    model = SpeechLM(hf, family, ["llm"]).eval()
    with torch.no_grad():
        mb = collate(samples)  # all of them together, of different lengths
        heard = dict(zip(CLIPS, model.encode(family.features(list(CLIPS.values()))), strict=True))
        ours = torch.log_softmax(model.response_logits(audio=[heard[k] for k in mb.clips], **mb.inputs), -1)
        for row, s in zip(ours, samples, strict=True):
            inputs = reference(family, list(s.scored.rollout.prompt.messages), s.clips)
            ids = inputs.pop("input_ids")
            assert ids[0].tolist() == s.prompt_ids, s.scored.rollout.prompt.id
            ids = torch.cat([ids, torch.tensor([s.response_ids])], 1)
            audio = {k: v for k, v in inputs.items() if k.startswith(("input_features", "feature_attention"))}
            logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits[0, -5:-1].float()
            logits = logits / getattr(family.config.get_text_config(), "logits_scaling", 1.0)
            theirs = torch.log_softmax(logits.masked_fill(model.banned, -1e9), -1)
            difference = (row - theirs)[:, ~model.banned].abs().max()
            assert difference < 1e-4, (s.scored.rollout.prompt.id, difference)


@EIGHT
def test_parts_ids_and_names(made: Any, name: str) -> None:
    family, hf = made(name)
    names = [n for n, _ in hf.named_parameters()]
    assert {"tower", "adapter", "llm"} <= {family.part_of(n) for n in names}
    published = [family.to_vllm(n) for n in names]
    assert len(set(published)) == len(names)
    vocabulary = family.vocab_size
    assert family.audio_id in family.banned_ids and all(i < vocabulary for i in family.banned_ids)
    assert set(range(len(family.tokenizer), vocabulary)) <= set(family.banned_ids)
    assert not set(family.eos_ids) & set(family.banned_ids)
    (end,) = family.eos_ids
    family.eos_ids = sorted([1, end])  # models that stop at several ids end a turn with one of them
    assert family.turn_end == end
    family.eos_ids = [end]


@EIGHT
@pytest.mark.parametrize("train", [["llm"], ["llm", "adapter"], ["llm", "adapter", "tower"]])
def test_only_what_is_trained_gets_a_gradient(made: Any, name: str, train: list[str]) -> None:
    family, _ = made(name)
    model = SpeechLM(family.load(torch.float32, "sdpa"), family, train).train()
    mb = collate([sample(family, "a clip")])
    features = family.features([CLIPS["a"]])
    heard = None if "tower" in train else model.encode(features)
    logits = model.response_logits(audio=heard, features=features if "tower" in train else None, **mb.inputs)
    torch.log_softmax(logits, -1)[..., 70].sum().backward()
    moved = {family.part_of(n) for n, p in model.hf.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == set(train)


@EIGHT
def test_adapters_are_the_llms_alone(made: Any, name: str, tmp_path: Path) -> None:
    """They start as nothing, take all of the gradient, and leave the plain model's names and shapes."""
    family, plain = made(name)
    model = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm"], LoraConfig(r=4)).train()
    assert {n.rpartition(".")[2] for n in adapted(model.hf)} == ATTENTION | (set() if "moe" in name else MLP)
    mb = collate([sample(family, "a clip")])
    heard = model.encode(family.features([CLIPS["a"]]))
    logits = model.response_logits(audio=heard, **mb.inputs)
    with torch.no_grad():
        before = SpeechLM(plain, family, ["llm"]).train().response_logits(audio=heard, **mb.inputs)
    assert torch.equal(logits, before)
    torch.log_softmax(logits, -1)[..., 70].sum().backward()
    moved = {n for n, p in model.hf.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {f"{n}.lora_B.default.weight" for n in adapted(model.hf)}  # A has none while B is 0

    with torch.no_grad():
        for adapter in adapters(model.hf):
            adapter.weight.normal_(0, 0.1)
    merged = {p.name: p.value() for p in pieces(model.hf, trainable_only=False)}
    assert {n: v.shape for n, v in merged.items()} == {n: p.shape for n, p in plain.named_parameters()}
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, merged[n])}
    assert changed == {f"{n}.weight" for n in adapted(model.hf)}
    save_adapter(model.hf, {p.name: p.value() for p in adapters(model.hf)}, tmp_path / "adapter")
    again = PeftModel.from_pretrained(family.load(torch.float32, "sdpa"), tmp_path / "adapter").merge_and_unload()
    for n, p in again.named_parameters():
        torch.testing.assert_close(p.data, merged[n], atol=1e-6, rtol=0, msg=n)


@EIGHT
def test_features_of_a_clip_do_not_depend_on_its_neighbours(made: Any, name: str) -> None:
    family, hf = made(name)
    with torch.no_grad():
        alone = family.run_adapter(hf, family.run_tower(hf, family.features([CLIPS["b"]])))[0]
        beside = family.run_adapter(hf, family.run_tower(hf, family.features([CLIPS["a"], CLIPS["b"]])))[1]
    assert alone.shape == beside.shape == (family.audio_tokens(len(CLIPS["b"])), 128)
    torch.testing.assert_close(alone, beside, atol=1e-4, rtol=1e-4)


def test_clips_that_a_family_does_not_take(made: Any) -> None:
    family, _ = made("glmasr")
    parts = [{"type": "audio", "path": k, "transcript": "t"} for k in ("a", "b")]
    prompt = Prompt("q", ({"role": "user", "content": parts},))
    with pytest.raises(BadAudio, match="it has 2 clips; glmasr takes 1"):
        ContextLimit(family, 8, None).check(prompt, CLIPS)


def test_short_clips_are_filled_up_where_the_tower_needs_it(made: Any) -> None:
    short = np.ones(8000, np.float32)
    room = ContextLimit(made("qwen3_asr")[0], 8, None)
    assert len(room.filled(short)) == 16000 and len(room.filled(np.ones(20000, np.float32))) == 20320
    assert len(ContextLimit(made("voxtral")[0], 8, None).filled(short)) == 8000


def test_a_granite_checkpoint_with_an_adapter_inside_is_refused(made: Any, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(made("granite_speech")[0].path, tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps(config | {"has_lora_adapter": True}))
    with pytest.raises(UserError, match="merge the adapter into the weights"):
        family_of(str(tmp_path / "student"))


def test_a_family_may_be_named(made: Any) -> None:
    with pytest.raises(UserError, match="student.family voxtral: .* is of model_type 'glmasr'; leave it out"):
        family_entry(made("glmasr")[0].path, "voxtral")
    assert family_entry(made("glmasr")[0].path).name == "glmasr"
    assert family_entry("nobody/knows", "voxtral").name == "voxtral"
    with pytest.raises(UserError, match="student.family whisper: not known; known: qwen2_audio, "):
        family_entry("nobody/knows", "whisper")


@EIGHT
def test_the_student_at_the_start_reads_and_writes_as_its_own_teacher(made, name: str) -> None:
    """Its greedy answers, two at a time with padding between, are the argmax of its rows, which SpeechLM computes."""
    family, hf = made(name)
    student = f"student.path={Path(family.path)}"
    config = load_config("recipes/tiny/2_xopd.yaml", [student, "student.family=", "teacher.kind=self", "teacher.path="])
    teacher = SelfTeacher(config, family, ReferenceModel(config, family, torch.device("cpu"), None))
    asked = [Prompt(t, ({"role": "user", "content": t},)) for t in ("sort two", "what is one plus two plus three?")]
    replies = [ids for ids, _ in teacher.respond(asked, 6)]
    rollouts = [Rollout(p, "text", ids, None, -1, False) for p, ids in zip(asked, replies, strict=True)]
    samples = [Sample(ScoredRollout(r, None), family.prompt_ids(list(r.prompt.messages), []), []) for r in rollouts]
    rows = teacher.logits(samples)(slice(0, sum(map(len, replies))))
    assert rows.argmax(-1).tolist() == [i for ids in replies for i in ids]
    mb = collate(samples)
    with torch.no_grad():
        own = SpeechLM(hf, family, ["llm"]).eval().response_logits(**mb.inputs)[mb.mask.bool()]
    torch.testing.assert_close(rows, own, atol=2e-5, rtol=1e-5)
