"""What every teacher gives: scores of the same tokens, in the text view."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from opd.config.schema import Config
from opd.models.base import Family, control_ids
from opd.objectives.token_loss import Logits
from opd.settings import UserError, first_line
from opd.teachers.tokenizers import check_tokenizers
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
