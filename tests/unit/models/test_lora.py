"""LoRA on the tiny student: gradients by the chain rule, merging by value, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small_learner import (
    CLIPS,
    STUDENT,
    WHOLE,
    XOPD,
    Reference,
    _at_root,
    assert_same_gradient,
    family,
    gradient,
    make_learner,
    one_step,
    perturb,
    reference,
)
from small_learner import config as config_of
from torch import Tensor

from opd.config.schema import Config, LoraConfig
from opd.models.base import Family
from opd.models.lora import ADAPTER, adaptable, adapted, adapters, pieces, targets
from opd.models.speech_lm import SpeechLM
from opd.settings import UserError
from opd.train import checkpoint
from opd.train.batch import make_batch

__all__ = ["_at_root", "family", "reference"]  # fixtures

ROOT = Path(__file__).parents[3]
FIRST = "model.language_model.layers.0.self_attn"


def config(*overrides: str) -> Config:
    return config_of("student.lora={r: 4, alpha: 12}", *overrides)


def student(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0, **lora: Any) -> SpeechLM:
    return SpeechLM(family.load(dtype, "sdpa"), family, ["llm"], LoraConfig(**lora), seed)


def merged(model: SpeechLM, trainable_only: bool = False) -> dict[str, Tensor]:
    return {p.name: p.value() for p in pieces(model.hf, trainable_only)}


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_the_full_ones_through_the_adapter(
    family: Family, reference: Reference, checkpointing: bool
) -> None:
    """dJ/dB = s dJ/dW A^T and dJ/dA = s B^T dJ/dW = 0 at B = 0, with transformers' own dJ/dW and s = alpha / r."""
    c = config(*XOPD)
    loss, want = reference.objective(c, lambda i: reference.xopd(c, i))
    learner = make_learner(family, c)
    if checkpointing:
        learner.model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    metrics = learner.step(make_batch(reference.samples(family, c), CLIPS, c), 0).metrics
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    layers = adapted(learner.model.hf)
    a = {n: m.lora_A[ADAPTER].weight.detach() for n, m in layers.items()}
    got = gradient(learner)
    assert got.keys() == {f"{n}.lora_{x}.{ADAPTER}.weight" for n in layers for x in "AB"}  # no base weight has any
    of_b = {n: g for n, g in got.items() if "lora_B" in n}
    assert_same_gradient(
        of_b, {f"{n}.lora_B.{ADAPTER}.weight": 3.0 * want[f"{n}.weight"] @ a[n].T for n in layers}, 1e-5
    )
    assert all(g.abs().max() == 0 for n, g in got.items() if "lora_A" in n)


def test_teacher_equal_to_student_is_a_step_of_zero(family: Family, reference: Reference) -> None:
    c = config(f"train.micro_batch_tokens={WHOLE}")
    _, _, metrics = one_step(family, c, reference.samples(family, c, own=True))
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-5) and metrics["grad_norm"] < 1e-4
    assert one_step(family, c, reference.samples(family, c))[2]["grad_norm"] > 0.1  # another teacher does move it


def test_steps_and_merging_leave_the_base_alone(family: Family, reference: Reference) -> None:
    c = config("student.train=[llm, adapter]", "optim.lr=1e-2", "optim.warmup_steps=0")
    learner = make_learner(family, c)
    hf = learner.model.hf
    start = {n: p.detach().clone() for n, p in hf.named_parameters() if not p.requires_grad}
    projector = hf.model.multi_modal_projector.linear.weight.detach().clone()
    for step in range(2):
        learner.step(make_batch(reference.samples(family, c), CLIPS, c), step)
        learner.optimizer.step()
        first, second = merged(learner.model), merged(learner.model)
        assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(p, start[n]) and p.grad is None for n, p in hf.named_parameters() if n in start)
    changed = {n for n, p in family.load(torch.float64, "sdpa").named_parameters() if not torch.equal(p, first[n])}
    audio = {n for n in first if n.startswith("model.multi_modal_projector.")}
    assert changed == {f"{n}.weight" for n in adapted(hf)} | audio  # `adapter`, the projector, is trained in full
    assert not torch.equal(projector, hf.model.multi_modal_projector.linear.weight)


def test_dropout_is_that_of_the_step(family: Family, reference: Reference) -> None:
    """A resumed run draws what the whole one drew."""
    c = config("student.lora.dropout=0.5")
    losses = []
    for step in (0, 1, 0):
        learner = make_learner(family, c)
        perturb(learner.model)
        torch.manual_seed(len(losses))
        losses.append(learner.step(make_batch(reference.samples(family, c), CLIPS, c), step).metrics["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_every_rank_draws_the_same_adapters(family: Family) -> None:
    drawn = []
    for seed, other in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(other)
        before = torch.get_rng_state()
        drawn.append([a.weight.detach() for a in adapters(student(family, seed=seed).hf) if "lora_A" in a.name])
        torch.manual_seed(other)
        assert torch.equal(before, torch.get_rng_state())
    same, differs = zip(*drawn[:2], strict=True), zip(drawn[0], drawn[2], strict=True)
    assert all(torch.equal(a, b) for a, b in same) and not any(torch.equal(a, b) for a, b in differs)


# ---- merging -------------------------------------------------------------------------------------------------------


def test_merging_by_hand(family: Family) -> None:
    model = student(family, r=2, alpha=3.0, targets=["layers.0.self_attn.q_proj"])
    (layer,) = adapted(model.hf).values()
    w, a, b = layer.base_layer.weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    with torch.no_grad():
        w.zero_(), a.zero_(), b.zero_()
        w[5, 7], a[0, 7], a[1, 7], b[5, 0], b[5, 1] = 1.0, 2.0, 3.0, 5.0, -1.0
    value = merged(model)[f"{FIRST}.q_proj.weight"]
    assert float(value[5, 7]) == 1.0 + 3.0 / 2 * (2 * 5 - 3) and int((value != 0).sum()) == 1


def test_bfloat16_is_rounded_once(family: Family) -> None:
    """The sum is made in float32: no more than half a unit in the last place of bfloat16 is off."""
    model = student(family, torch.bfloat16, r=4)
    assert {p.weight.dtype for p in adapters(model.hf)} == {torch.bfloat16}
    perturb(model)
    for name, layer in adapted(model.hf).items():
        w, a, b = (m.weight.detach().double() for m in (layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]))
        exact = w + layer.scaling[ADAPTER] * b @ a
        (piece,) = [p for p in pieces(model.hf, True) if p.name == f"{name}.weight"]
        off = (piece.value().double() - exact).abs()
        assert piece.value().dtype == torch.bfloat16 and bool((off <= exact.abs() * 2.0**-8 + 1e-6).all())


def test_the_merged_model_computes_what_the_learner_does(family: Family, reference: Reference) -> None:
    c = config()
    learner = make_learner(family, c)
    perturb(learner.model)
    plain: Any = make_learner(family, config_of())
    samples = reference.samples(family, c)
    before = plain.eval_logits(samples, CLIPS)[1]
    plain.model.hf.load_state_dict(merged(learner.model), strict=False)
    after, ours = plain.eval_logits(samples, CLIPS)[1], learner.eval_logits(samples, CLIPS)[1]
    torch.testing.assert_close(ours, after, atol=1e-5, rtol=1e-6)
    assert (before - after).abs().max() > 0.1


def test_a_block_goes_whole(family: Family) -> None:
    """vLLM holds q, k and v with their biases in one layer, of which an update must bring all or nothing."""
    model = student(family, r=4, targets=["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])
    perturb(model)
    sent, plain = merged(model, trainable_only=True), dict(family.load(torch.float32, "sdpa").named_parameters())
    assert sent.keys() == {
        n for n in plain if n.startswith((f"{FIRST}.", "model.language_model.layers.1.mlp.")) and "norm" not in n
    }
    assert {n for n in sent if not torch.equal(sent[n], plain[n])} == {
        f"{FIRST}.q_proj.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
    }


# ---- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["wq", "lm_head", "roj", "audio_tower.layers.0.self_attn.q_proj", "linear", ""])
def test_targets_that_match_nothing_are_refused(family: Family, target: str) -> None:
    with pytest.raises(UserError) as e:
        student(family, targets=["v_proj", target])
    assert f"student.lora.targets: expected names of the LLM's linear layers, found {target!r};" in str(e.value)
    assert "has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(e.value)


def test_targets_are_names_or_their_ends(family: Family) -> None:
    hf = family.outline()
    assert all(p.is_meta for p in hf.parameters())
    everything = adaptable(hf, family)
    assert targets(hf, family, LoraConfig()) == everything
    assert targets(hf, family, LoraConfig(targets=["v_proj", "layers.1.mlp.up_proj"])) == [
        n for n in everything if n.endswith(".v_proj") or n == "model.language_model.layers.1.mlp.up_proj"
    ]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "written"), [("[llm]", True), ("[llm, adapter]", False)])
def test_the_adapter_is_beside_the_merged_model(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, written: bool
) -> None:
    """Loading it by PEFT, and that it is all the difference, is tested for all families."""
    monkeypatch.setattr(dist, "barrier", lambda: None)
    c = config(f"student.train={train}")
    learner: Any = make_learner(family, c)
    learner.engine = SimpleNamespace(save_checkpoint=lambda *_, **__: None)
    perturb(learner.model)
    final = checkpoint.save(learner, str(tmp_path), 3, 1.0, keep=1)
    saved, shipped = load_file(final / "model/model.safetensors"), load_file(f"{STUDENT}/model.safetensors")
    assert saved.keys() == shipped.keys()
    assert (final / "adapter").is_dir() == written
    if written:
        assert {p.name for p in (final / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        state = load_file(final / "adapter/adapter_model.safetensors")
        assert len(state) == 2 * len(adapted(learner.model.hf))
        want = dict(learner.model.hf.named_parameters())[f"{FIRST}.q_proj.lora_B.{ADAPTER}.weight"]
        assert torch.equal(state[f"base_model.model.{FIRST}.q_proj.lora_B.weight"], want)
