"""Which teachers there are; one that is several asks whom a field of each record names. Shapes: opd/types.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd.config.needs import route_of, uses_start
from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.models.base import Family
from opd.objectives.token_loss import Logits
from opd.teachers.base import Reply, Teacher
from opd.teachers.cross_tokenizer import CrossTokenizerTeacher
from opd.teachers.local import LocalTeacher
from opd.teachers.reference import ReferenceModel, Running, SelfTeacher
from opd.teachers.server import ServerTeacher
from opd.types import Prompt, Rollout, Sample, ScoredRollout, T


def make_teacher(config: Config, family: Family, device: torch.device, start: ReferenceModel | None = None) -> Teacher:
    """The teacher that the recipe's teacher.kind asks for; `start`: what `make_start` gave."""
    return TEACHERS[config.teacher.kind or "local"](config, family, device, start)


def make_start(config: Config, family: Family, device: torch.device, learner: Running | None) -> ReferenceModel | None:
    """The student at the start, where a teacher is it or the objective refers to it."""
    return ReferenceModel(config, family, device, learner) if uses_start(config) else None


class RoutedTeacher:
    """Asks each teacher what is routed to it and puts the answers back in order.

    Every teacher is asked every time, if only with nothing: a sharded one needs all ranks.
    """

    gives_scores = True

    def __init__(self, config: Config, teachers: dict[str, Teacher]) -> None:
        """`teachers`: by route."""
        self.config, self.teachers = config, teachers
        self.gives_logits = all(t.gives_logits for t in teachers.values())

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        return self._ask([r.prompt for r in rollouts], lambda t, at: t.score([rollouts[i] for i in at]))

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        return self._ask(prompts, lambda t, at: t.respond([prompts[i] for i in at], max_tokens))

    def logits(self, samples: list[Sample]) -> Logits:
        parts: list[tuple[Tensor, Tensor, Logits]] = []  # of a teacher: which tokens are its own, how many came before
        lengths = torch.tensor([len(s.response_ids) for s in samples])
        for teacher, at in self._split([s.scored.rollout.prompt for s in samples]):
            mine = torch.zeros(len(samples), dtype=torch.bool)
            mine[at] = True
            own = mine.repeat_interleave(lengths)
            before = torch.cat([torch.zeros(1, dtype=torch.long), own.cumsum(0)])
            parts.append((own, before, teacher.logits([samples[i] for i in at])))

        def logits(part: slice) -> Tensor:
            out: Tensor | None = None
            for own, before, logits_of in parts:
                first, end = int(before[part.start]), int(before[part.stop])
                if first == end:
                    continue
                found = logits_of(slice(first, end))
                if out is None:
                    out = found.new_empty(part.stop - part.start, found.shape[-1])
                out[own[part].to(found.device)] = found
            assert out is not None, "no tokens to read"
            return out

        return logits

    def _ask(self, prompts: list[Prompt], ask: Callable[[Teacher, list[int]], list[T]]) -> list[T]:
        out: dict[int, T] = {}
        for teacher, at in self._split(prompts):
            out |= dict(zip(at, ask(teacher, at), strict=True))
        return [out[i] for i in range(len(prompts))]

    def _split(self, prompts: list[Prompt]) -> list[tuple[Teacher, list[int]]]:
        """Each teacher with the indices of its prompts."""
        routes = [route_of(self.config.teacher, p) for p in prompts]
        return [(t, [i for i, r in enumerate(routes) if r == name]) for name, t in self.teachers.items()]


TEACHERS: dict[str, Callable[..., Teacher]] = {  # called as `make_teacher` is
    "local": lambda config, family, device, _: (
        CrossTokenizerTeacher if config.objective.about.other_tokenizer else LocalTeacher
    )(config, family, device),
    "server": lambda config, family, device, _: ServerTeacher(config, family, device),
    "self": lambda config, family, _, start: SelfTeacher(config, family, start),
    "routed": lambda config, *where: RoutedTeacher(
        config, {name: make_teacher(c, *where) for name, c in of_routes(config).items()}
    ),
}
