"""The command `opd data`."""

from __future__ import annotations

import argparse
import importlib
from functools import partial
from typing import Any, get_args

from opd.data.runner import run_stage
from opd.data.stage import Stage
from opd.settings import UserError, override, read_yaml, validated

STAGES = {
    "prompts": "opd.data.prompts:Prompts",
    "rewrite": "opd.data.rewrite:Rewrite",
    "speak": "opd.data.speak:Speak",
    "verify": "opd.data.verify:Verify",
    "respond": "opd.data.respond:Respond",
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage, imported when it is asked for."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_stage(name: str, settings: dict[str, Any], source: str) -> Stage:
    """A stage with these settings. Raises UserError that names `source` and the setting at fault."""
    return validated(stage_class(name), settings, source)


def main(args: argparse.Namespace) -> int:
    """Run one stage: 0 done, 1 when records failed or other shards have work left."""
    raw: dict[str, Any] = read_yaml(args.config) if args.config else {}
    for item in args.overrides:
        override(raw, item)
    stage = make_stage(args.stage, raw, str(args.config or f"opd data {args.stage}"))
    first, _, of = (args.shard or "0/1").partition("/")
    if not (first.isdigit() and of.isdigit()):
        raise UserError(f"--shard {args.shard}: expected I/N, such as 0/4")
    for option in ("workers", "limit"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option}: expected a number above 0, found {getattr(args, option)}")
    shard = int(first), int(of)
    summary = run_stage(stage, args.source, args.out, shard, args.workers, args.limit, partial(print, flush=True))
    print(summary)
    return 1 if summary.failed or summary.open else 0


def describe(name: str) -> str:
    """The settings of a stage, a line each."""
    stage = stage_class(name)
    lines = [f"settings of `opd data {stage.name}`, as key=value or in a YAML file (--config):"]
    for name, field in stage.model_fields.items():
        kind = getattr(field.annotation, "__name__", str(field.annotation)).replace("typing.", "")
        if choices := get_args(field.annotation):
            kind = "|".join(getattr(c, "__name__", str(c)) for c in choices)
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {name:<14} {field.description or ''} ({kind}; {default})")
    return "\n".join(lines)
