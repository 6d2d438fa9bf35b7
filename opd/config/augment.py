"""The recipe's `data.augment` section: what a clip may go through before the student hears it. Imports no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from opd.settings import Section

Told = list[str]


class Effect(Section):
    """How often an effect is heard, and how strong it is: uniform within the range."""

    share: float = Field(ge=0, le=1, description="of the clips")
    range: list[float] = Field([], max_length=2)

    @model_validator(mode="after")
    def _ordered(self) -> Effect:
        if self.range and (len(self.range) != 2 or self.range[0] > self.range[1]):
            raise ValueError(f"range: expected [lowest, highest], found {self.range}")
        return self


class Noise(Effect):
    """Noise at a signal-to-noise ratio."""

    files: str | None = Field(None, description="folder of recordings of noise; none: pink noise")


class AugmentConfig(Section):
    """data.augment: which effects a training clip may get, in this order; evaluations hear clean clips."""

    speed: Effect = Effect(share=0.0, range=[0.9, 1.1])  # factor; the pitch moves with it
    reverb: Effect = Effect(share=0.0, range=[0.1, 0.5])  # seconds to fall by 60 dB
    noise: Noise = Noise(share=0.0, range=[5.0, 25.0])  # dB below the speech
    clipping: Effect = Effect(share=0.0, range=[2.0, 10.0])  # dB that the peaks are too loud by
    telephone: Effect = Effect(share=0.0)

    @model_validator(mode="after")
    def _possible(self) -> AugmentConfig:
        for name, lowest, highest in (("speed", 0.5, 2.0), ("reverb", 0.01, 5.0), ("clipping", 0.0, 40.0)):
            effect = getattr(self, name)
            if effect.range and not lowest <= effect.range[0] <= effect.range[1] <= highest:
                raise ValueError(f"{name}.range: expected values from {lowest:g} to {highest:g}, found {effect.range}")
        for name in ("speed", "reverb", "noise", "clipping"):
            if getattr(self, name).share and not getattr(self, name).range:
                raise ValueError(f"{name}.range is required with {name}.share")
        return self

    @property
    def active(self) -> bool:
        """Whether any clip may be changed."""
        return any(getattr(self, name).share for name in type(self).model_fields)
