"""The command `opd benchmark` and its file: servers up, lmms-eval through, one table. Imports no torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from opd.config.load import load_config
from opd.endpoint import Endpoint
from opd.evaluate import page
from opd.evaluate.records import claim, model
from opd.processes.with_servers import ask, served
from opd.settings import Section, UserError, override, read_yaml, validated
from opd.storage import run_folder

WORKER = "opd.evaluate.benchmark.worker:run"
INSTALL = "pip install 'opd[benchmarks]'"
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


def main(recipe: str, benchmark: Path, overrides: list[str], out: Path, plain: bool = False) -> int:
    """Answer, score, print the table. 0: done; 128 + number: a signal ended it.

    Raises UserError for what the user can mend, and RunFailed for all else that ends a server or the benchmark.
    """
    theirs, ours = split(overrides)
    config, found = load_config(recipe, theirs), read(benchmark, ours)
    if find_spec("lmms_eval") is None:
        raise UserError(f"opd benchmark needs the library lmms-eval, which is not installed: {INSTALL}")
    config = served(config, out, teacher=False)
    given = {"recipe": recipe, "benchmark": str(benchmark), "overrides": overrides}
    with run_folder.lock(out, of="--out", by="opd benchmark"):
        claim(out, {"student": model(config.student.path, config.student.dtype), "tasks": found.tasks})
        (out / "benchmark.json").unlink(missing_ok=True)
        if not config.rollout.urls:  # a mistake is told before servers take minutes to start
            print("trying the tasks", flush=True)
            if code := ask(config, "tasks", WORKER, given | {"check_only": True}, plain, start=False):
                return code
        if code := ask(config, "benchmark", WORKER, given, plain):
            return code
        print(page.benchmark_text(json.loads((out / "benchmark.json").read_text())))
        for name in ("benchmark.json", "lmms_eval/results.json"):
            print(f"wrote {out / name}")
    return 0
