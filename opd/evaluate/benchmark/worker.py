"""The process that runs lmms-eval: its tasks, our servers, one table. Loads tokenizers and the processor, no model."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor import preflight
from opd.doctor.checks import Facts
from opd.evaluate.benchmark.settings import Benchmark, read, split
from opd.evaluate.records import model
from opd.models.context_limit import ContextLimit
from opd.processes.supervise import RunFailed
from opd.processes.with_servers import served
from opd.settings import UserError
from opd.storage import run_folder
from opd.storage.journal import Journal
from opd.storage.json_lines import write_atomic
from opd.storage.metrics import MetricsLog

RAW = "lmms_eval"  # folder of lmms-eval's own results


def run(config: Config, benchmark: Benchmark, out: Path, log: MetricsLog, check_only: bool) -> None:
    """Load and try the tasks, answer them on the servers, score, write. Raises UserError, RunFailed, ServerError."""
    log.status("loading", "tasks and data sets", 0, 1)
    try:
        from lmms_eval import evaluator
        from lmms_eval.utils import handle_non_serializable

        from opd.evaluate.benchmark import judging, results, scoring, student
    except ImportError as e:
        raise UserError(f"lmms-eval does not load: {e}; pip install 'opd[benchmarks]', or the package named") from e
    judging.install(benchmark.judge, out / "judge.jsonl")
    faults = scoring.Faults()
    guesses = scoring.Guesses(benchmark.seed, faults)
    faults.watch()
    guesses.install()
    tasks = scoring.Tasks(benchmark, guesses, faults)
    if check_only:
        tasks.load_task_or_group(benchmark.tasks)
        log.status("finished", f"{len(tasks.loaded)} tasks", 1, 1)
        return
    facts = Facts(config)
    preflight.student(facts)
    preflight.servers(facts)
    limit = ContextLimit(facts.family, 0, facts.max_model_len)
    asked = argparse.Namespace(process_with_media=False, reasoning_tags=None, output_path=str(out / RAW))
    journal = Journal(out / "answers", 0)
    try:
        lm = student.Student(config, benchmark, limit, journal, model(config.student.path, config.student.dtype))
        lm.tell = lambda said: log.status("evaluating", said, 0, 1)
        found = evaluator.simple_evaluate(
            model=lm,
            model_args=config.student.path,
            tasks=list(benchmark.tasks),
            task_manager=tasks,
            limit=benchmark.limit,
            log_samples=True,
            bootstrap_iters=0,  # the standard errors are ours
            cli_args=asked,
            process_docs_parallel=benchmark.judge.parallel if benchmark.judge else 1,
            random_seed=benchmark.seed,
            numpy_random_seed=benchmark.seed,
            torch_random_seed=benchmark.seed,
            fewshot_random_seed=benchmark.seed,
        )
    except judging.JudgeFailed as e:
        raise UserError(f"{e}; the answers are kept, the same command goes on") from e
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}; the answers are kept, the same command goes on") from e
    finally:
        journal.close()
    assert found is not None
    _write_raw(out / RAW, found, handle_non_serializable)
    if len(faults.found) > benchmark.max_errors:
        raise RunFailed(
            f"{len(faults.found)} faults in lmms-eval's scoring, which it counts as wrong answers, such as: "
            f"{faults.found[0][:200]}; see {out / RAW}; benchmark.max_errors lets some pass"
        )
    sources = results.datasets_of(tasks.loaded)
    table = [
        {**row, "dataset": sources[row["task"]], "guessed": guesses.count[row["task"]]}
        | {"cut_off": lm.cut_off[row["task"]], "clips_cut": lm.clips_cut[row["task"]]}
        for row in results.rows(found)
    ]
    if not table:
        raise RunFailed(f"{', '.join(benchmark.tasks)}: lmms-eval gave no number; see {out / RAW}")
    notes = _notes(benchmark, table, len(faults.found)) + results.left_out(found)
    content = {
        "benchmark": benchmark.model_dump(),
        "student": model(config.student.path, config.student.dtype),
        "lmms_eval": version("lmms_eval"),
        "versions": run_folder.package_versions(),
        "git_commit": run_folder.git_commit(),
        "results": table,
        "judged": judging.Judge.asked,
        "faults": faults.found,
        "notes": notes,
    }
    write_atomic(out / "benchmark.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    log.status("finished", f"{len(table)} numbers", 1, 1)


def _write_raw(folder: Path, found: dict[str, Any], plain: Any) -> None:
    """lmms-eval's results and samples, as its own command dumps them."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("samples_*.jsonl"):
        old.unlink()
    for task, samples in found["samples"].items():
        lines = "".join(json.dumps(s, default=plain, ensure_ascii=False) + "\n" for s in samples)
        write_atomic(folder / f"samples_{task}.jsonl", lines)
    rest = {k: v for k, v in found.items() if k != "samples"}
    write_atomic(folder / "results.json", json.dumps(rest, indent=2, default=plain, ensure_ascii=False) + "\n")


def _notes(benchmark: Benchmark, table: list[dict[str, Any]], faults: int) -> list[str]:
    notes = []
    if benchmark.limit is not None:
        notes.append(f"the first {benchmark.limit} records of each task: no number to publish")
    if any(r["guessed"] for r in table):
        notes.append("guessed: responses that name no option; lmms-eval draws one at random, which is right by chance")
    if any(r["cut_off"] for r in table):
        notes.append("cut off: answers that max_tokens ended")
    if cut := {r["task"]: r["clips_cut"] for r in table if r["clips_cut"]}:
        said = ", ".join(f"{n} of {t}" for t, n in cut.items())
        notes.append(f"clips cut at the longest that is allowed: {said}")
    if faults:
        notes.append(f"{faults} faults in scoring, counted as wrong answers; see benchmark.json")
    return notes


def main(argv: list[str]) -> int:
    """The process's entry: how it ended is in status.json of the folder."""
    parser = argparse.ArgumentParser(prog="opd.evaluate.benchmark.worker")
    parser.add_argument("--check", action="store_true", help="load and try the tasks, ask no server")
    parser.add_argument("recipe")
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(argv)
    log = MetricsLog(args.out, [], "", "eval")
    try:
        theirs, ours = split(args.overrides)
        config = served(load_config(args.recipe, theirs), args.out, teacher=False)
        run(config, read(args.benchmark, ours), args.out, log, args.check)
    except UserError as e:
        log.failed(0, 1, str(e), True)
        print(f"opd: error: {e}", file=sys.stderr)
        return 2
    except Exception as e:
        log.failed(0, 1, str(e) if isinstance(e, RunFailed) else f"{type(e).__name__}: {e}"[:600], False)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
