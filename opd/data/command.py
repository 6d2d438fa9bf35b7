"""The command `opd data`."""

from __future__ import annotations

import argparse
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from opd.data.engine.runner import run_stage
from opd.data.engine.stage import Stage
from opd.settings import S, Section, UserError, override, read_yaml, validated

STAGES = {
    "prompts": "opd.data.stages.prompts:Prompts",
    "natural": "opd.data.stages.natural:Natural",
    "rewrite": "opd.data.stages.rewrite:Rewrite",
    "speak": "opd.data.stages.speak:Speak",
    "verify": "opd.data.stages.verify:Verify",
    "respond": "opd.data.stages.respond:Respond",
    "benchmark": "opd.data.stages.benchmark:LoadBenchmark",
}
say = partial(print, flush=True)


def stage_class(name: str) -> type[Stage]:
    """The class of a stage, imported when it is asked for."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def settings_of(section: type[S], config: Path | None, overrides: list[str], command: str) -> S:
    """Settings from a YAML file, if any, and key=value. Raises UserError that names file or command, and key."""
    raw: dict[str, Any] = read_yaml(config) if config else {}
    for item in overrides:
        override(raw, item)
    return validated(section, raw, str(config or command))


def main(args: argparse.Namespace) -> int:
    """Run one stage, or this process's shard of it: 0 done, 1 when records failed and may be tried again."""
    stage = settings_of(stage_class(args.stage), args.config, args.overrides, f"opd data {args.stage}")
    first, _, of = (args.shard or "0/1").partition("/")
    if not (first.isdigit() and of.isdigit()):
        raise UserError(f"--shard {args.shard}: expected I/N, such as 0/4")
    _check_counts(args, "workers", "limit")
    shard = int(first), int(of)
    with _ending_at_once():
        summary = run_stage(stage, args.source, args.out, shard, args.workers, args.limit, say)
    say(str(summary))
    if not summary.open:
        for line in stage.advice(args.source, args.out):
            say(line)
    return 1 if summary.failed else 0


def pipeline(args: argparse.Namespace) -> int:
    """Run the stages of a recipe: 0 done, 1 when records failed and may be tried again."""
    from opd.data.pipeline import Pipeline, run

    recipe = settings_of(Pipeline, args.recipe, args.overrides, "opd data run")
    _check_counts(args, "workers")
    with _ending_at_once():
        done = run(recipe, args.out, args.workers, say)
    return 1 if any(summary.failed for summary in done) else 0


def _check_counts(args: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option}: expected a number above 0, found {getattr(args, option)}")


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """After Ctrl-C Python would wait for requests that may take minutes; what is done is on the disk."""
    try:
        yield
    except KeyboardInterrupt:
        if any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread()):
            os._exit(130)
        raise


def describe(name: str) -> str:
    """The settings of a stage, or of `select`, a line each."""
    section = stage_class(name) if name in STAGES else _selection()
    lines = [f"settings of `opd data {name}`, as key=value or in a YAML file (--config):"]
    for key, field in section.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {key:<16} {field.description or ''} ({_kind(field.annotation)}; {default})")
    return "\n".join(lines)


def _selection() -> type[Section]:
    from opd.data.select.command import Selection

    return Selection


def _kind(annotation: Any) -> str:
    """A type as a user would write down what it takes."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, inside))
    if origin is Annotated:
        return _kind(inside[0])
    if origin in (Union, UnionType):
        return " or ".join(_kind(kind) for kind in inside if kind is not NoneType)
    return str(annotation) if origin else getattr(annotation, "__name__", str(annotation))
