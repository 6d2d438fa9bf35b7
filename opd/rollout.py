"""Where responses come from: the student on vLLM servers, the teacher, or the data set."""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import numpy as np

from opd.audio import to_base64_wav
from opd.config import Config, UserError
from opd.http import Server, ServerError, post_all
from opd.models.base import Family
from opd.types import Message, Prompt, Rollout, View
from opd.views import audio_paths, render

BAN = -100.0  # the strongest logit bias that the API allows


class ResponseSource(Protocol):
    """Seam: makes responses for the prompts of a step."""

    def respond(self, prompts: list[tuple[int, Prompt]], clips: dict[str, np.ndarray], step: int) -> list[Rollout]:
        """Rollouts of every view with a share in the objective.

        prompts: (position in the global batch, prompt); clips: waveforms by audio path.
        """
        ...


class StudentSource:
    """Samples n responses per prompt and view from the student's vLLM servers."""

    def __init__(self, sampler: VllmSampler, config: Config, views: list[View]) -> None:
        self.sampler, self.views = sampler, views
        self.n, self.temperature = config.rollout.n, config.rollout.temperature

    def respond(self, prompts: list[tuple[int, Prompt]], clips: dict[str, np.ndarray], step: int) -> list[Rollout]:
        jobs = [(p, view, f"{step}/{position}") for view in self.views for position, p in prompts]
        return self.sampler.sample(jobs, clips, self.n, self.temperature)


class TeacherSource:
    """The teacher's own responses to the transcripts, one per prompt, given to every view (warm start)."""

    def __init__(self, teacher: Any, config: Config, views: list[View]) -> None:
        self.teacher, self.views, self.max_tokens = teacher, views, config.rollout.max_tokens

    def respond(self, prompts: list[tuple[int, Prompt]], clips: dict[str, np.ndarray], step: int) -> list[Rollout]:
        replies = self.teacher.respond([p for _, p in prompts], self.max_tokens)
        return [
            Rollout(p, view, ids, None, -1, truncated)
            for view in self.views
            for (_, p), (ids, truncated) in zip(prompts, replies, strict=True)
        ]


class DatasetSource:
    """The manifest's gold responses, tokenised once here, with the end-of-turn token."""

    def __init__(self, family: Family, config: Config, views: list[View]) -> None:
        self.family, self.views, self.max_tokens = family, views, config.rollout.max_tokens

    def respond(self, prompts: list[tuple[int, Prompt]], clips: dict[str, np.ndarray], step: int) -> list[Rollout]:
        return [Rollout(p, v, *gold_ids(self.family, p, self.max_tokens)) for v in self.views for _, p in prompts]


def gold_ids(family: Family, prompt: Prompt, max_tokens: int) -> tuple[tuple[int, ...], None, int, bool]:
    """(token ids with end of turn, None, -1, truncated) of a prompt's gold response."""
    if prompt.response is None:
        raise UserError(f"{prompt.place}: rollout.source dataset needs a `response`, the record has none")
    ids = [*family.tokenizer(prompt.response, add_special_tokens=False).input_ids, family.eos_ids[0]]
    return tuple(ids[:max_tokens]), None, -1, len(ids) > max_tokens


SOURCES = {"student": StudentSource, "teacher": TeacherSource, "dataset": DatasetSource}


class VllmSampler:
    """Chat requests to the student's servers: audio in, token ids and the sampler's log-probs out."""

    def __init__(self, config: Config, family: Family, urls: list[str]) -> None:
        self.config, self.family, self.version = config, family, 0
        self.servers = [Server(u, config.rollout.timeout_s) for u in urls]
        self._wav: dict[str, str] = {}

    def check_versions(self) -> None:
        """Refuse servers whose weights are not the learner's. Raises ServerError naming both versions."""
        for server in self.servers:
            found = server.get("/weight_info")["weight_version"]
            if found != str(self.version):
                raise ServerError(
                    f"{server.url}: holds weights of version {found}, the learner is at {self.version}; "
                    "the push was lost or the server was restarted: start the same command again to resume"
                )

    def sample(
        self,
        jobs: list[tuple[Prompt, View, str]],
        clips: dict[str, np.ndarray],
        n: int,
        temperature: float,
        check: bool = True,
    ) -> list[Rollout]:
        """n responses for each (prompt, view, seed key); temperature 0 is greedy.

        Every request's seed is a hash of (run seed, seed key, view): the same job gets the same seed in any run of
        the same recipe. Raises ServerError when a server failed, holds other weights, read the prompt differently
        from the learner, or answered without what was asked for.
        """
        if check:
            self.check_versions()
        requests, seeds = [], []
        for i, (prompt, view, key) in enumerate(jobs):
            seeds.append(zlib.crc32(f"{self.config.run.seed}/{key}/{view}".encode()) & 0x7FFFFFF)
            body = self._request(render(prompt, view), clips, n, temperature, seeds[-1])
            requests.append((self.servers[i % len(self.servers)].url, "/v1/chat/completions", body))
        answers = post_all(requests, self.config.rollout.concurrency, self.config.rollout.timeout_s)
        if check:
            self.check_versions()  # nobody may have changed them meanwhile
        rollouts: list[Rollout] = []
        for (prompt, view, _), seed, answer in zip(jobs, seeds, answers, strict=True):
            self._check_prompt(prompt, view, clips, answer)
            rollouts += [self._rollout(prompt, view, seed, c, n) for c in sorted(answer["choices"], key=_index)]
        assert len(rollouts) == n * len(jobs)
        return rollouts

    def _request(
        self, messages: list[Message], clips: dict[str, Any], n: int, temp: float, seed: int
    ) -> dict[str, Any]:
        family, r = self.family, self.config.rollout
        return {
            "model": "student",
            "messages": [{**m, "content": self._content(m["content"], clips)} for m in messages],
            "n": n,
            "max_completion_tokens": r.max_tokens,
            "temperature": temp,
            "seed": seed,
            # spelt out, so that no generation_config of the checkpoint bends the distribution
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": family.eos_ids,
            "logit_bias": {str(i): BAN for i in family.banned_ids},
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "add_generation_prompt": True,
        }

    def _content(self, content: Any, clips: dict[str, np.ndarray]) -> Any:
        if isinstance(content, str):
            return content
        return [self._part(p, clips) for p in content]

    def _part(self, part: dict[str, Any], clips: dict[str, np.ndarray]) -> dict[str, Any]:
        if part["type"] != "audio":
            return part
        wav = to_base64_wav(clips[part["path"]], self.family.sampling_rate)
        return {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}

    def _check_prompt(self, prompt: Prompt, view: View, clips: dict[str, np.ndarray], answer: dict[str, Any]) -> None:
        heard = [len(clips[k]) for k in audio_paths(prompt)] if view == "speech" else []
        expected, found = self.family.prompt_ids(render(prompt, view), heard), answer["prompt_token_ids"]
        if found != expected:
            same = min(len(expected), len(found))
            at = next((i for i in range(same) if expected[i] != found[i]), same)
            raise ServerError(
                f"prompt {prompt.id} ({view} view): the server reads {len(found)} ids, the learner {len(expected)}; "
                f"first difference at {at}: {found[at : at + 5]}, {expected[at : at + 5]}"
            )

    def _rollout(self, prompt: Prompt, view: View, seed: int, choice: dict[str, Any], n: int) -> Rollout:
        ids, entries = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
        if not ids or not entries or len(ids) != len(entries):
            raise ServerError(f"prompt {prompt.id}: expected token ids with a log-prob each, found {str(choice)[:200]}")
        named = [e["token"] for e in entries]
        assert named == [f"token_id:{i}" for i in ids], f"prompt {prompt.id}: log-probs of other tokens: {named[:5]}"
        logprobs = np.array([e["logprob"] for e in entries], np.float32)
        truncated = ids[-1] not in self.family.eos_ids
        return Rollout(prompt, view, tuple(ids), logprobs, self.version, truncated, seed)


def _index(choice: dict[str, Any]) -> int:
    return int(choice["index"])
