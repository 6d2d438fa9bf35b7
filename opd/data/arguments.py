"""What `opd data` takes. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opd.settings import UserError

STAGES = {
    "prompts": "questions to speak, from chats, instructions or plain text",
    "rewrite": "questions as one would say them, by a chat model",
    "speak": "speak the questions, by espeak-ng or an OpenAI-compatible endpoint",
    "natural": "spoken prompts from recordings that have transcripts",
    "verify": "leave out clips in which a speech recogniser hears something else",
    "respond": "the teacher's own answers to the transcripts",
    "benchmark": "a public benchmark of speech, for `opd eval`",
}


class _StageHelp(argparse.Action):
    """`--help` that also lists the settings of the stage, which only then is imported."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show this")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from opd.data.command import describe

        print(f"{parser.format_help()}\n{describe(parser.prog.split()[-1])}")
        parser.exit()


def add_data(commands) -> None:
    """Add `opd data` and its stages to the subcommands of `opd`."""
    text = "make manifests of spoken prompts, stage by stage"
    stages = commands.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="STAGE")
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text, add_help=False)
        source = "manifest, data file, folder or hub:owner/name[/config][:split]"
        named = "voicebench, big_bench_audio, mmar, mmau or audio_multichallenge"
        stage.add_argument(
            "source", **({"metavar": "NAME", "help": named} if name == "benchmark" else {"help": source})
        )
        stage.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="a setting of the stage")
        stage.add_argument("--out", type=Path, required=True, help="manifest to write, .jsonl or .parquet")
        stage.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
        stage.add_argument("--shard", metavar="I/N", help="do every N-th record from the I-th on, in this process")
        stage.add_argument("--workers", type=int, metavar="N", help="records worked on at a time")
        stage.add_argument("--limit", type=int, metavar="N", help="read no more records")
        stage.add_argument("-h", "--help", action=_StageHelp)
        stage.set_defaults(run=_data, stage=name)
    text = "the stages that a recipe names, one after another"
    pipeline = stages.add_parser("run", help=text, description=text)
    pipeline.add_argument("recipe", type=Path, help="YAML file, such as recipes/data/spoken_questions.yaml")
    example = "such as source=mine.jsonl or speak.sample_rate=24000"
    pipeline.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=example)
    pipeline.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for STAGE.jsonl and audio/")
    pipeline.add_argument("--workers", type=int, metavar="N", help="records worked on at a time")
    pipeline.set_defaults(run=_pipeline)
    text = "a page with players: clips as a recipe's training hears them"
    listen = stages.add_parser("listen", help=text, description=text)
    listen.add_argument("recipe", help="YAML file")
    listen.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as data.augment.noise.share=1"
    )
    listen.set_defaults(run=_listen)
    listen.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    listen.add_argument("--records", type=int, default=12, metavar="N", help="default: 12")
    listen.add_argument("--epochs", type=int, default=3, metavar="N", help="of each record (default: 3)")
    text = "choose the texts to speak where a student hears badly, within a budget of hours"
    chooser = stages.add_parser("select", help=text, description=text, add_help=False)
    chooser.add_argument("source", help="manifest of texts")
    chooser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="a setting, such as hours=10")
    probe = "folder of `opd eval`, of the student on a few spoken texts; repeatable"
    chooser.add_argument("--probe", type=Path, action="append", required=True, metavar="FOLDER", help=probe)
    chooser.add_argument("--out", type=Path, required=True, help="manifest to write, .jsonl or .parquet")
    chooser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    chooser.add_argument("-h", "--help", action=_StageHelp)
    chooser.set_defaults(run=_select)
    text = "what is in manifests, in numbers; refuses splits that leak into one another"
    card = stages.add_parser("card", help=text, description=text)
    card.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="one for each split")
    card.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for card.json, card.html, README.md")
    card.add_argument("--allow-leaks", action="store_true", help="list what splits share, and go on")
    card.add_argument("--title", help="of the data set (default: the folder's name)")
    card.add_argument("--license", metavar="ID", help="as the Hub names it, such as cc-by-4.0")
    card.add_argument("--language", metavar="CODE", help="ISO 639-1, such as en")
    card.set_defaults(run=_card)


def _select(args: argparse.Namespace) -> int:
    from opd.data.command import settings_of
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


def _data(args: argparse.Namespace) -> int:
    from opd.data import command

    return command.main(args)


def _pipeline(args: argparse.Namespace) -> int:
    from opd.data import command

    return command.pipeline(args)


def _listen(args: argparse.Namespace) -> int:
    from opd.data import listen

    for name in ("records", "epochs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected a number above 0, found {getattr(args, name)}")
    return listen.main(args.recipe, args.overrides, args.out, args.records, args.epochs)
