"""The process that measures: asks the servers, scores, and keeps every record as soon as it is measured.

It loads tokenizers and the processor, no model. Shape legend in opd/types.py.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opd.config.schema import Config
from opd.doctor import preflight
from opd.doctor.checks import Facts
from opd.doctor.tokenizers import tokenizers
from opd.evaluate.records import Item, eval_config, read_items
from opd.evaluate.results import sampled
from opd.models.base import Family
from opd.prompts import audio
from opd.prompts.clips import ContextLimit
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import decode
from opd.scoring.scorer import Scorer
from opd.settings import UserError, attempt
from opd.storage.journal import Journal
from opd.storage.metrics import MetricsLog
from opd.teachers.server import ServerTeacher
from opd.types import VIEWS, Prompt, Rollout, View, audio_paths

Answer = tuple[Prompt, tuple[int, ...], bool]  # ids, and whether the length limit cut them off
CHUNK = 32  # records whose clips are in memory at a time, and that an interruption costs


class Gap:
    """Measures records on the student's live servers, and the teacher's where there is one."""

    def __init__(self, config: Config, family: Family, limit: ContextLimit) -> None:
        self.config, self.family, self.limit = config, family, limit
        self.sampler = VllmSampler(config, family, config.rollout.urls)
        served = config.teacher.about.servers == "all"
        self.teacher = ServerTeacher(config, family, torch.device("cpu")) if served else None
        self.scorer = Scorer(config.eval)
        self.max_tokens = config.rollout.max_tokens

    def measure(self, items: list[Item]) -> list[dict[str, Any]]:
        """Of each record: answers by view, and for those that ask for it the divergences; `seconds` of its clips."""
        clips = {path: self._load(i.prompt, path) for i in items for path in audio_paths(i.prompt)}
        seconds = [sum(len(clips[p]) for p in audio_paths(i.prompt)) / self.family.sampling_rate for i in items]
        out: list[dict[str, Any]] = [{"seconds": s, "views": {}} for s in seconds]
        clips = {path: self.limit.filled(clip) for path, clip in clips.items()}
        tests = [i for i, item in enumerate(items) if item.part == "test"]
        asked: dict[View, list[int]] = {"speech": list(range(len(items))), "text": tests}
        for view in VIEWS:
            jobs = [(items[i].prompt, view, f"eval/{items[i].prompt.id}") for i in asked[view]]
            replies = self.sampler.sample(jobs, clips, 1, 0.0, check=False)
            self._answered(out, asked[view], view, [(r.prompt, r.token_ids, r.truncated) for r in replies])
        if self.teacher is not None and tests:
            prompts = [items[i].prompt for i in tests]
            written = self.teacher.respond(prompts, self.max_tokens)
            self._answered(out, tests, "teacher", [(p, *r) for p, r in zip(prompts, written, strict=True)])
        deep = [i for i, item in enumerate(items) if item.divergences]
        for i, found in zip(deep, self._divergences([items[i].prompt for i in deep], clips), strict=True):
            out[i] |= found
        return out

    def _load(self, prompt: Prompt, path: str) -> np.ndarray:
        found = attempt(audio.load, path, self.family.sampling_rate, self.config.data.max_audio_seconds)
        if isinstance(found, ValueError):
            raise UserError(f"{prompt.place}: a held-out record is bad: {found}; mend or remove it") from found
        return found

    def _answered(self, out: list[dict[str, Any]], at: list[int], view: str, replies: list[Answer]) -> None:
        texts = [decode(self.family, ids) for _, ids, _ in replies]
        scores = self.scorer.grade([(p, text, cut) for (p, _, cut), text in zip(replies, texts, strict=True)])
        for i, (_, ids, cut), text, score in zip(at, replies, texts, scores, strict=True):
            found = {"text": text, "right": score.score, "tokens": len(ids), "truncated": cut}
            out[i]["views"][view] = found | ({"parts": score.parts} if score.parts else {})

    def _divergences(self, prompts: list[Prompt], clips: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Nats and tokens of each record's divergences, each on one response sampled at temperature 1:

        misalignment/sampled  log p_student(y | text) - log p_student(y | speech)    y from the student in the text view
        forgetting/sampled    log p_teacher(y | text) - log p_student(y | text)      y from the teacher
        reverse_kl/x/sampled  log p_student(y | x) - log p_teacher(y | text)         y from the student in the view x

        None where the server has other ids for a response after audio.
        """
        found: list[dict[str, Any]] = [{} for _ in prompts]

        def keep(name: str, logprobs: list[np.ndarray | None], others: list[np.ndarray | None]) -> None:
            for one, a, b in zip(found, logprobs, others, strict=True):
                one[sampled(name)] = None
                if a is not None and b is not None:
                    one[sampled(name)] = {"nats": float(np.sum(a.astype(np.float64) - b)), "tokens": len(a)}

        if not prompts:
            return found
        own: dict[View, list[Rollout]] = {}
        for view in VIEWS:
            jobs = [(p, view, f"divergence/{p.id}") for p in prompts]
            own[view] = [self._cut(r) for r in self.sampler.sample(jobs, clips, 1, 1.0, check=False)]
        by_text = self.sampler.score(own["text"], clips)
        keep("misalignment", by_text, self.sampler.score([replace(r, view="speech") for r in own["text"]], clips))
        if self.teacher is None:
            return found
        seeds = [zlib.crc32(f"{self.config.run.seed}/teacher/{p.id}".encode()) & 0x7FFFFFF for p in prompts]
        replies = self.teacher.sample(prompts, self.max_tokens, seeds)
        both = zip(prompts, replies, strict=True)
        replied = [self._cut(Rollout(p, "text", ids, None, -1, truncated)) for p, (ids, truncated) in both]
        wrote = [s.teacher_logprobs for s in self.teacher.score(replied)]
        keep("forgetting", wrote, self.sampler.score(replied, clips))
        for view, rollouts in own.items():
            theirs = [s.teacher_logprobs for s in self.teacher.score(rollouts)]
            keep(f"reverse_kl/{view}", [r.logprobs for r in rollouts], theirs)
        return found

    def _cut(self, r: Rollout) -> Rollout:
        """A response that leaves room for the one token that a server must write when it scores."""
        room = self.max_tokens - 1
        if len(r.token_ids) <= room or room == 0:
            return r
        logprobs = None if r.logprobs is None else r.logprobs[:room]
        return replace(r, token_ids=r.token_ids[:room], logprobs=logprobs, truncated=True)


def run(log: MetricsLog, recipe: str, overrides: list[str], teacher: bool) -> None:
    """Measure what is not measured yet. Raises UserError and ServerError; what is done by then is kept."""
    folder = log.run_dir
    config = eval_config(recipe, overrides, folder, teacher)
    log.status("loading", "", 0, 1)
    items = read_items(config)
    facts = Facts(config)
    preflight.student(facts)
    if config.teacher.about.servers == "all":
        preflight.teacher(facts)
        tokenizers(facts)
    preflight.servers(facts)
    for part in ("test", "retention"):
        if some := [i.prompt for i in items if i.part == part]:
            facts.prompts[f"eval.{part}"], facts.bad[f"eval.{part}"] = some, []
    print(preflight.clips(facts), flush=True)
    limit = facts.max_model_len or config.rollout.server.max_model_len
    gap = Gap(config, facts.family, ContextLimit(facts.family, config.rollout.max_tokens, limit))
    journal = Journal(folder / "measured", 0)
    try:
        todo = [i for i in items if i.key not in journal]
        done, began = len(items) - len(todo), time.monotonic()
        for start in range(0, len(todo), CHUNK):
            left = (len(todo) - start) * (time.monotonic() - began) / start if start else None
            eta = f", ETA {int(left) // 60}:{int(left) % 60:02d}" if left is not None else ""
            log.status("evaluating", f"{done + start} of {len(items)} records{eta}", 0, 1)
            chunk = todo[start : start + CHUNK]
            for item, measured in zip(chunk, gap.measure(chunk), strict=True):
                journal.add(item.key, {"record": measured})
    except OSError as e:
        raise UserError(f"{folder}: {e.strerror or e}; what is measured is kept, the same command goes on") from e
    finally:
        journal.close()
    log.status("finished", f"{len(items)} records", 1, 1)
