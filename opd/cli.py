"""The `opd` command. Imports nothing heavy: `opd --help` answers at once."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from opd import __version__
from opd.config.load import load_config
from opd.data.command import add_data
from opd.settings import RunFailed, UserError

# libraries that are not of the core, and the extra that brings them
OF_DATA = "datasketch jiwer k_means_constrained openai py3langid pyloudnorm sentence_transformers sklearn"
EXTRA_OF = dict.fromkeys(OF_DATA.split(), "data")
PLAIN = "plain lines instead of a live display"
LARGEST = 1e12  # of any option of `opd plan`; beyond it, as with nan and inf, arithmetic means nothing


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
        if callable(args.run):
            return args.run(args)
        given = vars(args)
        module, _, name = given.pop("run").partition(":")
        return getattr(import_module(module), name)(**given)  # only now it is imported
    except (UserError, RunFailed) as e:
        print(f"opd: error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1
    except ModuleNotFoundError as e:
        library = (e.name or "").partition(".")[0]
        if library not in EXTRA_OF:
            raise
        print(f"opd: error: {library} is not installed: pip install 'opd[{EXTRA_OF[library]}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opd", description="On-policy distillation of speech LLMs.")
    parser.add_argument("--version", action="version", version=f"opd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recipe = partial(_recipe_command, commands)
    launch = recipe("launch", "start servers and learner and train; on several nodes, on each", "opd.launch:launch")
    launch.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    launch.add_argument("--plain", action="store_true", help=PLAIN)
    serve = recipe("serve", "start a recipe's servers on this machine, for a learner elsewhere", "opd.launch:serve")
    serve.add_argument("--plain", action="store_true", help=PLAIN)
    recipe("check", "check recipe, models, tokenizers and data; start nothing", _check)
    doctor = recipe("doctor", "try everything that a run relies on, with real servers", "opd.doctor.command:main")
    doctor.add_argument("--no-server", action="store_false", dest="server", help="stop before what needs a vLLM server")
    doctor.add_argument("--json", type=Path, dest="json_file", metavar="FILE", help="write the findings there too")
    recipe("train", "one learner process; accelerate, deepspeed or torchrun start it", _train)
    _plan_command(commands)
    _study_command(commands)
    add_data(commands)
    families = commands.add_parser("families", help="list the speech LLM families, or prove that they work here")
    families.add_argument("names", nargs="*", metavar="NAME", help="of a family; all by default")
    families.add_argument("--check", action="store_true", help="try them on small random checkpoints: minutes each")
    families.add_argument("--keep", type=Path, metavar="FOLDER", help="keep checkpoints, runs and logs there")
    families.set_defaults(run="opd.doctor.families:main")
    _export_command(commands)
    _eval_commands(commands)
    report = commands.add_parser("report", help="write report.json and report.html of one or more runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, help="folder to write to (default: the last run's)")
    report.set_defaults(run=_report)
    return parser


def _command(commands, name, text, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _recipe_command(commands, name, text, run) -> argparse.ArgumentParser:
    parser = _command(commands, name, text, run)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as optim.lr=1e-4")
    return parser


def _export_command(commands) -> None:
    text = "write a checkpoint as a folder that is ready to push to the Hub"
    export = _command(commands, "export", text, _export)
    export.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    export.add_argument("--checkpoint", default="last", metavar="STEP", help="a step, last or best (default: last)")
    export.add_argument("--merge", action="store_true", help="with student.lora: the merged model, not the adapter")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _plan_command(commands) -> None:
    plan = _recipe_command(commands, "plan", "say where things go, and whether they fit", _plan)
    plan.description = (
        "Memory of every device, bytes of a weight push and a rough time, by formula from config.json files; nothing "
        "is loaded. Exit code 0: the recipe's placement fits, 1: it does not, 2: a mistake in recipe or options."
    )
    number = plan.add_argument
    number("--memory", type=float, default=80.0, metavar="GIB", help="of a GPU (default: 80)")
    number("--gpus", type=int, metavar="N", help="of a node (default: as the placement has)")
    number("--nodes", type=int, metavar="N", help="default: as the placement has")
    number("--host-memory", type=float, metavar="GIB", help="of a node; without it not judged, but on a CPU")
    number("--bandwidth", type=float, metavar="GB/S", help="of a weight push (default: nccl 50, ipc 500, file 2)")
    number("--tflops", type=float, default=989.0, help="dense bfloat16 of a GPU (default: 989, an H100)")
    number("--memory-bandwidth", type=float, default=3350.0, metavar="GB/S", help="of a GPU (default: 3350, an H100)")
    number("--prompt-tokens", type=int, default=64, metavar="N", help="of a prompt beside its audio (default: 64)")
    number("--clip-seconds", type=float, default=10.0, metavar="S", help="of a usual clip (default: 10)")
    number("--response-tokens", type=int, metavar="N", help="of a usual response (default: half of rollout.max_tokens)")
    number("--json", action="store_true", help="print JSON")


def _study_command(commands) -> None:
    text = "run methods side by side: learning rates, seeds, tables, plots"
    study = _command(commands, "study", text, "opd.study.command:main")
    study.add_argument("path", type=Path, metavar="STUDY", help="YAML file")
    only = "rows to run, with what they start from; * and ? as in file names; repeatable"
    study.add_argument("--only", action="append", default=[], metavar="WORLD/ROW", help=only)
    study.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: as the study has)")
    study.add_argument("--dry-run", action="store_true", help="list the runs and where they stand, start nothing")
    study.add_argument("--report-only", action="store_true", help="write tables and plots of what is there")


def _eval_commands(commands) -> None:
    text = "measure a student on vLLM servers, in the speech view and in the text view"
    measure = _recipe_command(commands, "eval", text, "opd.evaluate.command:main")
    measure.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the same one goes on")
    measure.add_argument("--no-teacher", action="store_false", dest="teacher", help="without what needs the teacher")
    measure.add_argument("--plain", action="store_true", help=PLAIN)
    text = "public benchmarks, through lmms-eval, on the student's vLLM servers"
    bench = _command(commands, "benchmark", text, "opd.evaluate.benchmark.command:main")
    bench.add_argument("recipe", help="YAML file")
    bench.add_argument("benchmark", type=Path, metavar="BENCHMARK", help="YAML file, such as recipes/benchmarks/*.yaml")
    keys = "of the recipe; benchmark.key=value of the benchmark file, such as benchmark.limit=20"
    bench.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=keys)
    bench.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the same one goes on")
    bench.add_argument("--plain", action="store_true", help=PLAIN)
    text = "runs and evaluations side by side; evaluations of the same records with a paired bootstrap"
    compare = _command(commands, "compare", text, "opd.evaluate.compare:main")
    compare.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, or --out of `opd eval`")
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="for compare.html and compare.json")
    compare.add_argument("--common", action="store_true", help="only the records that all evaluations share")
    text = "go on where folders were measured under other settings, and say so"
    compare.add_argument("--unlike", action="store_true", help=text)
    compare.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)")


def _plan(args: argparse.Namespace) -> int:
    from opd.plan import page as plan_page
    from opd.plan.estimate import Machine
    from opd.plan.step_time import Speeds

    names = ("memory", "host_memory", "bandwidth", "tflops", "memory_bandwidth", "clip_seconds")
    for name in (*names, "gpus", "nodes", "prompt_tokens", "response_tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= LARGEST and not (name == "gpus" and value == 0):
            expected = f"a number above 0 and at most {LARGEST:g}"
            raise UserError(f"--{name.replace('_', '-')}: expected {expected}, found {value}")
    speeds = Speeds(tflops=args.tflops, hbm=args.memory_bandwidth)
    if args.bandwidth is not None:
        speeds.links.update(dict.fromkeys(speeds.links, args.bandwidth))
    lengths = (args.prompt_tokens, args.clip_seconds, args.response_tokens)
    machine = Machine(args.gpus, args.nodes, args.memory, args.host_memory, speeds, *lengths)
    return plan_page.main(args.recipe, args.overrides, machine, args.json)


def _check(args: argparse.Namespace) -> int:
    from opd.doctor import preflight

    for line in preflight.check(load_config(args.recipe, args.overrides)):
        print(line)
    return 0


def _train(args: argparse.Namespace) -> int:
    from opd.train import __main__

    return __main__.main([args.recipe, *args.overrides])


def _export(args: argparse.Namespace) -> int:
    from opd.report.export import export

    for line in export(args.run_folder, args.out, args.checkpoint, args.merge, args.overwrite):
        print(line)
    return 0


def _report(args: argparse.Namespace) -> int:
    from opd.report.page import write_report

    for path in write_report(args.runs, args.out or args.runs[-1]):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
