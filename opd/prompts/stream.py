"""A resumable, sharded stream of prompts."""

from __future__ import annotations

import random

from opd.settings import UserError
from opd.types import Prompt


class PromptStream:
    """Shuffled batches of prompts, a function of (seed, step) alone: resuming needs no more than the step.

    Every epoch is a fresh permutation; a batch may span two epochs.
    """

    def __init__(self, prompts: list[Prompt], batch_size: int, seed: int) -> None:
        if not prompts:
            raise UserError("data.train: no usable record")
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        self._order: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[Prompt]:
        """The global batch of a step (0-based)."""
        return [self.prompts[self._index(step * self.batch_size + i)] for i in range(self.batch_size)]

    def epoch(self, step: int) -> int:
        """The epoch that a step's batch begins in, which is that of all its clips."""
        return step * self.batch_size // len(self.prompts)

    def shard(self, step: int, rank: int, world: int) -> list[tuple[int, Prompt]]:
        """This rank's (position in the global batch, prompt) pairs: positions rank, rank + world, ..."""
        return list(enumerate(self.batch(step)))[rank::world]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch not in self._order:
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = {e: o for e, o in self._order.items() if e >= epoch - 1} | {epoch: order}
        return self._order[epoch][offset]
