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

from opd.batch import all_reduce
from opd.config import Config, UserError
from opd.http import Request, ServerError, post_all
from opd.learner import DTYPES, deepspeed_settings
from opd.models.base import Family
from opd.objectives import EXCLUDED
from opd.rollout import BAN
from opd.sharding import load_sharded
from opd.types import Message, Prompt, Rollout, Sample, ScoredRollout
from opd.views import render

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
    """A Hugging Face model in the learner process; also gives full-vocabulary rows.

    With teacher.shard each rank holds a part of it (ZeRO-3). Every forward pass then takes all ranks: each of them
    calls a method as often as the others, if only with nothing to read, and idle passes make up for unequal work.
    """

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        super().__init__(config, family)
        self.sharded, self.device = config.teacher.shard, device
        settings = inference_settings(config) if self.sharded else None

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(
                config.teacher.path, dtype=DTYPES[config.teacher.dtype], trust_remote_code=False, use_safetensors=True
            )

        try:
            self.model = load_sharded(load, settings) if settings else load()
        except (OSError, ValueError) as e:
            raise UserError(f"teacher.path {config.teacher.path}: not loadable: {_first_line(e)}") from e
        self.model.generation_config = GenerationConfig()  # the checkpoint's own would bend what is greedy
        self.model.eval().requires_grad_(False)
        if settings:
            import deepspeed

            self.engine, *_ = deepspeed.initialize(model=self.model, config=settings)  # its hooks gather and release
        else:
            self.model.to(device)
        self.banned = torch.zeros(family.vocab_size, dtype=torch.bool, device=device)
        self.banned[family.banned_ids] = True

    def _idle(self, calls: int) -> int:
        """How many more calls of a sharded model some other rank makes than this one."""
        return int(all_reduce(torch.tensor(float(calls)), "max")) - calls if self.sharded else 0

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
        per_call = max(1, self.config.teacher.batch_tokens // (max(map(len, ids)) + max_tokens)) if ids else 1
        chunks = [ids[i : i + per_call] for i in range(0, len(ids), per_call)]
        idle = self._idle(len(chunks))
        replies = [reply for chunk in chunks for reply in self._generate(chunk, max_tokens)]
        for _ in range(idle):
            self._generate([[0]], 1)  # goes on until every rank is done
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
        out = self.model.generate(tokens, attention_mask=mask, generation_config=greedy, synced_gpus=self.sharded)
        return [_cut(row, self.family.eos_ids) for row in out[:, longest:].tolist()]

    @torch.no_grad()
    def _rows(self, pairs: list[tuple[list[int], tuple[int, ...]]]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, logits [B, T, V] of the responses) by chunks of at most batch_tokens padded tokens."""
        chunks = _chunks([len(p) + len(y) for p, y in pairs], self.config.teacher.batch_tokens)
        idle = self._idle(len(chunks))
        for chunk in chunks:
            longest = sum(map(len, pairs[chunk[0]]))
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
        for _ in range(idle):
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            self._forward(ids, torch.ones_like(ids), ids[:, :1])

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The model's own logits [B, T, V] at `positions` [B, T] of `ids` [B, L]."""

        def rows(layer: Any, args: tuple[Tensor]) -> Tensor:
            return args[0].gather(1, positions[..., None].expand(-1, -1, args[0].shape[-1]))

        with self.model.get_output_embeddings().register_forward_pre_hook(rows):  # [B, L, V] would be large
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if logits.shape[1] != positions.shape[1]:
            raise UserError(
                f"teacher.path {self.config.teacher.path}: {type(self.model).__name__} makes its logits without its "
                "output layer; have vLLM serve it: teacher.kind=server"
            )
        out = torch.full((*logits.shape[:2], len(self.banned)), EXCLUDED, device=logits.device)  # float32
        shared = min(logits.shape[-1], len(self.banned))
        out[..., :shared] = logits[..., :shared]
        return out.masked_fill_(self.banned, EXCLUDED)


class ServerTeacher(_Reader):
    """A vLLM server that scores token ids by prompt log-probs.

    It normalises over its full vocabulary: ids that the student may not use (audio placeholders, padded rows) are not
    masked there. A text LLM gives them next to nothing, so the difference to the local teacher is of that size.
    """

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        from transformers import AutoConfig

        super().__init__(config, family)
        rows = AutoConfig.from_pretrained(config.teacher.path).get_text_config().vocab_size
        self.bans = {str(i): BAN for i in family.banned_ids if i < rows}
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
            | {"skip_special_tokens": False, "logit_bias": self.bans}
            for p in prompts
        ]
        answers = self._ask("/v1/completions", bodies)
        return [_cut(a["choices"][0]["token_ids"], self.family.eos_ids) for a in answers]

    def _ask(self, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
        requests = [Request(path, {"model": "teacher"} | b, len(b["prompt"]) + b["max_tokens"]) for b in bodies]
        r = self.config.rollout
        return [a.content for a in post_all(self.config.teacher.urls, requests, r.concurrency, r.timeout_s, self.first)]


def inference_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed settings of a sharded teacher: ZeRO-3, whatever the student's stage, with the recipe's offload_param
    and bucket sizes; nothing that an optimizer would need."""
    settings = deepspeed_settings(config)
    zero = {k: v for k, v in (settings.get("zero_optimization") or {}).items() if k != "offload_optimizer"}
    return settings | {
        "zero_optimization": zero | {"stage": 3},
        "bf16": {"enabled": config.teacher.dtype == "bfloat16"},
        "gradient_clipping": 0.0,
    }


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


def _chunks(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences, longest first, in chunks of at most `budget` padded tokens; a longer one is alone."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chunks = []
    while order:
        chunk = [order.pop()]
        while order and (len(chunk) + 1) * lengths[chunk[0]] <= budget:
            chunk.append(order.pop())
        chunks.append(chunk)
    return chunks


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Text templates of many LLMs take strings only: join the text parts."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(p["text"] for p in content)}


def _cut(ids: list[int], eos: list[int]) -> Reply:
    end = next((i for i, t in enumerate(ids) if t in eos), None)
    return (tuple(ids), True) if end is None else (tuple(ids[: end + 1]), False)


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
