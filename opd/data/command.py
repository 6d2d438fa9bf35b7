"""The command `opd data`. Stages, and what is heavy, are imported when they are asked for."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from opd.data.engine.runner import run_stage
from opd.data.stages import STAGES, stage_class
from opd.settings import S, UserError, override, read_yaml, validated

say = partial(print, flush=True)


def add_data(commands) -> None:
    """Add `opd data` and its stages to the subcommands of `opd`."""
    text = "make manifests of spoken prompts, stage by stage"
    stages = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="STAGE")

    def command(name: str, text: str, run: Any, own_help: bool = False) -> argparse.ArgumentParser:
        parser = stages.add_parser(name, help=text, description=text, add_help=not own_help)
        parser.set_defaults(run=run)
        return parser

    def overrides(parser: argparse.ArgumentParser, example: str) -> None:
        parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=example)

    def written(parser: argparse.ArgumentParser, help: str, metavar: str | None = None) -> None:
        parser.add_argument("--out", type=Path, required=True, metavar=metavar, help=help)

    manifest, config = "manifest to write, .jsonl or .parquet", "YAML file with settings"
    for name, (_, text, _) in STAGES.items():
        stage = command(name, text, _stage, own_help=True)
        if name == "benchmark":
            named = "voicebench, big_bench_audio, mmar, mmau or audio_multichallenge"
            stage.add_argument("source", metavar="NAME", help=named)
        else:
            stage.add_argument("source", help="manifest, data file, folder or hub:owner/name[/config][:split]")
        overrides(stage, "a setting of the stage")
        written(stage, manifest)
        stage.add_argument("--config", type=Path, metavar="FILE", help=config)
        stage.add_argument("--shard", metavar="I/N", help="do every N-th record from the I-th on, in this process")
        stage.add_argument("--workers", type=int, metavar="N", help="records worked on at a time")
        stage.add_argument("--limit", type=int, metavar="N", help="read no more records")
        stage.add_argument("-h", "--help", action=_StageHelp)
        stage.set_defaults(stage=name)
    pipeline = command("run", "the stages that a recipe names, one after another", _pipeline)
    pipeline.add_argument("recipe", type=Path, help="YAML file, such as recipes/data/spoken_questions.yaml")
    overrides(pipeline, "such as source=mine.jsonl or speak.sample_rate=24000")
    written(pipeline, "for STAGE.jsonl and audio/", "FOLDER")
    pipeline.add_argument("--workers", type=int, metavar="N", help="records worked on at a time")
    listen = command("listen", "a page with players: clips as a recipe's training hears them", _listen)
    listen.add_argument("recipe", help="YAML file")
    overrides(listen, "such as data.augment.noise.share=1")
    written(listen, "HTML file to write", "FILE")
    listen.add_argument("--records", type=int, default=12, metavar="N", help="default: 12")
    listen.add_argument("--epochs", type=int, default=3, metavar="N", help="of each record (default: 3)")
    text = "choose the texts to speak where a student hears badly, within a budget of hours"
    chooser = command("select", text, _select, own_help=True)
    chooser.add_argument("source", help="manifest of texts")
    overrides(chooser, "a setting, such as hours=10")
    probe = "folder of `opd eval`, of the student on a few spoken texts; repeatable"
    chooser.add_argument("--probe", type=Path, action="append", required=True, metavar="FOLDER", help=probe)
    written(chooser, manifest)
    chooser.add_argument("--config", type=Path, metavar="FILE", help=config)
    chooser.add_argument("-h", "--help", action=_StageHelp)
    card = command("card", "what is in manifests, in numbers; refuses splits that leak into one another", _card)
    card.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="one for each split")
    written(card, "for card.json, card.html, README.md", "FOLDER")
    card.add_argument("--allow-leaks", action="store_true", help="list what splits share, and go on")
    card.add_argument("--title", help="of the data set (default: the folder's name)")
    card.add_argument("--license", metavar="ID", help="as the Hub names it, such as cc-by-4.0")
    card.add_argument("--language", metavar="CODE", help="ISO 639-1, such as en")


class _StageHelp(argparse.Action):
    """`--help` that also lists the settings of the stage, which only then is imported."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show this")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.format_help()}\n{describe(parser.prog.split()[-1])}")
        parser.exit()


def settings_of(section: type[S], config: Path | None, overrides: list[str], command: str) -> S:
    """Settings from a YAML file, if any, and key=value. Raises UserError that names file or command, and key."""
    raw: dict[str, Any] = read_yaml(config) if config else {}
    for item in overrides:
        override(raw, item)
    return validated(section, raw, str(config or command))


def _stage(args: argparse.Namespace) -> int:
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


def _pipeline(args: argparse.Namespace) -> int:
    """Run the stages of a recipe: 0 done, 1 when records failed and may be tried again."""
    from opd.data.pipeline import Pipeline, run

    recipe = settings_of(Pipeline, args.recipe, args.overrides, "opd data run")
    _check_counts(args, "workers")
    with _ending_at_once():
        done = run(recipe, args.out, args.workers, say)
    return 1 if any(summary.failed for summary in done) else 0


def _listen(args: argparse.Namespace) -> int:
    from opd.data import listen

    _check_counts(args, "records", "epochs")
    return listen.main(args.recipe, args.overrides, args.out, args.records, args.epochs)


def _select(args: argparse.Namespace) -> int:
    from opd.data.select.command import Selection, select

    settings = settings_of(Selection, args.config, args.overrides, "opd data select")
    for path in select(args.source, args.probe, args.out, settings):
        print(f"wrote {path}")
    return 0


def _card(args: argparse.Namespace) -> int:
    from opd.data.card.command import write_card

    about = {k: v for k in ("title", "license", "language") if (v := getattr(args, k))}
    for path in write_card(args.manifests, args.out, args.allow_leaks, about):
        print(f"wrote {path}")
    return 0


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
    if name not in STAGES:
        from opd.data.select.command import Selection
    section = stage_class(name) if name in STAGES else Selection
    lines = [f"settings of `opd data {name}`, as key=value or in a YAML file (--config):"]
    for key, field in section.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {key:<16} {field.description or ''} ({_kind(field.annotation)}; {default})")
    return "\n".join(lines)


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
