"""The student's vLLM servers as a model of lmms-eval.

Its own back ends cannot ask them: `openai` puts decoded sound into a URL field, or takes paths only, and what fails is
scored as an answer. Here a question goes the way of a training prompt: the same clips, chat template and banned ids.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from opd.config.schema import Config
from opd.evaluate.benchmark.command import Benchmark
from opd.evaluate.benchmark.sound import clip, seconds
from opd.models.base import Family
from opd.prompts.clips import ContextLimit
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import decode
from opd.settings import UserError
from opd.storage.journal import Journal, canonical
from opd.types import BadAudio, Prompt, audio_paths, render

VERSION = 1  # higher when the same question is answered differently than before
CHUNK = 128  # questions whose clips are in memory at a time, and that an interruption costs
FIXED = {"top_p": (None, 1.0, 1), "num_beams": (None, 1), "top_k": (None, 0, -1)}  # all that sampling here does


class Student(lmms):
    """Answers lmms-eval's instances; every answer is kept in the journal as soon as it is there."""

    is_simple = True

    def __init__(self, config: Config, benchmark: Benchmark, context: ContextLimit, journal: Journal, model: Any):
        """`model`: what tells these weights from others, for the journal's keys."""
        super().__init__()
        self.accelerator = None  # else lmms-eval starts one
        self.config, self.benchmark, self.context, self.journal, self.model = config, benchmark, context, journal, model
        self.family: Family = context.family
        self.limit = benchmark.max_audio_seconds or config.data.max_audio_seconds
        self.tell: Callable[[str], None] = print
        self.cut_off: Counter[str] = Counter()  # answers that max_tokens ended, by task
        self.clips_cut: Counter[str] = Counter()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to every instance. Raises UserError for one that cannot be asked, ServerError."""
        out: dict[int, GenerationResult] = {}
        order = sorted(range(len(requests)), key=lambda i: self._sampling(requests[i]))  # one setting at a time
        asked: dict[tuple[str, Any], Iterator[int]] = defaultdict(count)
        repeat = [next(asked[r.task_name, r.doc_id]) for r in requests]
        if self.benchmark.longer == "refuse":
            self._check_lengths(requests)
        began, start = time.monotonic(), 0
        while start < len(order):
            same = self._sampling(requests[order[start]])
            chunk = [i for i in order[start : start + CHUNK] if self._sampling(requests[i]) == same]
            left = (len(order) - start) * (time.monotonic() - began) / start if start else None
            eta = f", ETA {int(left) // 60}:{int(left) % 60:02d}" if left is not None else ""
            self.tell(f"{start} of {len(requests)} questions{eta}")
            out |= zip(chunk, self._answer([(requests[i], repeat[i]) for i in chunk], *same), strict=True)
            start += len(chunk)
        self.tell(f"{len(requests)} questions answered, scoring")
        return [out[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        """Not asked of a speech LLM here: raises UserError."""
        raise UserError(f"task {_place(requests[0])}: compares likelihoods of given answers; only written answers here")

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        """Not asked of a speech LLM here: raises UserError."""
        raise UserError(f"task {_place(requests[0])}: has several rounds; only one question and its answer here")

    def _check_lengths(self, requests: list[Instance]) -> None:
        """Raises UserError for clips that are too long, before hours are spent on the others."""
        found = [(max(map(seconds, self._media(r)), default=0.0), r) for r in requests]
        if long := [(s, r) for s, r in found if s > self.limit]:
            most, r = max(long, key=lambda x: x[0])
            told = f"{len(long)} of {len(requests)} questions have clips longer than {self.limit:g} s"
            remedy = "raise data.max_audio_seconds, or set benchmark.longer=cut"
            raise UserError(f"{told}, the longest {most:.1f} s ({_place(r)}): {remedy}")

    def _media(self, r: Instance) -> list[Any]:
        _, _, to_media, doc_id, task, split = r.args
        return to_media(self.task_dict[task][split][doc_id]) or []

    def _sampling(self, r: Instance) -> tuple[int, float]:
        """(max_tokens, temperature): the benchmark file's, else the task's, as chat back ends of lmms-eval read it."""
        asked, b = r.args[1], self.benchmark
        tokens = b.max_tokens or asked.get("max_new_tokens") or asked.get("max_gen_toks") or 1024
        own = float(asked.get("temperature") or 0.0) if asked.get("do_sample", True) else 0.0
        temperature = own if b.temperature is None else b.temperature
        for name, known in FIXED.items() if temperature else ():
            if asked.get(name) not in known:
                told = "here there is temperature alone: set benchmark.temperature"
                raise UserError(f"task {_place(r)}: samples with {name}={asked[name]}; {told}")
        return int(tokens), temperature

    def _answer(self, asked: list[tuple[Instance, int]], max_tokens: int, temperature: float) -> list[GenerationResult]:
        config = self.config.changed({"rollout.max_tokens": max_tokens, "run.seed": self.benchmark.seed})
        clips: dict[str, np.ndarray] = {}
        prompts = [self._question(r, repeat, max_tokens, clips) for r, repeat in asked]
        keys = [self._key(p, clips, max_tokens, temperature, config.run.seed) for p in prompts]
        todo = [i for i, key in enumerate(keys) if key not in self.journal]
        sampler = VllmSampler(config, self.family, config.rollout.urls)
        jobs: Any = [(prompts[i], "speech", prompts[i].id) for i in todo]
        for i, r in zip(todo, sampler.sample(jobs, clips, 1, temperature, check=False), strict=True):
            text = decode(self.family, r.token_ids)
            said = {"text": text, "tokens": len(r.token_ids), "truncated": r.truncated, "id": prompts[i].id}
            self.journal.add(keys[i], {"record": said})
        found = [self.journal[key]["record"] for key in keys]
        for (r, _), said in zip(asked, found, strict=True):
            self.cut_off[r.task_name] += said["truncated"]
        return [GenerationResult(said["text"], TokenCounts(output_tokens=said["tokens"])) for said in found]

    def _question(self, r: Instance, repeat: int, max_tokens: int, clips: dict[str, np.ndarray]) -> Prompt:
        """One user turn, the clips before the text, as lmms-eval's speech back ends have it; `clips` takes them up."""
        text, task, doc_id, media = r.args[0], r.task_name, r.doc_id, self._media(r)
        name = f"benchmark/{task}/{doc_id}/{repeat}"
        content: list[dict[str, Any]] = []
        try:
            for k, value in enumerate(media):
                wave, cut = clip(value, self.family.sampling_rate, self.limit, self.benchmark.longer == "cut")
                self.clips_cut[task] += cut
                clips[f"{name}/{k}"] = self.context.filled(wave)
                content.append({"type": "audio", "path": f"{name}/{k}", "transcript": ""})
            if not media:
                raise BadAudio("it has no sound")
            if len(media) > self.family.entry.clips:
                raise BadAudio(f"it has {len(media)} clips; {self.family.entry.name} takes {self.family.entry.clips}")
            content += [{"type": "text", "text": text}] if text else []
            first = ({"role": "system", "content": self.benchmark.system},) if self.benchmark.system else ()
            prompt = Prompt(name, (*first, {"role": "user", "content": content}))
            ids = len(self.family.prompt_ids(render(prompt, "speech"), [len(clips[p]) for p in audio_paths(prompt)]))
        except BadAudio as e:
            raise UserError(f"task {_place(r)}: {e}") from e
        limit = self.context.max_model_len
        if limit is not None and ids + max_tokens > limit:
            told = f"its {ids} prompt ids and max_tokens {max_tokens} do not fit into the server's {limit} ids"
            remedy = "raise rollout.server.max_model_len, or lower benchmark.max_tokens"
            raise UserError(f"task {_place(r)}: {told}; {remedy}")
        return prompt

    def _key(self, p: Prompt, clips: dict[str, np.ndarray], max_tokens: int, temperature: float, seed: int) -> str:
        sounds = [hashlib.sha256(clips[k].tobytes()).hexdigest() for k in audio_paths(p)]
        chat = [(m["role"], m["content"] if isinstance(m["content"], str) else m["content"][-1]) for m in p.messages]
        content = [VERSION, self.model, chat, sounds, max_tokens, temperature, (seed, p.id) if temperature else ()]
        return hashlib.sha256(canonical(content)).hexdigest()[:32]


def _place(r: Instance) -> str:
    return f"{r.task_name}: record {r.doc_id}"
