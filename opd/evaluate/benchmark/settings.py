"""What a benchmark file says: tasks of lmms-eval, how they are answered, who judges. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from opd.endpoint import Endpoint
from opd.settings import Section, UserError, override, read_yaml, validated

PREFIX = "benchmark."  # of an override that is meant for the benchmark file, not for the recipe


class JudgeConfig(Endpoint):
    """The LLM that scores where lmms-eval asks one; also a vLLM server of one's own."""

    parallel: PositiveInt = Field(8, description="answers scored at a time")


class Benchmark(Section):
    """Tasks, and how they are answered."""

    tasks: list[str] = Field(min_length=1, description="names of lmms-eval's tasks or groups")
    limit: PositiveInt | None = Field(None, description="records of each task, from the first; none: all")
    max_tokens: PositiveInt | None = Field(None, description="of an answer; none: as each task says")
    temperature: NonNegativeFloat | None = Field(None, description="of sampling; none: as each task says")
    prompts: str = Field("default", description="model whose wording a task uses, where it has one for that model")
    system: str = Field("", description="system message before every question; empty: none")
    seed: NonNegativeInt = Field(0, description="of sampling, and of lmms-eval's guesses where it finds no answer")
    max_audio_seconds: PositiveFloat | None = Field(None, description="of a clip; none: data.max_audio_seconds")
    longer: Literal["refuse", "cut"] = Field("refuse", description="what to do with a longer clip; cuts are counted")
    revisions: dict[str, str] = Field({}, description="data set on the Hub -> its revision; others: the newest")
    include: str | None = Field(None, description="folder of further task files, relative to this file")
    judge: JudgeConfig | None = Field(None, description="of tasks that need one")
    max_errors: NonNegativeInt = Field(0, description="faults in scoring that lmms-eval logs; more: there is no result")


def read(path: Path, overrides: list[str]) -> Benchmark:
    """A benchmark file with the overrides that begin with `benchmark.`; `include` becomes an absolute path.

    Raises UserError that names file and key.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such benchmark file; see recipes/benchmarks/")
    raw = read_yaml(path)
    for item in overrides:
        override(raw, item.removeprefix(PREFIX))
    found = validated(Benchmark, raw, path)
    if found.include is not None:
        folder = (path.parent / found.include).resolve()
        if not folder.is_dir():
            raise UserError(f"{path}: include: {folder}: no such folder")
        found = found.changed({"include": str(folder)})
    if found.judge is not None:
        found.judge.check("judge")
    return found


def split(overrides: list[str]) -> tuple[list[str], list[str]]:
    """(for the recipe, for the benchmark file)."""
    mine = [o for o in overrides if o.startswith(PREFIX)]
    return [o for o in overrides if o not in mine], mine
