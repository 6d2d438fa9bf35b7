"""The recipe's `eval` section: what is measured in a run, what ends it early, what it warns of. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveInt

from opd.scoring.scorer import ScoringConfig
from opd.settings import Section

# Metrics by which checkpoints can be told apart: +1 where higher is better, -1 where lower is.
Higher = Literal["accuracy/speech", "accuracy/text", "retention"]
Lower = Literal["misalignment", "forgetting", "reverse_kl/speech", "reverse_kl/text"]
Metric = Literal[Higher, Lower]
BETTER = dict.fromkeys(get_args(Higher), 1) | dict.fromkeys(get_args(Lower), -1)


class WarnConfig(Section):
    """What makes an evaluation warn, compared with the run's first one on the same records."""

    text: float = Field(0.03, ge=0, le=1, description="typed accuracy lost, as a share of the records")
    retention: float = Field(0.03, ge=0, le=1, description="retention lost, likewise")
    length: float = Field(2.0, gt=1, description="times the first mean length of a view's responses")
    errors: NonNegativeFloat = Field(2.0, description="standard errors that a change must exceed too")


class EvalConfig(ScoringConfig):
    """What is measured on held-out records, when, and what follows from it."""

    test: str | None = Field(None, description="manifest of held-out questions with answers")
    retention: str | None = Field(None, description="manifest of a skill that training must not cost")
    limit: PositiveInt | None = Field(None, description="records of each manifest; all by default")
    kl_limit: PositiveInt = Field(128, description="records for misalignment, forgetting and reverse KL")
    start: str | None = Field(None, description="name of an evaluation before the first step; none: no evaluation")
    end: bool = Field(True, description="evaluate after the last step, under the name run.stage")
    every: PositiveInt | None = Field(
        None, description="steps between evaluations in training, without divergences but that of eval.best"
    )
    every_limit: PositiveInt = Field(100, description="records of each manifest in those")
    best: Metric | None = Field(None, description="the checkpoint that is best by this metric is kept, and named")
    patience: PositiveInt | None = Field(
        None, description="evaluations in a row without a better eval.best that end the run; none: it takes all steps"
    )
    warn: WarnConfig = WarnConfig()
    groups: list[str] | None = Field(
        None, description="opd eval: fields of the records to tabulate by; none: strings of few values, and seconds"
    )
    bins: dict[str, list[float]] = Field({}, description="opd eval: edges of a number's groups; else its quartiles")

    def check(self) -> None:
        """Raises ValueError for settings that do not go together."""
        if self.patience is not None and self.best is None:
            raise ValueError("eval.patience needs eval.best, the metric that is to improve, found none")
        if self.best is not None:
            for key in ("every", "retention" if self.best == "retention" else "test"):
                if getattr(self, key) is None:
                    raise ValueError(f"eval.best {self.best} needs eval.{key}, found none")
