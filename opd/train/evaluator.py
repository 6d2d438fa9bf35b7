"""Accuracy by modality, misalignment and forgetting (SALAD, arXiv 2510.13632), retention, reverse KL.

Every rank measures its share of the records; sums meet in one all-reduce, so all ranks return the same numbers.
Shape legend in opd/types.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from opd.config.schema import Config
from opd.config.teacher import WITH_LOGITS
from opd.models.base import Family
from opd.models.sharding import all_reduce
from opd.objectives.losses import divergence
from opd.objectives.token_loss import Logits, MicroBatch, chunks
from opd.prompts.clips import ClipLoader
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import decode, gold_ids
from opd.scoring.scorer import Scorer
from opd.scoring.statistics import Estimate, drop, ratio_stderr
from opd.settings import UserError
from opd.teachers.base import Teacher
from opd.train.batch import make_samples
from opd.train.learner import Learner
from opd.types import VIEWS, Clips, Prompt, Rollout, Sample, ScoredRollout, View, transcript

CHUNK = 64  # records whose clips are in memory at a time
PAIRS = 8  # records of one forward pass in the divergences


@dataclass(kw_only=True)
class Evaluator:
    """Measures a student through its live server (accuracy) and its learner (divergences)."""

    config: Config
    family: Family
    learner: Learner
    teacher: Teacher
    sampler: VllmSampler
    clips: ClipLoader
    test: list[Prompt]
    retention: list[Prompt]
    say: Callable[[str], None] = lambda _: None
    writer: Teacher | None = None  # answers in the teacher's place; none: the teacher itself
    _teacher_right: list[float] | None = field(default=None, init=False)  # the teacher is frozen: asked once
    _scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        self._scorer = Scorer(self.config.eval)
        best = self.config.eval.best or ""
        if best == "forgetting" and not self.teacher.gives_logits:
            needs = f"the teacher's full-vocabulary logits, so teacher.kind {WITH_LOGITS}"
            raise UserError(f"eval.best forgetting: needs {needs}")
        if best in ("misalignment", "forgetting") and self.test and all(p.response is None for p in self.test):
            raise UserError(f"eval.best {best}: follows gold responses: expected a `response` in records of eval.test")
        if best.startswith("reverse_kl") and not self.teacher.gives_scores:
            raise UserError(f"eval.best {best}: a teacher with another tokenizer gives no scores; take another metric")

    def run(self) -> dict[str, Any]:
        """All metrics that the manifests allow, by the names of the design."""
        out: dict[str, Any] = {}
        if self.test:
            self.say("the teacher's answers")
            right = {"teacher": self._teacher()}
            out["accuracy/teacher"] = share(right["teacher"], self.test)
            for view in VIEWS:
                right[view] = self._answers(self.test, view, out)
            for view in VIEWS:
                out[f"drop/{view}"] = drop(right[view], right["teacher"], questions(self.test))
            out["groups"] = {v: by_group(right[v], [1.0] * len(self.test), self.test) for v in VIEWS}
            self.say("misalignment, forgetting, reverse KL")
            out |= self._divergences(out["groups"]) | self._reverse_kl()
        if self.retention:
            self._retained(self.retention, out)
        return out

    def interim(self) -> dict[str, Any]:
        """Accuracies, lengths and retention on the first eval.every_limit records: cheap enough for every few steps.

        Divergences only where eval.best is one of them, on eval.kl_limit records as in `run`.
        """
        out: dict[str, Any] = {}
        limit = self.config.eval.every_limit
        if self.test:
            for view in VIEWS:
                self._answers(self.test[:limit], view, out)
        if self.retention:
            self._retained(self.retention[:limit], out)
        best = self.config.eval.best or ""
        if best.startswith("reverse_kl"):
            out |= self._reverse_kl()
        elif best in ("misalignment", "forgetting"):
            out |= self._divergences()
        return out

    def _answers(self, prompts: list[Prompt], view: View, out: dict[str, Any]) -> list[float]:
        """The scores of a view's answers in [0, 1]; their mean and that of their lengths go into `out`."""
        self.say(f"answers in the {view} view")
        right, lengths = self._greedy(prompts, view, "test")
        self._note(out, f"accuracy/{view}", right, prompts)
        self._note(out, f"length/{view}", lengths, prompts)
        return right

    def _retained(self, prompts: list[Prompt], out: dict[str, Any]) -> None:
        self.say("retention")
        self._note(out, "retention", self._greedy(prompts, "speech", "retention")[0], prompts)

    def _note(self, out: dict[str, Any], name: str, values: list[float], prompts: list[Prompt]) -> None:
        """The mean, and under `first` that of the records of an interim evaluation, so that curves compare like."""
        out[name] = share(values, prompts)
        limit = self.config.eval.every_limit
        if self.config.eval.every and len(prompts) > limit:
            out.setdefault("first", {})[name] = share(values[:limit], prompts[:limit])

    def _greedy(self, prompts: list[Prompt], view: View, name: str) -> tuple[list[float], list[float]]:
        """Of every record, the greedy answer's score in [0, 1], and its tokens with the end of turn."""
        found = torch.zeros(2, len(prompts), dtype=torch.float64)
        for chunk in self._mine(prompts, CHUNK):
            clips = self._load(chunk) if view == "speech" else {}
            answers = self.sampler.sample([(p, view, f"{name}/{i}") for i, p in chunk], clips, 1, 0.0)
            grades = self._scorer.grade([(r.prompt, decode(self.family, r.token_ids), r.truncated) for r in answers])
            for (i, _), r, grade in zip(chunk, answers, grades, strict=True):
                found[:, i] = torch.tensor([grade.score or 0.0, len(r.token_ids)])
        right, lengths = all_reduce(found, "sum").tolist()
        return right, lengths

    def _teacher(self) -> list[float]:
        if self._teacher_right is None:
            right = torch.zeros(len(self.test), dtype=torch.float64)
            mine = list(enumerate(self.test))[self.learner.rank :: self.learner.world]
            # one call on every rank, also where nothing is left to ask: a sharded teacher needs them all
            replies = (self.writer or self.teacher).respond([p for _, p in mine], self.config.rollout.max_tokens)
            said = [(p, decode(self.family, ids), cut) for (_, p), (ids, cut) in zip(mine, replies, strict=True)]
            for (i, _), grade in zip(mine, self._scorer.grade(said), strict=True):
                right[i] = grade.score or 0.0
            self._teacher_right = all_reduce(right, "sum").tolist()
        return self._teacher_right

    def _divergences(self, groups: dict[str, dict[str, Estimate]] | None = None) -> dict[str, Estimate]:
        """Misalignment KL(student|text || student|speech), forgetting KL(teacher|text || student|text), in nats per
        token of the gold response, of records that have one. Forgetting needs the teacher's full-vocabulary logits and
        is absent without them. Misalignment by the records' group goes into `groups`.
        """
        prompts = [p for p in self.test if p.response is not None][: self.config.eval.kl_limit]
        if not prompts:
            return {}
        sums = torch.zeros(3, len(prompts), dtype=torch.float64)  # misalignment, forgetting, tokens
        for chunk in self._in_step(prompts):
            clips = self._load(chunk)
            speech, text = (self._gold(chunk, v, clips) for v in VIEWS)
            mb, from_text = self._student(text, clips)
            self._gather(sums[0], chunk, self._kl(mb, from_text, self._student(speech, clips)[1]))
            if self.teacher.gives_logits:
                self._gather(sums[1], chunk, self._kl(mb, self.teacher.logits(mb.samples), from_text))
            self._gather(sums[2], chunk, mb.mask.sum(-1))
        sums = all_reduce(sums, "sum")
        names = ["misalignment", "forgetting"] if self.teacher.gives_logits else ["misalignment"]
        if groups is not None:
            groups["misalignment"] = by_group(sums[0].tolist(), sums[2].tolist(), prompts)
        return {n: ratio_stderr(sums[i].tolist(), sums[2].tolist(), questions(prompts)) for i, n in enumerate(names)}

    def _reverse_kl(self) -> dict[str, Estimate]:
        """KL(student || teacher) per token on the student's own samples at temperature 1, by view: over the full
        vocabulary with a local teacher, else the sampled tokens' estimate of it; absent with another tokenizer."""
        out: dict[str, Estimate] = {}
        if not self.teacher.gives_scores:
            return out
        for view in VIEWS:
            prompts = self.test[: self.config.eval.kl_limit]
            sums = torch.zeros(2, len(prompts), dtype=torch.float64)
            for chunk in self._in_step(prompts):
                clips = self._load(chunk)
                jobs = [(p, view, f"reverse_kl/{i}") for i, p in chunk]
                own, whole = self.sampler.sample(jobs, clips, 1, 1.0), self.teacher.gives_logits
                scored = [ScoredRollout(r, None) for r in own] if whole else self.teacher.score(own)
                mb, student = self._student(make_samples(scored, clips, self.family), clips)
                self._gather(sums[0], chunk, self._kl(mb, student, self.teacher.logits(mb.samples) if whole else None))
                self._gather(sums[1], chunk, mb.mask.sum(-1))
            sums = all_reduce(sums, "sum")
            out[f"reverse_kl/{view}"] = ratio_stderr(sums[0].tolist(), sums[1].tolist(), questions(prompts))
        return out

    def _student(self, samples: list[Sample], clips: Clips) -> tuple[MicroBatch, Logits]:
        mb, states = self.learner.eval_states(samples, clips)
        return mb, lambda part: self.learner.model.project(states[part])

    def _kl(self, mb: MicroBatch, p: Logits, q: Logits | None) -> torch.Tensor:
        """KL(p || q) summed over the tokens of each response, [B]; without q the targets' estimate of it against the
        teacher's log-probs."""
        real = mb.mask.bool()

        def of(part: slice) -> torch.Tensor:
            logp = torch.log_softmax(p(part), -1)
            if q is not None:
                return divergence(logp, torch.log_softmax(q(part), -1))
            return logp.gather(-1, mb.targets[real][part, None])[:, 0] - mb.teacher_logp[real][part]

        out = torch.zeros_like(mb.mask)
        parts = chunks(int(real.sum()), self.family.vocab_size)
        out[real] = self.learner.at_output_layer(lambda: torch.cat([of(p) for p in parts])).to(out.dtype)
        return out.sum(-1)

    def _gold(self, chunk: list[tuple[int, Prompt]], view: View, clips: Clips) -> list[Sample]:
        limit = self.config.rollout.max_tokens
        gold = [ScoredRollout(Rollout(p, view, *gold_ids(self.family, p, limit)), None) for _, p in chunk]
        return make_samples(gold, clips, self.family)

    def _gather(self, into: torch.Tensor, chunk: list[tuple[int, Prompt]], values: torch.Tensor) -> None:
        for (i, _), v in zip(chunk, values.tolist(), strict=True):
            if i >= 0:
                into[i] += v

    def _mine(self, prompts: list[Prompt], size: int) -> list[list[tuple[int, Prompt]]]:
        mine = list(enumerate(prompts))[self.learner.rank :: self.learner.world]
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def _in_step(self, prompts: list[Prompt]) -> list[list[tuple[int, Prompt]]]:
        """This rank's chunks, as many on every rank: (-1, prompt) fills up and counts for nothing."""
        mine = self._mine(prompts, PAIRS)
        calls = -(-len(prompts) // (self.learner.world * PAIRS))
        return mine + [[(-1, prompts[0])] for _ in range(calls - len(mine))]

    def _load(self, chunk: list[tuple[int, Prompt]]) -> Clips:
        clips: Clips = {}
        for _, p in chunk:
            found = self.clips.load(p)
            if found is None:
                raise UserError(f"{p.place}: a held-out record is bad: {self.clips.bad[p.place]}; mend or remove it")
            clips.update(found)
        return clips


def questions(prompts: list[Prompt]) -> list[str]:
    """What is asked in each record: recordings of the same question are no independent evidence."""
    return [transcript(p) for p in prompts]


def share(right: list[float], prompts: list[Prompt]) -> Estimate:
    """Mean score, or another mean over records, with its standard error over questions."""
    return ratio_stderr(right, [1.0] * len(right), questions(prompts))


def by_group(values: list[float], sizes: list[float], prompts: list[Prompt]) -> dict[str, Estimate]:
    """Ratio of the sums of values and sizes, one of each a record, over the records of each group; of those that name
    none under `all`."""
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for value, size, p, asked in zip(values, sizes, prompts, questions(prompts), strict=True):
        groups.setdefault(p.group or "all", []).append((value, size, asked))
    return {g: ratio_stderr(*map(list, zip(*rows, strict=True))) for g, rows in sorted(groups.items())}
