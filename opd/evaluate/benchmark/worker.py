"""The process that runs lmms-eval: its tasks, our servers, one table. Loads tokenizers and the processor, no model."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor import preflight
from opd.doctor.checks import Facts
from opd.evaluate.benchmark.settings import Benchmark, read, split
from opd.evaluate.records import model
from opd.processes.with_servers import served
from opd.prompts.clips import ContextLimit
from opd.settings import RunFailed, UserError
from opd.storage import run_folder
from opd.storage.journal import Journal
from opd.storage.json_lines import write_atomic
from opd.storage.metrics import MetricsLog

RAW = "lmms_eval"  # folder of lmms-eval's own results


def run(log: MetricsLog, recipe: str, benchmark: str, overrides: list[str], check_only: bool = False) -> None:
    """Load and try the tasks, answer them on the servers, score, write. Raises UserError, RunFailed, ServerError.

    check_only: load and try the tasks, ask no server.
    """
    theirs, ours = split(overrides)
    config = served(load_config(recipe, theirs), log.run_dir, teacher=False)
    asked = read(Path(benchmark), ours)
    log.status("loading", "tasks and data sets", 0, 1)
    try:
        from opd.evaluate.benchmark import judging, scoring
    except ImportError as e:
        raise UserError(f"lmms-eval does not load: {e}; pip install 'opd[benchmarks]', or the package named") from e
    judging.install(asked.judge, log.run_dir / "judge.jsonl")
    faults = scoring.Faults()
    guesses = scoring.Guesses(asked.seed, faults)
    faults.watch()
    guesses.install()
    tasks = scoring.Tasks(asked, guesses, faults)
    if check_only:
        tasks.load_task_or_group(asked.tasks)
        log.status("finished", f"{len(tasks.loaded)} tasks", 1, 1)
        return
    content = _answered(config, asked, tasks, log)
    write_atomic(log.run_dir / "benchmark.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    log.status("finished", f"{len(content['results'])} numbers", 1, 1)


def _answered(config: Config, benchmark: Benchmark, tasks: Any, log: MetricsLog) -> dict[str, Any]:
    """What goes into benchmark.json, once every question of the `scoring.Tasks` is answered and scored."""
    from lmms_eval import evaluator

    from opd.evaluate.benchmark import judging, results, student

    out = log.run_dir
    facts = Facts(config)
    preflight.student(facts)
    preflight.servers(facts)
    limit, about = ContextLimit(facts.family, 0, facts.max_model_len), model(config.student.path, config.student.dtype)
    journal = Journal(out / "answers", 0)
    try:
        lm = student.Student(config, benchmark, limit, journal, about)
        lm.tell = lambda said: log.status("evaluating", said, 0, 1)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        found = evaluator.simple_evaluate(
            model=lm,
            model_args=config.student.path,
            tasks=list(benchmark.tasks),
            task_manager=tasks,
            limit=benchmark.limit,
            log_samples=True,
            bootstrap_iters=0,  # the standard errors are ours
            cli_args=SimpleNamespace(process_with_media=False, reasoning_tags=None, output_path=str(out / RAW)),
            process_docs_parallel=benchmark.judge.parallel if benchmark.judge else 1,
            **dict.fromkeys(seeds, benchmark.seed),
        )
    except judging.JudgeFailed as e:
        raise UserError(f"{e}; the answers are kept, the same command goes on") from e
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}; the answers are kept, the same command goes on") from e
    finally:
        journal.close()
    assert found is not None
    _write_raw(out / RAW, found)
    faults = tasks.faults.found
    if len(faults) > benchmark.max_errors:
        raise RunFailed(
            f"{len(faults)} faults in lmms-eval's scoring, which it counts as wrong answers, such as: "
            f"{faults[0][:200]}; see {out / RAW}; benchmark.max_errors lets some pass"
        )
    sources, guessed = results.datasets_of(tasks.loaded), tasks.guesses.count
    table = [
        {**row, "dataset": sources[row["task"]], "guessed": guessed[row["task"]]}
        | {"cut_off": lm.cut_off[row["task"]], "clips_cut": lm.clips_cut[row["task"]]}
        for row in results.rows(found)
    ]
    if not table:
        raise RunFailed(f"{', '.join(benchmark.tasks)}: lmms-eval gave no number; see {out / RAW}")
    return {
        "benchmark": benchmark.model_dump(),
        "student": about,
        "lmms_eval": version("lmms_eval"),
        "versions": run_folder.package_versions(),
        "git_commit": run_folder.git_commit(),
        "results": table,
        "judged": judging.Judge.asked,
        "faults": faults,
        "notes": _notes(benchmark, table, len(faults)) + results.left_out(found),
    }


def _write_raw(folder: Path, found: dict[str, Any]) -> None:
    """lmms-eval's results and samples, as its own command dumps them."""
    from lmms_eval.utils import handle_non_serializable as plain

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
