"""A teacher with another tokenizer: what is aligned, TRL's loss called as we call it and as TRL does, its gradient."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_learner import ANSWERS, CLIPS, ONE, PROMPTS, STUDENT, WHOLE, _at_root, config, family, gradient, make_learner
from torch import Tensor

from opd.config.schema import Config
from opd.doctor.checks import Facts
from opd.doctor.tokenizers import stop_ids, templates, tokenizers
from opd.models.base import Family
from opd.settings import UserError
from opd.teachers.base import check_byte_level
from opd.teachers.cross_tokenizer import CrossTokenizerTeacher, Retold
from opd.teachers.registry import make_teacher
from opd.train.batch import make_batch, make_samples
from opd.types import BadAudio, Prompt, Rollout, Sample, ScoredRollout

__all__ = ["_at_root", "family"]  # fixtures

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLM whose byte-level tokens are others than the student's, with a template and an end of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("other")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    about = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>", "[U]", "[A]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["one two three four five sort the of them and", "what is one plus two"], about)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[U]' if m.role == 'user' else '[A]' }}{{ m.content }}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=300, bos_token_id=None, eos_token_id=0, **shape)
    model = AutoModelForCausalLM.from_config(settings)
    model.get_input_embeddings().weight.data.normal_(0, 3)
    model.save_pretrained(folder)
    return str(folder)


def uld(other: str, *more: str) -> Config:
    return config("objective.name=uld", f"teacher.path={other}", *more)


def teacher_of(family: Family, c: Config) -> CrossTokenizerTeacher:
    found = make_teacher(c, family, CPU)
    assert isinstance(found, CrossTokenizerTeacher) and not found.gives_logits and not found.gives_scores
    return found


def answer(family: Family, text: str, ended: bool = True) -> Rollout:
    ids = family.tokenizer(text, add_special_tokens=False).input_ids + [family.turn_end] * ended
    return Rollout(PROMPTS["a"], "text", tuple(ids), np.zeros(len(ids), np.float32), 0, not ended)


def pieces(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    return [text.encode()[a:b].decode() for a, b in offsets]


def test_control_tokens_of_the_teacher_alone_are_refused_too(family: Family, other: str) -> None:
    family.refuse_control("say [U] now")
    teacher_of(family, uld(other))
    with pytest.raises(BadAudio, match=r"contains \[U\], a control token"):
        family.prompt_ids([{"role": "user", "content": "say [U] now"}], [])
    family.readers.pop()


# ---- what is aligned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["one two three", "Zürich, 你好 🎧 .", " spaces \n at both ends "])
def test_both_tell_the_same_text(family: Family, other: str, text: str) -> None:
    teacher = teacher_of(family, uld(other))
    r = teacher.retell(answer(family, text))
    size = len(text.encode())
    for ids, offsets, tokenizer, eos in (
        (r.ids, r.offsets, family.tokenizer, family.turn_end),
        (r.theirs, r.their_offsets, teacher.tokenizer, 0),
    ):
        assert ids[-1] == eos and offsets[-1] == (size, size) and tokenizer.decode(ids[:-1]) == text
        assert [a for a, _ in offsets] == [0, *(b for _, b in offsets[:-1])]  # without gap or overlap
    assert r.ids != r.theirs


def test_what_has_no_end_or_is_no_text(family: Family, other: str) -> None:
    teacher = teacher_of(family, uld(other))
    cut = teacher.retell(answer(family, "one two", ended=False))
    assert family.turn_end not in cut.ids and 0 not in cut.theirs and pieces("one two", cut.offsets)[0] == "one"
    half = family.tokenizer("two 你", add_special_tokens=False).input_ids
    assert len(half) > 3  # the character is of several tokens
    for ended in (False, True):  # nothing behind the broken character is aligned, not even the end
        ids = (*half[:-1], *([family.turn_end] if ended else []))
        r = teacher.retell(Rollout(PROMPTS["a"], "text", ids, None, 0, not ended))
        assert family.tokenizer.decode(r.ids) == "two " and teacher.tokenizer.decode(r.theirs) == "two "
    nothing = teacher.retell(Rollout(PROMPTS["a"], "text", (half[-2],), None, 0, True))
    assert nothing == Retold([], [], [0], [(0, 0)])
    logits = torch.randn(1, family.vocab_size, requires_grad=True)
    sample = Sample(ScoredRollout(Rollout(PROMPTS["a"], "text", (half[-2],), None, 0, True), None), [1], [])
    loss = teacher.aligned([sample])(logits, 0)
    loss.backward()
    assert float(loss.detach()) == 0.0 and float(logits.grad.abs().max()) == 0.0


# ---- the loss --------------------------------------------------------------------------------------------------------


def by_hand(teacher: CrossTokenizerTeacher, rollout: Rollout, logits: Tensor) -> Tensor:
    """Sorted probabilities of each group that ends at the same byte, L1, averaged over groups (arXiv 2402.12030)."""
    r = teacher.retell(rollout)
    ids = torch.tensor([[*teacher.prompt_ids(rollout.prompt), *r.theirs]])
    with torch.no_grad():
        rows = teacher.model(input_ids=ids).logits[0, -len(r.theirs) - 1 : -1].double().softmax(-1)
    ours = logits[: len(r.ids)].double().softmax(-1)

    def groups(p: Tensor, ids: list[int], offsets: list[tuple[int, int]]) -> dict[Any, Tensor]:
        """By the byte where it ends: the last token's distribution times the probability of those before."""
        ends = [e for _, e in offsets]
        shared = {e for _, e in r.offsets} & {e for _, e in r.their_offsets}
        found, scale = {}, torch.ones((), dtype=torch.float64)
        for t, (end, i) in enumerate(zip(ends, ids, strict=True)):
            if end in shared:
                found[end, "end" if offsets[t][0] == end else ""] = p[t] * scale
                scale = torch.ones((), dtype=torch.float64)
            else:
                scale = scale * p[t, i]
        return found

    a, b = groups(ours, r.ids, r.offsets), groups(rows, r.theirs, r.their_offsets)
    assert a.keys() == b.keys() and len(a) < max(len(r.ids), len(r.theirs))  # tokens were merged
    width = max(ours.shape[1], rows.shape[1])

    def ranked(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.sort(descending=True).values, (0, width - len(x)))

    return torch.stack([(ranked(a[k]) - ranked(b[k])).abs().sum() for k in a]).mean()


@pytest.mark.parametrize("ended", [True, False])
def test_the_loss_of_a_response_is_what_its_paper_says(family: Family, other: str, ended: bool) -> None:
    teacher = teacher_of(family, uld(other))
    rollouts = [answer(family, t, ended) for t in ("one two six, three", "sort them: nine, one two")]
    samples = [Sample(ScoredRollout(r, None), [1], []) for r in rollouts]
    loss = teacher.aligned(samples)
    for i, r in enumerate(rollouts):
        logits = torch.randn(len(r.token_ids), family.vocab_size, generator=torch.Generator().manual_seed(i))
        logits[range(len(r.token_ids)), list(r.token_ids)] += 6  # probable enough that what is merged still counts
        logits.requires_grad_()
        got, want = loss(logits, i), by_hand(teacher, r, logits)
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5) and float(got.detach()) > 0.01
        (a,), (b,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max()) + 1e-7 and float(b.abs().max()) > 1e-4


@pytest.mark.parametrize("hybrid", [False, True])
def test_it_is_trls_own_on_trls_own_inputs(family: Family, other: str, hybrid: bool) -> None:
    """Prompt, answer and end as GOLD's trainer puts them together; the student's prompt has three tokens here."""
    from trl.experimental.gold.gold_trainer import build_teacher_inputs_from_texts

    teacher = teacher_of(family, uld(other, f"objective.hybrid={hybrid}"))
    text = "two and five"
    r = answer(family, text)
    logits = torch.randn(len(r.token_ids), family.vocab_size, generator=torch.Generator().manual_seed(0))
    got = teacher.aligned([Sample(ScoredRollout(r, None), [1], [])])(logits, 0)
    prompt = teacher.tokenizer.decode(teacher.prompt_ids(r.prompt))
    teacher.tokenizer.pad_token = "</s>"
    ids, labels, mask, offsets = build_teacher_inputs_from_texts(teacher.tokenizer, [prompt], [text])
    with torch.no_grad():
        rows = teacher.model(input_ids=ids, attention_mask=mask.long()).logits
    ours = torch.tensor([[5, 6, 7, *r.token_ids]])
    our_labels = torch.tensor([[-100] * 3 + list(r.token_ids)])
    whole = torch.cat([torch.zeros(2, family.vocab_size), logits, torch.zeros(1, family.vocab_size)])[None]
    our_offsets = torch.tensor([[(0, 0)] * 3 + teacher.retell(r).offsets])
    want = teacher.loss(whole, rows, our_labels, labels, ours, ids, our_offsets, offsets)
    assert float(got) == pytest.approx(float(want), rel=1e-5) and float(want) > 0


def test_hybrid_and_its_beta_reach_the_loss(family: Family, other: str) -> None:
    r = answer(family, "two and five")
    logits = torch.randn(len(r.token_ids), family.vocab_size, generator=torch.Generator().manual_seed(0))

    def loss(*settings: str) -> float:
        sample = Sample(ScoredRollout(r, None), [1], [])
        return float(teacher_of(family, uld(other, *settings)).aligned([sample])(logits, 0))

    plain, forward, reverse = (
        loss(*(f"objective.{s}" for s in settings))
        for settings in (["beta=1.0"], ["hybrid=true", "beta=0.0"], ["hybrid=true", "beta=1.0"])
    )
    assert plain == loss() and len({plain, forward, reverse}) == 3 and min(plain, forward, reverse) > 0


@pytest.mark.parametrize("budget", [WHOLE, ONE])
@pytest.mark.parametrize("average", ["response", "token"])
def test_a_step_weighs_responses_as_the_batch_does(family: Family, other: str, average: str, budget: int) -> None:
    c = uld(other, f"objective.average={average}", f"train.micro_batch_tokens={budget}", "objective.lambda=0.25")
    teacher, learner = teacher_of(family, c), make_learner(family, c)
    zeros = [np.zeros(len(a), np.float32) for _, _, a in ANSWERS]
    rollouts = [Rollout(PROMPTS[n], v, a, z, 0, False) for (n, v, a), z in zip(ANSWERS, zeros, strict=True)]
    samples = make_samples([ScoredRollout(r, None) for r in rollouts], CLIPS, family)
    mb, logits = learner.eval_logits(samples, CLIPS)
    alone = [float(by_loss(teacher, s, logits[i][mb.mask[i].bool()])) for i, s in enumerate(samples)]
    metrics = learner.step(make_batch(samples, CLIPS, c), 0, teacher).metrics
    want = 0.0
    for view, share in (("speech", 0.75), ("text", 0.25)):
        of = [(alone[i], len(a)) for i, (_, v, a) in enumerate(ANSWERS) if v == view]
        weights = [n for _, n in of] if average == "token" else [1] * len(of)
        want += share * float(np.average([x for x, _ in of], weights=weights))
    assert metrics["loss"] == pytest.approx(want, rel=1e-5) and metrics["uld"] > 0
    assert "mismatch/logprob" in metrics and "entropy" in metrics
    assert max(float(g.abs().max()) for g in gradient(learner).values()) > 1e-3


def by_loss(teacher: CrossTokenizerTeacher, sample: Sample, logits: Tensor) -> Tensor:
    return teacher.aligned([sample])(logits, 0)


# ---- around it -------------------------------------------------------------------------------------------------------


def test_its_answers_come_in_the_students_tokens(family: Family, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(family, uld(other))
    written = teacher.tokenizer("four five", add_special_tokens=False).input_ids

    def write(**arguments: Any) -> Tensor:
        prompt = arguments["input_ids"]
        return torch.cat([prompt, torch.tensor([[*written, 0]] * len(prompt))], 1)

    monkeypatch.setattr(teacher, "_write", write)
    ours = family.tokenizer("four five", add_special_tokens=False).input_ids
    assert teacher.respond([PROMPTS["a"]], 20) == [((*ours, family.turn_end), False)]
    assert teacher.respond([PROMPTS["a"]], 2) == [(tuple(ours[:2]), True)]


def test_no_other_objective_takes_it(family: Family, other: str) -> None:
    with pytest.raises(UserError, match=r"differs from the student's .* or objective.name=uld"):
        make_teacher(config(f"teacher.path={other}"), family, CPU)


def test_tokenizers_without_bytes_are_refused(family: Family) -> None:
    from tokenizers import Tokenizer, models

    words = SimpleNamespace(backend_tokenizer=Tokenizer(models.WordLevel()), eos_token_id=1)
    for found in (words, SimpleNamespace(eos_token_id=1)):
        with pytest.raises(UserError, match="teacher.path t: objective.name uld needs byte-level BPE tokenizers"):
            check_byte_level(family, found, "t")
    with pytest.raises(UserError, match="names no eos_token"):
        check_byte_level(
            family,
            SimpleNamespace(
                **{**vars(words), "backend_tokenizer": None, "eos_token_id": None}
                | {"backend_tokenizer": family.tokenizer.backend_tokenizer}
            ),
            "t",
        )


def test_its_checks(family: Family, other: str) -> None:
    part = {"type": "audio", "path": "a", "transcript": "what is one plus two"}
    facts = Facts(uld(other))
    facts.family, facts.student, facts.teacher = family, STUDENT, other
    facts.prompts["data.train"] = [Prompt("p", ({"role": "user", "content": [part]},), response="three.")]
    assert tokenizers(facts) == "both are byte-level: objective uld aligns them"
    assert templates(facts) == "transcripts, generation prompt and end of turn are there"
    assert "both chat templates end turns so" in stop_ids(facts)
