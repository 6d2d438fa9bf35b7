"""A teacher on vLLM servers, asked for the log-probs of given tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from opd.config.schema import Config
from opd.inference.client import BAN, Request, given, post_all
from opd.models.base import Family
from opd.objectives.token_loss import Logits
from opd.teachers.base import Reply, TextReader, asked_ids, reply_of
from opd.types import Prompt, Rollout, Sample, ScoredRollout


class ServerTeacher(TextReader):
    """A vLLM server that scores token ids by prompt log-probs.

    It normalises over its full vocabulary: ids that the student may not use (audio placeholders, padded rows) are not
    masked there. A text LLM gives them next to nothing, so the difference to the local teacher is of that size.
    """

    gives_logits = False

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        from transformers import AutoConfig

        super().__init__(config, family)
        size = AutoConfig.from_pretrained(config.teacher.path).get_text_config().vocab_size
        self.bans = {str(i): BAN for i in family.banned_ids if i < size}
        self.usable = frozenset(range(family.vocab_size)) - frozenset(family.banned_ids)
        self.first = dist.get_rank() if dist.is_initialized() else 0  # not every rank begins with the same server

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        prompts = [self.prompt_ids(r.prompt) for r in rollouts]
        best = self.config.objective.top_k if self.config.objective.top_of else 0
        bodies = [
            {"prompt": [*p, *r.token_ids], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": best, "top_p": 1.0}
            | {"return_token_ids": True, "add_special_tokens": False}
            for p, r in zip(prompts, rollouts, strict=True)
        ]
        scored = []
        for r, p, answer in zip(rollouts, prompts, self._ask(bodies), strict=True):
            entries = answer["choices"][0].get("prompt_logprobs")
            values = given(entries, [*p, *r.token_ids], len(r.token_ids), "teacher")
            scored.append(ScoredRollout(r, values, *self._top(r, entries[len(p) :])))
        return scored

    def _top(self, rollout: Rollout, entries: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        """With objective.top_k: ids [T, K], -1 where there is none, and log-probs [T, K].

        A server tells the log-probs of its own K best ids and of the token itself. Of the student's K best ids those
        that are not among them are left to the bucket of all others, which keeps the divergence a lower bound. Of the
        teacher's those that the student may not use are left out: it could never follow there.
        """
        o = self.config.objective
        if o.top_of is None or o.top_k is None:
            return ()
        asked = asked_ids(rollout) if o.top_of == "student" else None
        ids = np.full((len(entries), o.top_k), -1, np.int64)
        logp = np.zeros((len(entries), o.top_k), np.float32)
        for t, told in enumerate(entries):
            known = {int(i): e["logprob"] for i, e in told.items() if asked is not None or e["rank"] <= o.top_k}
            wanted = [i for i in (known if asked is None else asked[t].tolist()) if i in known and i in self.usable]
            for k, i in enumerate(wanted):
                ids[t, k], logp[t, k] = i, known[i]
        return ids, logp

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        return self._written(prompts, max_tokens, [{"temperature": 0.0}] * len(prompts))

    def sample(self, prompts: list[Prompt], max_tokens: int, seeds: list[int]) -> list[Reply]:
        """A response to each text view, sampled at temperature 1, in the student's tokens."""
        return self._written(prompts, max_tokens, [{"temperature": 1.0, "seed": s} for s in seeds])

    def _written(self, prompts: list[Prompt], max_tokens: int, how: list[dict[str, Any]]) -> list[Reply]:
        bodies = [
            {"prompt": self.prompt_ids(p), "max_tokens": max_tokens, "return_token_ids": True}
            | {"stop_token_ids": self.family.eos_ids, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
            | {"skip_special_tokens": False, "logit_bias": self.bans}
            | one
            for p, one in zip(prompts, how, strict=True)
        ]
        return [reply_of(a["choices"][0]["token_ids"], self.family.eos_ids) for a in self._ask(bodies)]

    def logits(self, samples: list[Sample]) -> Logits:
        raise AssertionError("a server gives no logits; who asks looks at gives_logits")

    def _ask(self, bodies: list[dict[str, Any]]) -> list[Any]:
        r, path = self.config.rollout, "/v1/completions"
        requests = [Request(path, {"model": "teacher"} | b, len(b["prompt"]) + b["max_tokens"]) for b in bodies]
        return [a.content for a in post_all(self.config.teacher.urls, requests, r.concurrency, r.timeout_s, self.first)]
