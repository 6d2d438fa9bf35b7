"""The process that runs lmms-eval: its tasks, our servers, one table. Loads tokenizers and the processor, no model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

from opd.config.load import load_config
from opd.config.schema import Config
from opd.doctor import preflight
from opd.doctor.checks import Facts
from opd.evaluate.benchmark.command import Benchmark, read, split
from opd.evaluate.records import model
from opd.processes.with_servers import served
from opd.prompts.clips import ContextLimit
from opd.settings import RunFailed, UserError
from opd.storage import run_folder
from opd.storage.journal import Journal
from opd.storage.json_lines import write_atomic
from opd.storage.metrics import MetricsLog

RAW = "lmms_eval"  # folder of lmms-eval's own results
NEEDS = {"pedant_score": "qa_metrics"}  # metric -> package without which lmms-eval gives 0
ONE_RECORD = ("score", "overall")  # a record's value, where it is a mapping


def run(log: MetricsLog, recipe: str, benchmark: str, overrides: list[str], check_only: bool = False) -> None:
    """Load and try the tasks, answer them on the servers, score, write. Raises UserError, RunFailed, ServerError.

    check_only: load and try the tasks, ask no server.
    """
    theirs, ours = split(overrides)
    config = served(load_config(recipe, theirs), log.run_dir, teacher=False)
    asked = read(Path(benchmark), ours)
    log.status("loading", "tasks and data sets", 0, 1)
    try:
        from opd.evaluate.benchmark import scoring
    except ImportError as e:
        raise UserError(f"lmms-eval does not load: {e}; pip install 'opd[benchmarks]', or the package named") from e
    scoring.install_judge(asked.judge, log.run_dir / "judge.jsonl")
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

    from opd.evaluate.benchmark import scoring, student

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
    except scoring.JudgeFailed as e:
        raise UserError(f"{e}; the answers are kept, the same command goes on") from e
    except OSError as e:
        raise UserError(f"{out}: {e.strerror or e}; the answers are kept, the same command goes on") from e
    finally:
        journal.close()
    assert found is not None
    _write_raw(out / RAW, found)
    faults = tasks.faults.found
    if len(faults) > benchmark.max_errors:
        told = f"{len(faults)} faults in lmms-eval's scoring, which it counts as wrong answers"
        raise RunFailed(f"{told}, such as: {faults[0][:200]}; see {out / RAW}; benchmark.max_errors lets some pass")
    by_task = {"dataset": datasets_of(tasks.loaded), "guessed": tasks.guesses.count}
    by_task |= {"cut_off": lm.cut_off, "clips_cut": lm.clips_cut}
    table = [row | {name: of[row["task"]] for name, of in by_task.items()} for row in rows(found)]
    if not table:
        raise RunFailed(f"{', '.join(benchmark.tasks)}: lmms-eval gave no number; see {out / RAW}")
    return {
        "benchmark": benchmark.model_dump(),
        "student": about,
        "lmms_eval": version("lmms_eval"),
        "versions": run_folder.package_versions(),
        "git_commit": run_folder.git_commit(),
        "results": table,
        "judged": scoring.Judge.asked,
        "faults": faults,
        "notes": _notes(benchmark, table, len(faults)) + left_out(found),
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


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task and metric of the results of `lmms_eval.evaluator.simple_evaluate`."""
    out = []
    for task in sorted(found["configs"]):
        for key, value in found["results"][task].items():
            metric, _, filtered = key.partition(",")
            if not filtered or "_stderr" in metric or not isinstance(value, int | float):
                continue
            if metric in NEEDS and find_spec(NEEDS[metric]) is None:
                continue
            records = [_value(s.get(metric)) for s in found["samples"][task]]
            row = {"task": task, "metric": metric, "value": float(value), "stderr": stderr(float(value), records)}
            better = found["higher_is_better"].get(task, {}).get(metric)
            out.append(row | {"n": len(records), "higher_is_better": better, "version": found["versions"].get(task)})
    return out


def left_out(found: dict[str, Any]) -> list[str]:
    """Metrics that lmms-eval gave as 0 for want of a package."""
    given = {k.partition(",")[0] for task in found["configs"] for k in found["results"][task]}
    return [f"{m} is left out: it needs {p}" for m, p in NEEDS.items() if m in given and find_spec(p) is None]


def stderr(value: float, records: list[float | None]) -> float | None:
    """Standard error of a metric that is the mean of its records, or 100 times that; None for any other.

    lmms-eval's own is that of the records also where the metric is in percent.
    """
    known = [x for x in records if x is not None]
    if len(known) < 2 or len(known) < len(records):
        return None
    for scale in (1.0, 100.0):
        if math.isclose(scale * fmean(known), value, rel_tol=1e-4, abs_tol=1e-4):
            return scale * stdev(known) / math.sqrt(len(known))
    return None


def _value(x: Any) -> float | None:
    if isinstance(x, Mapping):
        x = next((x[k] for k in ONE_RECORD if k in x), None)
    return float(x) if isinstance(x, int | float) else None


def datasets_of(loaded: Mapping[str, Any]) -> dict[str, str]:
    """Data set and revision of each task, as `datasets` loaded it."""
    out = {}
    for name, task in loaded.items():
        sources = task.dataset[task.config.test_split or task.config.validation_split].info.download_checksums or {}
        revisions = {u.partition("@")[2].partition("/")[0] for u in sources if u.startswith("hf://")}
        config = f"/{task.config.dataset_name}" if task.config.dataset_name else ""
        out[name] = f"{task.config.dataset_path}{config}" + "".join(f"@{r}" for r in sorted(revisions) if r)
    return out
