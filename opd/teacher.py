"""The teacher reads the text view and scores the student's tokens: a local model, or a vLLM server.

No audio ever reaches it: prompts are rendered in the text view here and nowhere else. Shape legend in opd/types.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd.config import Config, UserError
from opd.http import Request, ServerError, post_all
from opd.models.base import Family
from opd.objectives import EXCLUDED
from opd.types import Message, Prompt, Rollout, Sample, ScoredRollout
from opd.views import render

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Reply = tuple[tuple[int, ...], bool]  # token ids with end of turn, truncated


class Teacher(Protocol):
    """Seam: a frozen text LLM that shares the student's tokenizer."""

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        """Log-probabilities of each rollout's own token ids, at temperature 1, in the text view."""
        ...

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        """Greedy responses to the text view."""
        ...


class _Reader:
    """Tokenises text views with the teacher's own tokenizer and chat template."""

    def __init__(self, config: Config, family: Family) -> None:
        self.config, self.family = config, family
        try:
            self.tokenizer = family.text_tokenizer(config.teacher.path)
        except (OSError, ValueError) as e:
            raise UserError(f"teacher.path {config.teacher.path}: no loadable tokenizer: {_first_line(e)}") from e
        check_tokenizers(family, self.tokenizer, config.teacher.path)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of the text view with the generation prompt."""
        return text_prompt_ids(self.family, self.tokenizer, render(prompt, "text"))


class LocalTeacher(_Reader):
    """A Hugging Face model in the learner process; also gives full-vocabulary rows."""

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(config, family)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                config.teacher.path, dtype=DTYPES[config.teacher.dtype], trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as e:
            raise UserError(f"teacher.path {config.teacher.path}: not loadable: {_first_line(e)}") from e
        self.model.eval().requires_grad_(False).to(device)
        self.device = device
        self.banned = torch.zeros(family.vocab_size, dtype=torch.bool, device=device)
        self.banned[family.banned_ids] = True
        self._check_head()

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of last hidden states [..., H]; some LLMs scale them."""
        return self.model.get_output_embeddings()(hidden).float() / getattr(self.model.config, "logits_scaling", 1.0)

    @torch.no_grad()
    def _check_head(self) -> None:
        """An LLM may do to its logits what is not known here: its log-probs would then be wrong, silently."""
        ids = torch.arange(8, device=self.device)[None]
        whole = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self._head(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        if not torch.allclose(whole, ours, atol=0.01 * float(whole.abs().max()), rtol=0.01):
            raise UserError(
                f"teacher.path {self.config.teacher.path}: {type(self.model).__name__} does more to its logits than "
                "its output layer and logits_scaling; have vLLM serve it: teacher.kind=server"
            )

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        from trl.trainer.utils import selective_log_softmax

        pairs = [(self.prompt_ids(r.prompt), r.token_ids) for r in rollouts]
        out: list[ScoredRollout | None] = [None] * len(rollouts)
        for chunk, rows in self._rows(pairs):
            targets = torch.zeros(rows.shape[:2], dtype=torch.long, device=self.device)
            for j, i in enumerate(chunk):
                targets[j, : len(pairs[i][1])] = torch.tensor(pairs[i][1], device=self.device)
            logps = selective_log_softmax(rows, targets).cpu().numpy()
            for j, i in enumerate(chunk):
                out[i] = ScoredRollout(rollouts[i], logps[j, : len(pairs[i][1])].astype(np.float32))
        return [s for s in out if s is not None]

    def logits(self, samples: list[Sample], steps: int) -> Tensor:
        """Teacher logits [B, T, V] of samples' responses, in their order; banned ids and ids it lacks at EXCLUDED."""
        rollouts = [s.scored.rollout for s in samples]
        pairs = [(self.prompt_ids(r.prompt), r.token_ids) for r in rollouts]
        out = torch.zeros(len(pairs), steps, len(self.banned), device=self.device)
        for chunk, rows in self._rows(pairs):
            out[chunk, : rows.shape[1]] = rows
        return out

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        ids = [self.prompt_ids(p) for p in prompts]
        replies: list[Reply] = []
        per_call = max(1, self.config.teacher.batch_tokens // (max(map(len, ids)) + max_tokens)) if ids else 1
        for i in range(0, len(ids), per_call):
            replies += self._generate(ids[i : i + per_call], max_tokens)
        return replies

    @torch.no_grad()
    def _generate(self, ids: list[list[int]], max_tokens: int) -> list[Reply]:
        from transformers import GenerationConfig

        longest = max(map(len, ids))
        tokens = torch.tensor([[0] * (longest - len(i)) + i for i in ids], device=self.device)
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=self.device)
        greedy = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self.family.eos_ids,
            pad_token_id=self.family.eos_ids[0],
            suppress_tokens=[i for i in self.family.banned_ids if i < self.model.config.vocab_size] or None,
        )
        out = self.model.generate(tokens, attention_mask=mask, generation_config=greedy)[:, longest:].tolist()
        return [_cut(row, self.family.eos_ids) for row in out]

    @torch.no_grad()
    def _rows(self, pairs: list[tuple[list[int], tuple[int, ...]]]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, logits [B, T, V] of the responses) by chunks of at most batch_tokens padded tokens."""
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        while order:
            chunk = [order.pop()]
            longest = sum(map(len, pairs[chunk[0]]))
            while order and (len(chunk) + 1) * longest <= self.config.teacher.batch_tokens:
                chunk.append(order.pop())
            ids = torch.zeros(len(chunk), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            steps = max(len(pairs[i][1]) for i in chunk)
            positions = torch.zeros(len(chunk), steps, dtype=torch.long)
            for j, i in enumerate(chunk):
                p, y = pairs[i]
                ids[j, : len(p) + len(y)] = torch.tensor([*p, *y])
                mask[j, : len(p) + len(y)] = 1
                positions[j, : len(y)] = torch.arange(len(p) - 1, len(p) + len(y) - 1)
            yield chunk, self._forward(ids.to(self.device), mask.to(self.device), positions.to(self.device))

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self._head(rows)
        out = torch.full((*logits.shape[:2], len(self.banned)), EXCLUDED, device=logits.device)
        shared = min(logits.shape[-1], len(self.banned))
        out[..., :shared] = logits[..., :shared]
        return out.masked_fill(self.banned, EXCLUDED)


class ServerTeacher(_Reader):
    """A vLLM server that scores token ids by prompt log-probs.

    It normalises over its full vocabulary: ids that the student may not use (audio placeholders, padded rows) are not
    masked there. A text LLM gives them next to nothing, so the difference to the local teacher is of that size.
    """

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        super().__init__(config, family)
        self.first = dist.get_rank() if dist.is_initialized() else 0  # not every rank begins with the same server

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        prompts = [self.prompt_ids(r.prompt) for r in rollouts]
        bodies = [
            {"prompt": [*p, *r.token_ids], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "top_p": 1.0}
            | {"return_token_ids": True, "add_special_tokens": False}
            for p, r in zip(prompts, rollouts, strict=True)
        ]
        scored = []
        for r, p, answer in zip(rollouts, prompts, self._ask("/v1/completions", bodies), strict=True):
            entries = answer["choices"][0].get("prompt_logprobs") or []
            if len(entries) != len(p) + len(r.token_ids):
                wanted = len(p) + len(r.token_ids)
                raise ServerError(f"teacher: expected {wanted} prompt log-probs, found {len(entries)}")
            values = [e[str(y)]["logprob"] for e, y in zip(entries[len(p) :], r.token_ids, strict=True)]
            scored.append(ScoredRollout(r, np.array(values, np.float32)))
        return scored

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        bodies = [
            {"prompt": self.prompt_ids(p), "max_tokens": max_tokens, "temperature": 0.0, "return_token_ids": True}
            | {"stop_token_ids": self.family.eos_ids, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
            | {"skip_special_tokens": False}
            for p in prompts
        ]
        answers = self._ask("/v1/completions", bodies)
        return [_cut(a["choices"][0]["token_ids"], self.family.eos_ids) for a in answers]

    def _ask(self, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
        requests = [Request(path, {"model": "teacher"} | b, len(b["prompt"]) + b["max_tokens"]) for b in bodies]
        r = self.config.rollout
        return [a.content for a in post_all(self.config.teacher.urls, requests, r.concurrency, r.timeout_s, self.first)]


TEACHERS: dict[str, type[LocalTeacher] | type[ServerTeacher]] = {"local": LocalTeacher, "server": ServerTeacher}


def make_teacher(config: Config, family: Family, device: torch.device) -> LocalTeacher | ServerTeacher:
    """The teacher that the recipe asks for."""
    return TEACHERS[config.teacher.kind or "local"](config, family, device)


def text_prompt_ids(family: Family, tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a chat in the text view, with the generation prompt, as a text teacher reads it."""
    return family.text_ids(tokenizer, [_plain(m) for m in messages])


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
            f"(id: student / teacher): {shown}; choose a teacher with the student's tokenizer"
        )
    for text in texts:
        a, b = (t(text, add_special_tokens=False).input_ids for t in (family.tokenizer, teacher))
        if a != b:
            raise UserError(f"teacher.path {teacher_path}: same vocabulary, but {text[:80]!r} becomes {b}, not {a}")


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Text templates of many LLMs take strings only: join the text parts."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(p["text"] for p in content)}


def _cut(ids: list[int], eos: list[int]) -> Reply:
    end = next((i for i, t in enumerate(ids) if t in eos), None)
    return (tuple(ids), True) if end is None else (tuple(ids[: end + 1]), False)


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
