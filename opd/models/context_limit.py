"""How many tokens a prompt may take beside its response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opd import types
from opd.types import VIEWS, Prompt, audio_paths, render

if TYPE_CHECKING:
    from opd.models.base import Family


@dataclass(frozen=True)
class ContextLimit:
    """What a server takes: a prompt and its response together have at most `max_model_len` ids, None: no server."""

    family: Family
    max_tokens: int
    max_model_len: int | None

    def filled(self, clip: np.ndarray) -> np.ndarray:
        """A clip [samples] with the silence behind it that its family's tower needs to encode it alike in any batch."""
        entry, rate = self.family.entry, self.family.sampling_rate
        tail = int(entry.tail_s * rate)
        return np.pad(clip, (0, max(tail, int(entry.shortest_s * rate) - len(clip))))

    def check(self, prompt: Prompt, clips: dict[str, np.ndarray]) -> int:
        """Ids of the prompt's longer view.

        Raises BadAudio when a view of the prompt cannot be put into ids, TooLong when it leaves no room for max_tokens
        more.
        """
        lengths = [len(clips[p]) for p in audio_paths(prompt)]
        if len(lengths) > self.family.entry.clips:
            entry = self.family.entry
            raise types.BadAudio(f"it has {len(lengths)} clips; {entry.name} takes {entry.clips}")
        ids = max(len(self.family.prompt_ids(render(prompt, v), lengths if v == "speech" else [])) for v in VIEWS)
        if self.max_model_len is not None and ids + self.max_tokens > self.max_model_len:
            raise types.TooLong(
                f"its {ids} prompt ids and rollout.max_tokens={self.max_tokens} do not fit into the server's "
                f"{self.max_model_len} ids; raise rollout.server.max_model_len, or shorten the clip or the response"
            )
        return ids
