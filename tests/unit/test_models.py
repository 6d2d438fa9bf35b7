"""Qwen2-Audio's inputs, tower, packed rows and names, against transformers' own; the shipped tiny student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from opd.batch import collate
from opd.models import family_of
from opd.models.base import SpeechLM
from opd.objectives import EXCLUDED, xopd
from opd.types import Message, Prompt, Rollout, Sample, ScoredRollout

STUDENT = str(Path(__file__).parents[2] / "recipes/tiny/student")
CLIPS = {k: np.random.default_rng(n).standard_normal(n).astype(np.float32) / 10 for k, n in (("a", 32037), ("b", 9000))}


@pytest.fixture(scope="module")
def family():
    return family_of(STUDENT)


@pytest.fixture(scope="module")
def hf(family):
    return family.load(torch.float32, "sdpa").eval()


def user(*parts: str) -> Message:
    """A turn: clips by their keys, all else as text."""
    content = [{"type": "audio", "path": p} if p in CLIPS else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": content}


CHATS = {
    "a clip": ([user("a")], ["a"]),
    "a clip and a text": ([user("b", "\nrepeat")], ["b"]),
    "two clips": ([user("a", "b")], ["a", "b"]),
    "turns": ([user("a"), {"role": "assistant", "content": "one two."}, user("b")], ["a", "b"]),
    "no clip": ([{"role": "user", "content": "sort two one"}], []),
}


def reference_inputs(family, messages: list[Message], keys: list[str]) -> dict[str, torch.Tensor]:
    text = family.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    audio = {"audio": [CLIPS[k] for k in keys], "sampling_rate": 16000} if keys else {}
    return dict(family.processor(text=text, return_tensors="pt", **audio))


@pytest.mark.parametrize("chat", CHATS)
def test_prompt_ids_are_the_processors(family, chat: str) -> None:
    messages, keys = CHATS[chat]
    expected = reference_inputs(family, messages, keys)["input_ids"][0].tolist()
    assert family.prompt_ids(messages, [len(CLIPS[k]) for k in keys]) == expected


@pytest.mark.parametrize("samples", [800, 1600, 15999, 16000, 16001, 16160, 47777, 479999, 480000, 500000])
def test_audio_tokens_are_the_processors(family, samples: int) -> None:
    wave = np.zeros(samples, np.float32)
    ids = family.processor(text="<|AUDIO|>", audio=[wave], sampling_rate=16000, return_tensors="pt")["input_ids"][0]
    assert family.audio_tokens(samples) == int((ids == family.audio_id).sum())


def test_the_trimmed_tower_hears_what_the_full_window_hears(family, hf) -> None:
    both = [CLIPS["a"], CLIPS["b"]]
    with torch.no_grad():
        ours = [family.run_adapter(hf, a) for a in family.run_tower(hf, family.features(both))]
        alone = family.run_adapter(hf, family.run_tower(hf, family.features(both[1:]))[0])
        inputs = reference_inputs(family, *CHATS["two clips"])
        assert inputs["input_features"].shape[-1] == 3000
        frames = inputs["feature_attention_mask"].sum(-1)
        positions, lengths = hf.model.audio_tower._get_feat_extract_output_lengths(frames)
        mask = torch.zeros(2, 1, 1500, 1500)
        mask = mask.masked_fill(torch.arange(1500) >= positions[:, None, None, None], torch.finfo(torch.float32).min)
        hidden = hf.model.audio_tower(inputs["input_features"], attention_mask=mask).last_hidden_state
        full = [row[:n] for row, n in zip(hf.model.multi_modal_projector(hidden), lengths.tolist(), strict=True)]
    assert [len(o) for o in ours] == [family.audio_tokens(len(c)) for c in both]
    torch.testing.assert_close(torch.cat(ours), torch.cat(full), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], alone, atol=1e-5, rtol=1e-5)


def sample(family, chat: str, response: list[int]) -> Sample:
    messages, keys = CHATS[chat]
    scored = ScoredRollout(Rollout(Prompt(chat, ()), "speech", tuple(response), None, 0, False), None)
    return Sample(scored, family.prompt_ids(messages, [len(CLIPS[k]) for k in keys]), keys, weight=1.0)


def packed_logits(model: SpeechLM, samples: list[Sample]) -> tuple[object, torch.Tensor]:
    mb = collate(samples)
    heard = dict(zip(CLIPS, model.encode(model.family.features(list(CLIPS.values()))), strict=True))
    audio = torch.cat([heard[k] for k in mb.clips]) if mb.clips else None
    names = ("ids", "position_ids", "attends", "row", "positions")
    return mb, model(**{n: getattr(mb, n) for n in names}, audio=audio)


def test_packed_rows_equal_transformers_one_answer_at_a_time(family, hf) -> None:
    samples = [
        sample(family, "a clip", [300, 301, 302, 2]),
        sample(family, "a clip and a text", [310, 2]),
        sample(family, "a clip", [320, 2]),
        sample(family, "no clip", [311, 312, 313]),
        sample(family, "two clips", [5, 6, 7, 8, 9, 2]),
    ]
    model = SpeechLM(hf, family, ["llm"])
    banned = torch.zeros(family.vocab_size, dtype=torch.bool)
    banned[family.banned_ids] = True
    with torch.no_grad():
        _, ours = packed_logits(model, samples)
        for s, row in zip(samples, ours, strict=True):
            inputs = reference_inputs(family, *CHATS[s.scored.rollout.prompt.id])
            n = len(s.response_ids)
            ids = torch.cat([inputs.pop("input_ids"), torch.tensor([s.response_ids])], 1)
            inputs["attention_mask"] = torch.ones_like(ids)
            theirs = hf(input_ids=ids, **inputs).logits[0, -n - 1 : -1]
            torch.testing.assert_close(row[:n][:, ~banned], theirs[:, ~banned], atol=1e-4, rtol=1e-4)
            assert (row[:n][:, banned] == EXCLUDED).all()


def test_teacher_equal_to_student_moves_nothing(family) -> None:
    model = SpeechLM(family.load(torch.float32, "sdpa").eval(), family, ["llm"])
    mb, logits = packed_logits(model, [sample(family, "a clip", [300, 301, 2]), sample(family, "no clip", [311, 2])])
    logp = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])[..., 0]
    terms = xopd(logp, logp.detach(), logp, logp.detach())
    (terms.loss * mb.weights).sum().backward()
    assert float((terms.loss * mb.mask).detach().abs().max()) == 0.0
    assert all(p.grad is None or float(p.grad.abs().max()) == 0.0 for p in model.parameters())


@pytest.mark.parametrize("train", [["llm"], ["llm", "adapter"], ["llm", "adapter", "tower"]])
def test_only_what_is_trained_gets_a_gradient(family, train: list[str]) -> None:
    model = SpeechLM(family.load(torch.float32, "sdpa"), family, train)
    mb = collate([sample(family, "a clip", [300, 301, 2])])
    names = ("ids", "position_ids", "attends", "row", "positions")
    inputs = {n: getattr(mb, n) for n in names}
    features = family.features([CLIPS["a"]])
    if "tower" in train:
        logits = model(**inputs, features=features)
    else:
        logits = model(**inputs, audio=torch.cat(model(features=features)))
    torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None]).sum().backward()
    moved = {family.part_of(n) for n, p in model.hf.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == set(train)


def test_a_dummy_clip_changes_no_text_answer(family) -> None:
    model = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm", "adapter"])
    mb, without = packed_logits(model, [sample(family, "no clip", [311, 312, 2])])
    dummy = model(features=family.features([CLIPS["b"]]))[0][:1]
    names = ("ids", "position_ids", "attends", "row", "positions")
    logits = model(**{n: getattr(mb, n) for n in names}, audio=dummy)
    torch.testing.assert_close(logits, without, atol=0, rtol=0)
    torch.log_softmax(logits, -1)[..., 5].sum().backward()
    adapter = [p.grad for n, p in model.hf.named_parameters() if family.part_of(n) == "adapter"]
    assert adapter and all(g is not None and float(g.abs().max()) == 0.0 for g in adapter)  # reached, with weight 0


def test_bfloat16_is_close_to_float32(family, hf) -> None:
    samples = [sample(family, "a clip", [300, 301, 2]), sample(family, "no clip", [311, 2])]
    with torch.no_grad():
        mb, exact = packed_logits(SpeechLM(hf, family, ["llm"]), samples)
    model = SpeechLM(family.load(torch.bfloat16, "sdpa"), family, ["llm"])
    _, logits = packed_logits(model, samples)
    assert logits.dtype == torch.float32
    a, b = (torch.log_softmax(x, -1).gather(-1, mb.targets[..., None])[..., 0] * mb.mask for x in (logits, exact))
    assert float((a.exp() - b.exp()).detach().abs().max()) < 0.1
    a.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_every_parameter_has_a_part_and_its_published_name(family, hf) -> None:
    names = [n for n, _ in hf.named_parameters()]
    assert {family.part_of(n) for n in names} == {"tower", "adapter", "llm"}
    with safe_open(f"{STUDENT}/model.safetensors", "pt") as f:
        published = set(f.keys())
    mapped = {family.to_vllm(n) for n in names}
    assert len(mapped) == len(names) and mapped <= published
    tied = {"language_model.lm_head.weight"}
    assert published - mapped <= tied


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.model.layers.3.mlp.up_proj.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.audio_tower.conv1.bias", "audio_tower.conv1.bias"),
        ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear.weight"),
    ],
)
def test_names_as_vllm_wants_them(family, name: str, expected: str) -> None:
    assert family.to_vllm(name) == expected
