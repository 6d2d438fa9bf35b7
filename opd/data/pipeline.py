"""`opd data run`: the stages that a recipe names, one after another, each over what the one before wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from opd.data.engine.runner import Summary, run_stage
from opd.data.engine.stage import Stage
from opd.data.stages.natural import Natural
from opd.data.stages.prompts import Prompts
from opd.data.stages.respond import Respond
from opd.data.stages.rewrite import Rewrite
from opd.data.stages.speak import Speak
from opd.data.stages.verify import Verify
from opd.endpoint import Endpoint, Unavailable
from opd.settings import Section, UserError


class Pipeline(Section):
    """A recipe of `opd data run`. Stages run in this order; one that is not named, or is null, does not."""

    source: str = Field(description="what the first stage reads: hub:owner/name[/config][:split], a file, a folder")
    limit: PositiveInt | None = Field(None, description="records of the source to read")
    prompts: Prompts | None = None
    natural: Natural | None = None
    rewrite: Rewrite | None = None
    speak: Speak | None = None
    verify: Verify | None = None
    respond: Respond | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Pipeline:
        if not self.stages:
            raise ValueError("expected stages, such as prompts: {} and speak: {}; found none")
        if self.natural and (other := next((s for s in (self.prompts, self.rewrite, self.speak) if s), None)):
            raise ValueError(f"natural: recordings are spoken already, found {other.name} beside it")
        return self

    @property
    def stages(self) -> list[Stage]:
        """Those that run, in order."""
        found = (self.prompts, self.natural, self.rewrite, self.speak, self.verify, self.respond)
        return [s for s in found if s is not None]


def run(recipe: Pipeline, folder: Path, workers: int | None, say: Callable[[str], None]) -> list[Summary]:
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
