"""The student on vLLM servers: prompts in either view to sampled token ids with their log-probs."""

from __future__ import annotations

import sys
import zlib
from operator import itemgetter
from typing import Any

import numpy as np

from opd.config.schema import Config
from opd.inference.client import BAN, Answer, Request, Server, ServerError, given, on_each, post_all
from opd.models.base import Family
from opd.prompts.audio import to_base64_wav
from opd.types import Clips, Message, Prompt, Rollout, View, audio_paths, render, with_parts


class VllmSampler:
    """Chat requests to the student's servers: audio in, token ids and the sampler's log-probs out."""

    def __init__(self, config: Config, family: Family, urls: list[str], rank: int = 0) -> None:
        self.config, self.family, self.rank, self.version = config, family, rank, 0
        self.best = config.objective.top_k or 0 if config.objective.top_of == "student" else 0  # ids told per token
        self.servers = [Server(u, config.rollout.timeout_s) for u in urls]
        self._left_out: set[str] = set()

    def usable(self) -> list[str]:
        """URLs of the servers that hold the learner's weights; rank 0 tells once of each that is left out.

        Raises ServerError, naming both versions, when there is none.
        """
        found = on_each(self.servers, lambda server: server.get("/weight_info")["weight_version"])
        about = f"holds weights of version {{}}, the learner is at {self.version}"
        versions = zip((s.url for s in self.servers), found, strict=True)
        others = {url: f"{url}: {about.format(v)}" for url, v in versions if v != str(self.version)}
        usable = [s.url for s in self.servers if s.url not in others]
        if not usable:
            remedy = "the push was lost or the server was restarted: start the same command again to resume"
            raise ServerError(f"{next(iter(others.values()))}; {remedy}")
        for url, told in others.items():
            if self.rank == 0 and url not in self._left_out:
                print(f"opd: warning: {told}: left out until the next push", file=sys.stderr, flush=True)
        self._left_out = set(others)
        return usable

    def sample(
        self, jobs: list[tuple[Prompt, View, str]], clips: Clips, n: int, temperature: float, check: bool = True
    ) -> list[Rollout]:
        """n responses for each (prompt, view, seed key); temperature 0 is greedy.

        Every request's seed is a hash of (run seed, seed key, view): the same job gets the same seed in any run of
        the same recipe. Raises ServerError when a server failed, none holds the learner's weights, or one read the
        prompt differently from the learner or answered without what was asked for.
        """
        requests, seeds, prompt_ids = [], [], []
        for prompt, view, key in jobs:
            seeds.append(zlib.crc32(f"{self.config.run.seed}/{key}/{view}".encode()) & 0x7FFFFFF)
            messages = render(prompt, view)
            prompt_ids.append(self.family.prompt_ids(messages, [len(clips[k]) for k in audio_paths(prompt, view)]))
            body = self._request(messages, clips, n, temperature, seeds[-1])
            tokens = len(prompt_ids[-1]) + n * self.config.rollout.max_tokens
            requests.append(Request("/v1/chat/completions", body, tokens))
        rollouts: list[Rollout] = []
        answers = self._ask(requests, check)
        for (prompt, view, _), seed, expected, answer in zip(jobs, seeds, prompt_ids, answers, strict=True):
            _check_prompt(prompt, view, expected, answer["prompt_token_ids"])
            choices = sorted(answer["choices"], key=itemgetter("index"))
            rollouts += [self._rollout(prompt, view, seed, c) for c in choices]
        assert len(rollouts) == n * len(jobs)
        return rollouts

    def score(self, rollouts: list[Rollout], clips: Clips) -> list[np.ndarray | None]:
        """Log-probabilities [T] that the servers give each response's own ids after its view of the prompt.

        By prompt log-probs, over the full vocabulary, the banned ids too. The text view is sent as ids. After audio a
        response can only be sent as text, the beginning of the assistant's turn: None where the server then reads
        other ids than the prompt's and the response's. Any weights that the servers hold will do.
        """
        found: list[np.ndarray | None] = []
        requests, sequences = [], []
        for r in rollouts:
            messages = render(r.prompt, r.view)
            lengths = [len(clips[k]) for k in audio_paths(r.prompt, r.view)]
            ids = [*self.family.prompt_ids(messages, lengths), *r.token_ids]
            body: dict[str, Any] = {"model": "student", "temperature": 1.0, "prompt_logprobs": 0}
            body["return_token_ids"] = True
            if r.view == "text":
                path, body = "/v1/completions", body | {"prompt": ids, "max_tokens": 1, "add_special_tokens": False}
            else:
                said = self.family.tokenizer.decode(r.token_ids, clean_up_tokenization_spaces=False)
                sent = self._spoken(messages, clips)
                path, body = "/v1/chat/completions", body | {"max_completion_tokens": 1, "add_generation_prompt": False}
                body |= {"messages": [*sent, {"role": "assistant", "content": said}], "continue_final_message": True}
            requests.append(Request(path, body, len(ids) + 1))
            sequences.append(ids)
        for r, ids, answer in zip(rollouts, sequences, self._ask(requests, check=False), strict=True):
            told = answer if r.view == "speech" else answer["choices"][0]
            if r.view == "speech" and told["prompt_token_ids"] != ids:
                found.append(None)
                continue
            found.append(given(told.get("prompt_logprobs"), ids, len(r.token_ids), "student"))
        return found

    def _ask(self, requests: list[Request], check: bool) -> list[Any]:
        """Answers to requests, all of them from servers that held the learner's weights before and after."""
        r = self.config.rollout
        answers: list[Answer | None] = [None] * len(requests)
        todo = list(range(len(requests)))
        urls = self.usable() if check else [s.url for s in self.servers]
        while todo:
            found = post_all(urls, [requests[i] for i in todo], r.concurrency, r.timeout_s, self.rank)
            for i, answer in zip(todo, found, strict=True):
                answers[i] = answer
            asked, urls = todo, self.usable() if check else urls
            todo = [i for i, answer in zip(asked, found, strict=True) if answer.url not in urls]
        return [a.content for a in answers if a is not None]

    def _request(self, messages: list[Message], clips: Clips, n: int, temp: float, seed: int) -> dict[str, Any]:
        bans = {str(i): BAN for i in self.family.banned_ids}
        body: dict[str, Any] = {"model": "student", "n": n, "temperature": temp, "seed": seed}
        body |= {"messages": self._spoken(messages, clips), "add_generation_prompt": True}
        body |= {"max_completion_tokens": self.config.rollout.max_tokens, "stop_token_ids": self.family.eos_ids}
        body |= {"logprobs": True, "top_logprobs": self.best, "logit_bias": bans, "skip_special_tokens": False}
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        # spelt out, so that no generation_config of the checkpoint bends the distribution
        return body | {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

    def _spoken(self, messages: list[Message], clips: Clips) -> list[Message]:
        """Messages as vLLM takes them, with the clips in them."""

        def part(of: dict[str, Any]) -> dict[str, Any]:
            if of["type"] != "audio":
                return of
            wav = to_base64_wav(clips[of["path"]], self.family.sampling_rate)
            return {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}

        return with_parts(messages, part)

    def _rollout(self, prompt: Prompt, view: View, seed: int, choice: dict[str, Any]) -> Rollout:
        ids, entries = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
        if not ids or not entries or len(ids) != len(entries):
            raise ServerError(f"prompt {prompt.id}: expected token ids with a log-prob each, found {str(choice)[:200]}")
        named = [e["token"] for e in entries]
        assert named == [f"token_id:{i}" for i in ids], f"prompt {prompt.id}: log-probs of other tokens: {named[:5]}"
        logprobs = np.array([e["logprob"] for e in entries], np.float32)
        truncated = ids[-1] not in self.family.eos_ids
        top = _best(entries, self.best) if self.best else None
        return Rollout(prompt, view, tuple(ids), logprobs, self.version, truncated, seed, top_ids=top)


def _best(entries: list[dict[str, Any]], k: int) -> np.ndarray:
    """[T, K] ids of the sampler's best tokens, -1 where it told of fewer.

    vLLM puts the sampled token first; where that is not among the K best it takes the last one's place.
    """
    out = np.full((len(entries), k), -1, np.int64)
    for t, entry in enumerate(entries):
        ids = [int(e["token"].removeprefix("token_id:")) for e in entry["top_logprobs"]]
        out[t, : len(ids[:k])] = ids[:k]
    return out


def _check_prompt(prompt: Prompt, view: View, expected: list[int], found: list[int]) -> None:
    if found != expected:
        same = min(len(expected), len(found))
        at = next((i for i in range(same) if expected[i] != found[i]), same)
        told = f"the server reads {len(found)} ids, the learner {len(expected)}; first difference at {at}"
        told += f": {found[at : at + 5]}, {expected[at : at + 5]}"
        raise ServerError(f"prompt {prompt.id} ({view} view): {told}")
