"""Where responses come from: the student on vLLM servers, the teacher, or the data set."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Protocol

from opd.config.schema import Config
from opd.models.base import Family
from opd.settings import UserError
from opd.types import Clips, Prompt, Rollout, View


class ResponseSource(Protocol):
    """Seam: makes responses for the prompts of a step."""

    def respond(self, prompts: list[tuple[int, Prompt]], clips: Clips, step: int) -> list[Rollout]:
        """Rollouts of every view with a share in the objective.

        prompts: (position in the global batch, prompt); clips: waveforms by audio path.
        """


class StudentSource:
    """Samples n responses per prompt and view from the student's vLLM servers (opd.rollout.sampler.VllmSampler)."""

    def __init__(self, sampler: Any, config: Config, views: list[View]) -> None:
        self.sampler, self.views = sampler, views
        self.n, self.temperature = config.rollout.n, config.rollout.temperature

    def respond(self, prompts: list[tuple[int, Prompt]], clips: Clips, step: int) -> list[Rollout]:
        jobs = [(p, view, f"{step}/{position}") for view in self.views for position, p in prompts]
        return self.sampler.sample(jobs, clips, self.n, self.temperature)


class TeacherSource:
    """The teacher's own responses to the transcripts, one per prompt, given to every view (warm start)."""

    def __init__(self, teacher: Any, config: Config, views: list[View]) -> None:
        self.teacher, self.views, self.max_tokens = teacher, views, config.rollout.max_tokens

    def respond(self, prompts: list[tuple[int, Prompt]], clips: Clips, step: int) -> list[Rollout]:
        replies = self.teacher.respond([p for _, p in prompts], self.max_tokens)
        said = [(p, ids, truncated) for (_, p), (ids, truncated) in zip(prompts, replies, strict=True)]
        return [Rollout(p, view, ids, None, -1, truncated) for view in self.views for p, ids, truncated in said]


class DatasetSource:
    """The manifest's gold responses, tokenised once here, with the end-of-turn token."""

    def __init__(self, family: Family, config: Config, views: list[View]) -> None:
        self.family, self.views, self.max_tokens = family, views, config.rollout.max_tokens

    def respond(self, prompts: list[tuple[int, Prompt]], clips: Clips, step: int) -> list[Rollout]:
        return [Rollout(p, v, *gold_ids(self.family, p, self.max_tokens)) for v in self.views for _, p in prompts]


def gold_ids(family: Family, prompt: Prompt, max_tokens: int) -> tuple[tuple[int, ...], None, int, bool]:
    """(token ids with end of turn, None, -1, truncated) of a prompt's gold response."""
    if prompt.response is None:
        raise UserError(f"{prompt.place}: rollout.source dataset needs a `response`, the record has none")
    ids = [*family.tokenizer(prompt.response, add_special_tokens=False).input_ids, family.turn_end]
    return tuple(ids[:max_tokens]), None, -1, len(ids) > max_tokens


def decode(family: Family, ids: tuple[int, ...]) -> str:
    """Readable text of a response: end-of-turn and other special tokens left out."""
    return family.tokenizer.decode([i for i in ids if i not in family.eos_ids], skip_special_tokens=True)


class MixSource:
    """The student answers some of a step's prompts, the teacher the others (GKD, arXiv 2306.13649, its lambda).

    rollout.student_share of the prompts, drawn by run seed, step and position, go to the student. The teacher writes
    one response to a prompt, the student n: in means over responses the teacher's then stands for n.
    """

    def __init__(self, student: StudentSource, teacher: TeacherSource, config: Config) -> None:
        self.student, self.teacher, self.config = student, teacher, config

    def respond(self, prompts: list[tuple[int, Prompt]], clips: Clips, step: int) -> list[Rollout]:
        students: dict[bool, list[tuple[int, Prompt]]] = {True: [], False: []}
        for position, p in prompts:
            # not a CRC: that is linear, another step would turn all draws over or none
            drawn = random.Random(f"{self.config.run.seed}/{step}/{position}").random()
            students[drawn < self.config.rollout.student_share].append((position, p))
        sampled = self.student.respond(students[True], clips, step)
        written = self.teacher.respond(students[False], clips, step)  # also of none: a sharded teacher needs every rank
        return sampled + [replace(r, stands_for=self.student.n) for r in written]


def make_source(config: Config, views: list[View], sampler: Any, writer: Any, family: Family) -> ResponseSource:
    """The response source that the recipe asks for; `writer`: the teacher that writes, wherever it is."""
    student, teacher = StudentSource(sampler, config, views), TeacherSource(writer, config, views)
    sources: dict[str, ResponseSource] = {
        "student": student,
        "teacher": teacher,
        "dataset": DatasetSource(family, config, views),
        "mix": MixSource(student, teacher, config),
    }
    return sources[config.rollout.source]
