"""What every teacher gives, scores of the same tokens in the text view, and whose tokenizer can be a teacher's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from opd.config.schema import Config
from opd.models.base import Family, control_ids
from opd.objectives.token_loss import Logits
from opd.settings import UserError, first_line
from opd.types import Prompt, Rollout, Sample, ScoredRollout, joined, render

Reply = tuple[tuple[int, ...], bool]  # token ids with end of turn, truncated


class Teacher(Protocol):
    """Seam: a frozen LLM that reads the text view. All but that of `uld` share the student's tokenizer."""

    gives_logits: bool  # whether `logits` is there to be asked
    gives_scores: bool  # whether `score` is

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """Log-probabilities of each rollout's own token ids, at temperature 1, in the text view."""

    def logits(self, samples: list[Sample]) -> Logits:
        """Logits of the samples' response tokens in the text view, one response after another."""

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        """Greedy responses to the text view, in the student's tokens."""


class TextReader:
    """Tokenises text views with the teacher's own tokenizer and chat template."""

    gives_scores = True

    def __init__(self, config: Config, family: Family) -> None:
        self.config, self.family = config, family
        try:
            self.tokenizer = family.text_tokenizer(config.teacher.path)
        except (OSError, ValueError) as e:
            raise UserError(f"teacher.path {config.teacher.path}: no loadable tokenizer: {first_line(e)}") from e
        self.check()
        family.readers.append((self.tokenizer, control_ids(self.tokenizer)))

    def check(self) -> None:
        """Refuse a tokenizer that is not the student's."""
        check_tokenizers(self.family, self.tokenizer, self.config.teacher.path)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of the text view with the generation prompt."""
        return self.family.text_ids(self.tokenizer, [joined(m) for m in render(prompt, "text")])


def asked_ids(rollout: Rollout) -> np.ndarray:
    """[T, K] ids that the student's sampler told of."""
    assert rollout.top_ids is not None, f"{rollout.prompt.id}: sampled without objective.top_k"
    return rollout.top_ids


def reply_of(ids: list[int], eos: list[int]) -> Reply:
    """The ids up to the first that ends a turn."""
    end = next((i for i, t in enumerate(ids) if t in eos), None)
    return (tuple(ids), True) if end is None else (tuple(ids[: end + 1]), False)


def check_byte_level(family: Family, teacher: Any, path: str) -> None:
    """Refuse a pair of tokenizers that cannot be aligned by bytes."""
    for setting, tokenizer in ((f"student.path {family.path}", family.tokenizer), (f"teacher.path {path}", teacher)):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not trl_module("utils").is_byte_level_tokenizer(backend):
            raise UserError(
                f"{setting}: objective.name uld needs byte-level BPE tokenizers, found {type(tokenizer).__name__}; "
                "choose another teacher, or one with the student's tokenizer for another objective"
            )
    if teacher.eos_token_id is None:
        raise UserError(f"teacher.path {path}: its tokenizer names no eos_token, which would end an answer")


def trl_module(name: str) -> Any:
    """A module of trl.experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of vLLM's version, which nothing here asks
        return import_module(f"trl.experimental.{name}")


TEXTS = (
    *("What is 12 plus 3? It's fifteen.", "1 234 567.89 and 10%, 3/4, 2e-5", "  spaces at both ends  "),
    *("Zürich, Привет, 你好, नमस्ते 🎧", "one line\nand another\n\n\tand a tab", "<b>no token</b> #1"),
)


def check_tokenizers(family: Family, teacher: Any, teacher_path: str, texts: Iterable[str] = TEXTS) -> None:
    """Refuse a teacher whose tokenizer gives any shared id another meaning, or other ids to any of the texts.

    The differing tokens are named. Ids that only the student has must be the audio-only ones, which are banned.
    """
    ours = {i: t for t, i in family.tokenizer.get_vocab().items()}
    theirs = {i: t for t, i in teacher.get_vocab().items()}
    banned = set(family.banned_ids)
    wrong = [i for i in sorted(ours.keys() | theirs.keys()) if i not in banned and ours.get(i) != theirs.get(i)]
    if wrong:
        shown = ", ".join(f"{i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in wrong[:5])
        raise UserError(
            f"teacher.path {teacher_path}: its tokenizer differs from the student's in {len(wrong)} ids "
            f"(id: student / teacher): {shown}; choose a teacher with the student's tokenizer, or objective.name=uld"
        )
    for text in texts:
        a, b = (t(text, add_special_tokens=False).input_ids for t in (family.tokenizer, teacher))
        if a != b:
            raise UserError(f"teacher.path {teacher_path}: same vocabulary, but {text[:80]!r} becomes {b}, not {a}")
