"""Where the seconds of a step go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of a step by phase."""

    start: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mark = self.start

    def lap(self, name: str) -> None:
        """Put the seconds since the last lap down to a phase."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._mark
        self._mark = now

    def metrics(self) -> dict[str, float]:
        """time/<phase>, time/rest (whatever no phase claimed) and time/step."""
        self.lap("rest")
        return {f"time/{k}": v for k, v in self.laps.items()} | {"time/step": self._mark - self.start}
