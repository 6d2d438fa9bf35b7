"""A teacher with another tokenizer, through TRL's GOLD: universal logit distillation (arXiv 2402.12030).

The teacher reads the transcript and, as text, what was answered. TRL aligns the two tokenisations of that text at the
bytes where both end a token, and compares the sorted probabilities of each aligned group. Shape legend in opd/types.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.config.objective import ObjectiveConfig
from opd.config.schema import Config
from opd.models.base import Family
from opd.objectives.token_loss import Aligned
from opd.teachers.base import Reply, check_byte_level, trl_module
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, Sample

REPLACED = "\ufffd"  # what decoding puts where bytes are no text


@dataclass(frozen=True)
class Retold:
    """A response in both tokenisations. Offsets: first byte of a token in the text, and the one behind its last."""

    ids: list[int]  # the student's, [T] or fewer: up to where they are text
    offsets: list[tuple[int, int]]
    theirs: list[int]  # the teacher's
    their_offsets: list[tuple[int, int]]


class CrossTokenizerTeacher(LocalTeacher):
    """A local model that need not share the student's tokenizer: it gives neither scores nor logits of its tokens.

    Both tokenizers must be byte-level BPE, as those of Qwen, Llama 3 and Mistral v0.3 are.
    """

    gives_logits = gives_scores = False

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        super().__init__(config, family, device)
        size = self.model.config.vocab_size
        self._knows(size, [], [self.tokenizer.eos_token_id], size)
        self.loss = uld_loss(config.objective, family.tokenizer, self.tokenizer, device)

    def check(self) -> None:
        check_byte_level(self.family, self.tokenizer, self.config.teacher.path)

    def aligned(self, samples: list[Sample]) -> Aligned:
        """The loss of a response [T, V] of `samples`, by its number; reads all of them at once.

        A response needs its whole logits, and the teacher's, for probabilities are sorted over the vocabulary: memory
        is that of the longest response instead of a chunk.
        """
        retold = [self.retell(s.scored.rollout) for s in samples]
        prompts = [self.prompt_ids(s.scored.rollout.prompt) for s in samples]
        states = self._read([(p, tuple(r.theirs)) for p, r in zip(prompts, retold, strict=True)])
        ends = np.cumsum([len(r.theirs) for r in retold])

        def loss(logits: Tensor, i: int) -> Tensor:
            r = retold[i]
            if not r.ids:
                return logits.sum() * 0.0
            teacher = self._project(states[ends[i] - len(r.theirs) : ends[i]])
            ours, theirs = (_given(*a, logits.device) for a in ((r.ids, r.offsets), (r.theirs, r.their_offsets)))
            return self.loss(logits[None, : len(r.ids)], teacher[None], *chain(*zip(ours, theirs, strict=True)))

        return loss

    def retell(self, rollout: Rollout) -> Retold:
        """The response as the teacher would have put it; ends of turn are aligned with each other.

        From the first byte on that is no text, such as half a character at the length limit, nothing is aligned.
        """
        trl = trl_module("utils")
        tokenizer, eos = self.family.tokenizer, self.family.eos_ids
        ended = rollout.token_ids[-1] in eos
        ids = list(rollout.token_ids[:-1] if ended else rollout.token_ids)
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, *lost = text.split(REPLACED, 1)
        size = len(text.encode())
        ends = np.cumsum([trl.piece_byte_len(t) for t in tokenizer.convert_ids_to_tokens(ids)]).tolist()
        kept = sum(end <= size for end in ends)
        offsets = list(zip([0, *ends[: kept - 1]], ends[:kept], strict=True)) if kept else []
        ((theirs, their_offsets),) = trl.encode_with_byte_offsets(self.tokenizer.backend_tokenizer, [text])
        ids = ids[:kept]
        if ended and not lost:
            ids, theirs = [*ids, rollout.token_ids[-1]], [*theirs, self.eos_ids[0]]
            offsets, their_offsets = [*offsets, (size, size)], [*their_offsets, (size, size)]
        if not ids or not theirs:  # the teacher reads something all the same
            return Retold([], [], [self.eos_ids[0]], [(0, 0)])
        return Retold(ids, offsets, theirs, their_offsets)

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        """Greedy responses, put into the student's tokens."""
        found = []
        for ids, truncated in super().respond(prompts, max_tokens):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            ours = self.family.tokenizer(text, add_special_tokens=False).input_ids
            ours = [i for i in ours if i not in self.family.banned_ids] + ([] if truncated else [self.family.turn_end])
            found.append((tuple(ours[:max_tokens]), truncated or len(ours) > max_tokens))
        return found


def uld_loss(o: ObjectiveConfig, student: Any, teacher: Any, device: torch.device) -> Any:
    """TRL's ULDLoss. With objective.hybrid tokens that both vocabularies have are compared directly, by the JSD of
    objective.beta; only the others are sorted.

    Logits are read one place before their token ("bayesian"), where they predict it; TRL's default reads them at the
    token itself. Ends of turn are part of what is aligned.
    """
    settings = {"crossentropy_weight": 0.0, "distillation_weight": 1.0, "token_merge_strategy": "bayesian"}
    settings |= {"student_temperature": 1.0, "teacher_temperature": 1.0, "use_hybrid_loss": o.hybrid}
    settings |= {"skip_student_eos": False, "skip_teacher_eos": False}
    named = {f"uld_{k}": v for k, v in settings.items()} | {"use_extended_uld": True, "beta": o.beta}
    return trl_module("gold.gold_trainer").ULDLoss(SimpleNamespace(**named), student, teacher, device)


def _given(ids: list[int], offsets: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [1, 1 + T], ids [1, 1 + T] and offsets [1, 1 + T, 2] as ULDLoss takes them, after a prompt of one."""
    labels = torch.tensor([[-100, *ids]], device=device)
    return labels, labels.clamp(min=0), torch.tensor([[(0, 0), *offsets]], device=device)
