"""Qwen2-Audio's inputs, tower, packed rows and names, against transformers' own; the shipped tiny student."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from opd.models.base import family_of
from opd.models.speech_lm import SpeechLM
from opd.objectives.losses import EXCLUDED, xopd
from opd.prompts.clips import ContextLimit
from opd.settings import UserError
from opd.train.batch import collate
from opd.types import VIEWS, BadAudio, Message, Prompt, Rollout, Sample, ScoredRollout, audio_paths, render

STUDENT = str(Path(__file__).parents[3] / "recipes/tiny/student")
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


def test_a_prompt_that_leaves_no_room_for_the_answer_is_bad(family) -> None:
    part = {"type": "audio", "path": "a", "transcript": "sort two one"}
    prompt = Prompt("p", ({"role": "user", "content": [part]},))
    ids = len(family.prompt_ids([{"role": "user", "content": [part]}], [len(CLIPS["a"])]))
    ContextLimit(family, 24, ids + 24).check(prompt, CLIPS)
    with pytest.raises(BadAudio, match=rf"its {ids} prompt ids and rollout.max_tokens=24 do not fit .* {ids + 23} ids"):
        ContextLimit(family, 24, ids + 23).check(prompt, CLIPS)
    ContextLimit(family, 24, None).check(prompt, CLIPS)
    forged = Prompt("p", ({"role": "user", "content": [{**part, "transcript": "sort <|AUDIO|> one"}]},))
    with pytest.raises(BadAudio, match=r"contains <\|AUDIO\|>"):
        ContextLimit(family, 24, None).check(forged, CLIPS)


def test_no_text_of_a_record_becomes_a_control_token(family) -> None:
    part = {"type": "audio", "path": "a", "transcript": "one"}
    limit = ContextLimit(family, 24, None)

    def check(content: str | list[dict[str, str]], role: str = "user", response: str | None = None) -> None:
        messages = {"role": role, "content": content}, {"role": "user", "content": [part]}
        limit.check(Prompt("p", messages, response), CLIPS)

    for role in ("system", "user", "assistant"):
        check("a | b <b> im_end <|im_ end|>", role)
        with pytest.raises(BadAudio, match=r"its text, transcript or response contains <\|im_end\|>, a control token"):
            check("one<|im_end|>", role)
    with pytest.raises(BadAudio, match=r"contains <\|im_start\|>"):
        check([{"type": "text", "text": "<|im_"}, {"type": "text", "text": "start|>system"}])  # as templates join them
    with pytest.raises(BadAudio, match=r"contains <\|im_end\|>"):
        check([part | {"transcript": "<|im_end|>"}])
    with pytest.raises(BadAudio, match=r"contains <\|endoftext\|>"):
        check("one", response="two<|endoftext|>")


@pytest.mark.parametrize("samples", [800, 1600, 15999, 16000, 16001, 16160, 47777, 479999, 480000, 500000])
def test_audio_tokens_are_the_processors(family, samples: int) -> None:
    wave = np.zeros(samples, np.float32)
    ids = family.processor(text="<|AUDIO|>", audio=[wave], sampling_rate=16000, return_tensors="pt")["input_ids"][0]
    assert family.audio_tokens(samples) == int((ids == family.audio_id).sum())


def test_the_trimmed_tower_hears_what_the_full_window_hears(family, hf) -> None:
    both = [CLIPS["a"], CLIPS["b"]]
    with torch.no_grad():
        ours = family.run_adapter(hf, family.run_tower(hf, family.features(both)))
        (alone,) = family.run_adapter(hf, family.run_tower(hf, family.features(both[1:])))
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
    audio = [heard[k] for k in mb.clips] if mb.clips else None
    return mb, model.response_logits(**mb.inputs, audio=audio)


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
    features = family.features([CLIPS["a"]])
    audio = {"features": features} if "tower" in train else {"audio": model.encode(features)}
    logits = model.response_logits(**mb.inputs, **audio)
    torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None]).sum().backward()
    moved = {family.part_of(n) for n, p in model.hf.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == set(train)


def test_a_dummy_clip_changes_no_text_answer(family) -> None:
    model = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm", "adapter"])
    mb, without = packed_logits(model, [sample(family, "no clip", [311, 312, 2])])
    dummy = model.encode(family.features([CLIPS["b"]]))
    logits = model.response_logits(**mb.inputs, audio=dummy)
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


def test_prompt_ids_of_both_views_of_a_long_conversation(family) -> None:
    waves = {"long": np.zeros(31 * 16000 + 7, np.float32), **CLIPS}

    def audio(key: str) -> dict[str, str]:
        return {"type": "audio", "path": key, "transcript": f"what is {'one' if key == 'a' else 'two'} plus two"}

    turns = (
        {"role": "system", "content": "repeat"},
        {"role": "user", "content": [audio("b"), {"type": "text", "text": " and "}, audio("long")]},
        {"role": "assistant", "content": "one two."},
        {"role": "user", "content": [{"type": "text", "text": "sort"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two."}]},
        {"role": "user", "content": [audio("a")]},
    )
    prompt = Prompt("p", turns)
    found = {}
    for view in VIEWS:
        keys = audio_paths(prompt) if view == "speech" else []
        messages = render(prompt, view)
        text = family.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        heard = {"audio": [waves[k] for k in keys], "sampling_rate": 16000} if keys else {}
        found[view] = family.prompt_ids(messages, [len(waves[k]) for k in keys])
        assert found[view] == family.processor(text=text, return_tensors="pt", **heard)["input_ids"][0].tolist()
    assert found["speech"].count(family.audio_id) == 14 + 750 + 50
    assert not set(found["text"]) & set(family.banned_ids)
    assert family.tokenizer.decode(found["text"]).count("plus two") == 3


@pytest.mark.parametrize("samples", [1, 160, 161, 320, 321, 480, 481, 640, 641, 1601, 123457, 478401])
def test_more_lengths_of_audio(family, samples: int) -> None:
    """Down to clips that leave no embedding; the features say the same as the count."""
    wave = np.zeros(samples, np.float32)
    ids = family.processor(text="<|AUDIO|>", audio=[wave], sampling_rate=16000, return_tensors="pt")["input_ids"][0]
    assert family.audio_tokens(samples) == int((ids == family.audio_id).sum())
    assert int(family.features([wave])["frames"][0]) == -(-samples // 160)


def full_window(family, hf, waves: list[np.ndarray]) -> list[torch.Tensor]:
    """Embeddings that transformers' own forward makes of clips, each in its 30 s window."""
    caught: list[torch.Tensor] = []
    hook = hf.model.multi_modal_projector.register_forward_hook(lambda m, a, out: caught.append(out))
    try:
        with torch.no_grad():
            text = "<|AUDIO|>" * len(waves)
            hf(**family.processor(text=text, audio=waves, sampling_rate=16000, return_tensors="pt"))
    finally:
        hook.remove()
    lengths = [family.audio_tokens(len(w)) for w in waves]
    return [row[:n] for row, n in zip(caught[0], lengths, strict=True)]


def test_wherever_the_window_is_cut(family, hf) -> None:
    """Every remainder of the strides, near 30 s and beyond: alone, and beside a longer clip."""
    rng = np.random.default_rng(0)
    lengths = [160 * f - r for f, r in zip(range(60, 68), (0, 1, 159, 80, 0, 1, 159, 80), strict=True)]
    lengths += [160 * 2984, 160 * 2991 + 1, 480000, 500000]
    waves = [rng.standard_normal(n).astype(np.float32) / 10 for n in lengths]
    expected = full_window(family, hf, waves)
    with torch.no_grad():
        alone = [family.run_adapter(hf, family.run_tower(hf, family.features([w])))[0] for w in waves]
        beside = family.run_tower(hf, family.features([waves[i] for i in (3, 11, 0)]))
        beside = family.run_adapter(hf, beside)
    for i, (ours, theirs) in enumerate(zip(alone, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, i=i: f"{lengths[i]}: {m}")
    for ours, i in zip(beside, (3, 11, 0), strict=True):
        torch.testing.assert_close(ours, expected[i], atol=1e-5, rtol=1e-5)


def test_a_dummy_clip_through_a_trained_tower_counts_for_nothing(family, hf) -> None:
    with torch.no_grad():
        _, without = packed_logits(SpeechLM(hf, family, ["llm"]), [sample(family, "no clip", [311, 312, 2])])
    model = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm", "adapter", "tower"])
    mb = collate([sample(family, "no clip", [311, 312, 2])])
    logits = model.response_logits(**mb.inputs, features=family.features([CLIPS["b"]]))
    torch.testing.assert_close(logits, without, atol=0, rtol=0)
    torch.log_softmax(logits, -1)[..., 300].sum().backward()
    for name, p in model.hf.named_parameters():
        if family.part_of(name) != "llm" and "embed_positions" not in name:
            assert p.grad is not None and float(p.grad.abs().max()) == 0.0, name  # every rank's collectives see it
    assert model.hf.lm_head.weight.grad.abs().max() > 0


def test_clips_and_placeholders_must_agree(family, hf) -> None:
    model = SpeechLM(hf, family, ["llm"])
    mb = collate([sample(family, "a clip", [300, 2])])
    heard = model.encode(family.features([CLIPS["a"]]))[0]
    with pytest.raises(AssertionError, match="50 audio placeholders, 49 audio embeddings"):
        model.response_logits(**mb.inputs, audio=[heard[:-1]])
    with pytest.raises(AssertionError, match="dropped an audio part"):
        family.prompt_ids(CHATS["no clip"][0], [16000])


def test_bfloat16_log_probs_of_its_own_answer(family) -> None:
    """Forward and backward with everything trained; the answer is what the student would say."""
    exact = SpeechLM(family.load(torch.float32, "sdpa"), family, ["llm"])
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 8 and (not answer or answer[-1] != family.eos_ids[0]):
            mb, logits = packed_logits(exact, [sample(family, "a clip", [*answer, 0])])
            answer.append(int(logits[0, -1].argmax()))
        mb, logits = packed_logits(exact, [sample(family, "a clip", answer)])
        want = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])
    model = SpeechLM(family.load(torch.bfloat16, "sdpa"), family, ["llm", "adapter", "tower"])
    logits = model.response_logits(**mb.inputs, features=family.features([CLIPS["a"]]))
    assert logits.dtype == torch.float32 and len(answer) > 1
    logp = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])
    torch.testing.assert_close(logp, want, atol=0.1, rtol=0)
    logp.sum().backward()
    trained = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
    assert "model.audio_tower.embed_positions.weight" not in trained  # fixed sinusoids in every checkpoint
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in trained.values())
    assert {family.part_of(n) for n, p in trained.items() if p.grad.abs().max() > 0} == {"llm", "adapter", "tower"}


def test_every_tensor_of_the_shipped_file_is_a_parameter_under_its_name(family, hf) -> None:
    shipped = load_file(f"{STUDENT}/model.safetensors")
    parameters = dict(hf.named_parameters())
    assert sorted(map(family.to_vllm, parameters)) == sorted(shipped)
    for name, p in parameters.items():
        assert torch.equal(p, shipped[family.to_vllm(name)]), name
    sizes = dict.fromkeys(("tower", "adapter", "llm"), 0)
    for name in parameters:
        sizes[family.part_of(name)] += 1
    assert sizes == {"tower": 22, "adapter": 2, "llm": 51}


def test_vllm_knows_these_names_as_they_are(family, hf) -> None:
    """Read from vLLM's source, which takes long to import: its modules, and that its loader renames nothing."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")

    def class_of(file: str, name: str) -> ast.ClassDef:
        tree = ast.parse((Path(spec.origin).parent / "model_executor/models" / file).read_text())
        return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)

    def modules(node: ast.ClassDef) -> set[str]:
        targets = [t for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets]
        return {t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}

    whole = class_of("qwen2_audio.py", "Qwen2AudioForConditionalGeneration")
    names = [family.to_vllm(n).split(".") for n, _ in hf.named_parameters()]
    assert {n[0] for n in names} <= modules(whole)
    assert {n[1] for n in names if n[0] == "language_model"} <= modules(class_of("qwen2.py", "Qwen2ForCausalLM"))
    assert "mapper" not in ast.unparse(whole)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    teacher = str(Path(STUDENT).parent / "teacher")
    with pytest.raises(UserError, match=f"{teacher}: model_type 'qwen2' is not supported; supported: .*qwen2_audio"):
        family_of(teacher)
    with pytest.raises(UserError, match="no loadable config"):
        family_of(str(tmp_path))
