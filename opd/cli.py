"""The `opd` command. Imports nothing heavy: `opd --help` answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opd import __version__
from opd.config import UserError, load_config


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 a user's mistake (one line on stderr), 130 interrupted, 1 anything else."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes no positionals after an option once it has begun: `launch RECIPE --plain optim.lr=1e-4`
    if any(item.startswith("-") for item in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return args.run(args)
    except UserError as e:
        print(f"opd: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opd", description="On-policy distillation of speech LLMs.")
    parser.add_argument("--version", action="version", version=f"opd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    launch = _recipe_command(commands, "launch", "start servers and learner on this machine and train", _launch)
    launch.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    launch.add_argument("--plain", action="store_true", help="plain lines instead of a live display")
    _recipe_command(commands, "check", "check recipe, models, tokenizers and data; start nothing", _check)
    doctor = _recipe_command(commands, "doctor", "try everything that a run relies on, with real servers", _doctor)
    doctor.add_argument("--no-server", action="store_true", help="stop before what needs a vLLM server")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    _recipe_command(commands, "train", "one learner process; accelerate, deepspeed or torchrun start it", _train)
    families = commands.add_parser("families", help="list the speech LLM families, or prove that they work here")
    families.add_argument("names", nargs="*", metavar="NAME", help="of a family; all by default")
    families.add_argument("--check", action="store_true", help="try them on small random checkpoints: minutes each")
    families.add_argument("--keep", type=Path, metavar="FOLDER", help="keep checkpoints, runs and logs there")
    families.set_defaults(run=_families)
    report = commands.add_parser("report", help="write report.json and report.html of one or more runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, help="folder to write to (default: the last run's)")
    report.set_defaults(run=_report)
    return parser


def _recipe_command(commands, name, text, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as optim.lr=1e-4")
    parser.set_defaults(run=run)
    return parser


def _launch(args: argparse.Namespace) -> int:
    from opd import launch

    return launch.main(args.recipe, args.overrides, args.dry_run, args.plain)


def _check(args: argparse.Namespace) -> int:
    from opd import preflight

    for line in preflight.check(load_config(args.recipe, args.overrides)):
        print(line)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from opd import doctor

    return doctor.main(args.recipe, args.overrides, not args.no_server, args.json)


def _train(args: argparse.Namespace) -> int:
    from opd import train

    return train.main([args.recipe, *args.overrides])


def _families(args: argparse.Namespace) -> int:
    from opd import family_check

    return family_check.check(args.names, args.keep) if args.check else family_check.show()


def _report(args: argparse.Namespace) -> int:
    from opd.report import write_report

    for path in write_report(args.runs, args.out or args.runs[-1]):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
