"""`opd data run`: the stages that a recipe names, one after another, each over what the one before wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, create_model, model_validator

from opd.data.engine.runner import Summary, run_stage
from opd.data.engine.stage import Stage
from opd.data.stages import STAGES, stage_class
from opd.endpoint import Endpoint, Unavailable
from opd.settings import Section, UserError


class Recipe(Section):
    """A recipe of `opd data run`; `Pipeline` has a section for every stage too. One that is not named, or is null,
    does not run."""

    source: str = Field(description="what the first stage reads: hub:owner/name[/config][:split], a file, a folder")
    limit: PositiveInt | None = Field(None, description="records of the source to read")

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("expected stages, such as prompts: {} and speak: {}; found none")
        if "natural" in names and names[0] != "natural":
            raise ValueError(f"natural: recordings are spoken already, found {names[0]} beside it")
        return self

    @property
    def stages(self) -> list[Stage]:
        """Those that run, in order."""
        return [stage for name in STAGES if (stage := getattr(self, name, None)) is not None]


_sections: dict[str, Any] = {n: (stage_class(n) | None, None) for n, stage in STAGES.items() if stage.in_recipes}
Pipeline = create_model("Pipeline", __base__=Recipe, **_sections)


def run(recipe: Recipe, folder: Path, workers: int | None, say: Callable[[str], None]) -> list[Summary]:
    """Run the stages; each writes `folder`/STAGE.jsonl, clips go to `folder`/audio. The same call goes on.

    What the settings name is looked at before the first stage starts. Raises UserError as `run_stage` does.
    """
    for stage in recipe.stages:
        try:
            stage.check()
            for value in dict(stage).values():
                if isinstance(value, Endpoint):
                    value.reach()
        except (UserError, Unavailable) as e:
            raise UserError(f"{stage.name}: {e}") from e
    source, limit, done = recipe.source, recipe.limit, []
    for number, stage in enumerate(recipe.stages, 1):
        say(f"{number} of {len(recipe.stages)}: {stage.name}")
        out = folder / f"{stage.name}.jsonl"
        summary = run_stage(stage, source, out, workers=workers, limit=limit, say=say)
        say(str(summary))
        done.append(summary)
        source, limit = str(out), None
    return done
