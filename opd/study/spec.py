"""A study's YAML: worlds, methods, learning rates, seeds; and the rows that it asks for. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, StringConstraints, field_validator

from opd.config.schema import BETTER
from opd.settings import Section, UserError, read_yaml, validated

BASE = "base"  # the row of the untrained student
LATER = 1000  # between the seeds of a pipeline's stages
OWNED = (
    *("run.dir", "run.seed", "run.overwrite", "optim.lr", "train.keep_checkpoints"),
    *("eval.start", "eval.end", "eval.patience"),  # all methods take the steps that they are given
)


def _keys(overrides: dict[str, Any]) -> dict[str, Any]:
    for key in overrides:
        if key in OWNED:
            raise ValueError(f"{key} is the study's own to set; take it out")
        if "." not in key:
            raise ValueError(f"expected dotted keys of a recipe, such as train.steps, found {key}")
    return overrides


def _distinct(values: list[Any]) -> list[Any]:
    if len({f"{v:g}" if isinstance(v, float) else str(v) for v in values}) < len(values):
        raise ValueError("expected each value once" + ", in six digits" * any(isinstance(v, float) for v in values))
    return values


Overrides = Annotated[dict[str, Any], AfterValidator(_keys)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # it becomes a folder's
Seed = Annotated[int, Field(ge=0, lt=LATER)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
Rates = Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_distinct)]


class MethodSpec(Section):
    """One stage of training. A pipeline of stages is a method that starts `from` another one's row."""

    recipe: str
    set: Overrides = Field({}, description="overrides of the recipe")
    rates: Rates | None = Field(None, description="learning rates to choose from; none: the study's")
    lambda_: Annotated[dict[float, Overrides], Field(min_length=1)] | None = Field(
        None, alias="lambda", description="values of objective.lambda, a row each; as a mapping with overrides for each"
    )
    from_: str | None = Field(None, alias="from", description="row whose chosen runs it starts from, seed by seed")

    @field_validator("lambda_", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(x, float | int) for x in value):
            return value
        return {x: {} for x in _distinct([float(x) for x in value])}


class SplitSpec(Section):
    """What one kind of run is measured on."""

    seeds: Seeds
    set: Overrides = Field({}, description="overrides that name the held-out records, such as eval.test")


class SelectionSpec(SplitSpec):
    """How a row's learning rate is chosen, on records and seeds that no reported run uses."""

    metric: str = "accuracy/speech"
    guard: dict[str, float] = Field(
        {"accuracy/text": 0.02, "retention": 0.02},
        description="metrics that may fall at most so far below the untrained student's (rise, where less is better)",
    )


class StudySpec(Section):
    """A study. Every key is here; unknown ones are refused."""

    out: str = Field(min_length=1, description="folder of all runs and of the tables")
    common: Overrides = Field({}, description="overrides of every run")
    worlds: dict[Name, Overrides] = Field(min_length=1)
    selection: SelectionSpec
    report: SplitSpec
    rates: Rates
    base: str = Field(description="recipe with which the untrained student is measured")
    reference: str | None = Field(None, description="row that the others are compared with, beside base")
    methods: dict[Name, MethodSpec] = Field(min_length=1)
    jobs: PositiveInt = Field(1, description="runs at a time")


@dataclass(frozen=True)
class Row:
    """One line of a world's table: a method at one λ. `overrides` are all but those of the split."""

    world: str
    name: str
    recipe: str
    overrides: dict[str, Any] = field(compare=False)
    rates: tuple[float, ...] = ()  # none: the untrained student
    start: str | None = None

    @property
    def id(self) -> str:
        """WORLD/ROW, as --only takes it and as the folders are named."""
        return f"{self.world}/{self.name}"


def read_study(path: Path) -> StudySpec:
    """Read and check a study's YAML. Raises UserError that names file and key."""
    spec = validated(StudySpec, read_yaml(path, "study file"), path)
    for key, names in (("metric", [spec.selection.metric]), ("guard", [*spec.selection.guard])):
        if unknown := [name for name in names if name not in BETTER]:
            known = ", ".join(BETTER)
            raise UserError(f"{path}: selection.{key}: expected a metric that has a better direction ({known}), "
                            f"found {unknown[0]}")  # fmt: skip
    if shared := set(spec.selection.seeds) & set(spec.report.seeds):
        raise UserError(f"{path}: selection.seeds: seed {min(shared)} is also one of report.seeds; choose another")
    for name, method in spec.methods.items():
        if name == BASE:
            raise UserError(f"{path}: methods.{BASE}: that name is the untrained student's; choose another")
        if bad := [x for x in method.lambda_ or {} if not 0 <= x <= 1]:
            raise UserError(f"{path}: methods.{name}.lambda: expected values from 0 to 1, found {bad[0]:g}")
        if method.lambda_ and any("objective.lambda" in own for own in (method.set, *method.lambda_.values())):
            raise UserError(f"{path}: methods.{name}: objective.lambda is what its lambda sets; take one of them out")
        if method.from_ not in (None, BASE) and "student.path" in method.set:
            raise UserError(f"{path}: methods.{name}.set: student.path is that of {method.from_}'s runs; take it out")
    table = rows(spec, path)
    if spec.reference is not None and spec.reference not in {r.name for r in table}:
        raise UserError(f"{path}: reference: {_unknown(spec.reference, [r.name for r in table])}")
    return spec


def rows(spec: StudySpec, path: Path) -> list[Row]:
    """All rows by world, the untrained student first. Raises UserError for a name twice, or `from` no row before."""
    found: list[Row] = []
    for world, of_world in spec.worlds.items():
        names = {BASE}
        found.append(Row(world, BASE, spec.base, {**spec.common, **of_world}))
        for name, m in spec.methods.items():
            start = None if m.from_ == BASE else m.from_
            if start is not None and start not in names:
                raise UserError(f"{path}: methods.{name}.from: {_unknown(start, sorted(names))}, listed before it")
            rates = tuple(m.rates or spec.rates)
            variants: list[tuple[float | None, Overrides]] = [*(m.lambda_ or {}).items()] or [(None, {})]
            for value, own in variants:
                of_row = name if value is None else f"{name}-lambda-{value:g}"
                if of_row in names:
                    raise UserError(f"{path}: methods.{name}: expected rows of different names, found {of_row} twice")
                weight = {} if value is None else {"objective.lambda": value}
                overrides = {**spec.common, **of_world, **m.set, **weight, **own}
                if start is not None:
                    overrides.pop("student.path", None)
                found.append(Row(world, of_row, m.recipe, overrides, rates, start))
                names.add(of_row)
    return found


def _unknown(name: str, known: list[str]) -> str:
    return f"expected one of the rows {', '.join(known)}, found {name}"


def as_arguments(overrides: dict[str, Any]) -> list[str]:
    """key=value for the command line, values as JSON, which YAML reads too."""
    return [f"{k}={v if isinstance(v, str) and _plain(v) else json.dumps(v)}" for k, v in overrides.items()]


def _plain(text: str) -> bool:
    """Whether YAML reads the text as itself: letters first, nothing that means something to YAML."""
    words = ("true", "false", "null", "yes", "no", "on", "off")
    return all(c.isalnum() or c in "_-./" for c in text) and text[:1].isalpha() and text.lower() not in words
