"""The command `opd study`."""

from __future__ import annotations

from pathlib import Path

from opd.settings import UserError
from opd.storage import run_folder
from opd.study.grid import Study
from opd.study.schedule import TO_RUN, Subprocesses, run_all
from opd.study.spec import Row


def main(
    path: Path,
    only: list[str],
    jobs: int | None,
    dry_run: bool,
    report_only: bool,
    launcher: Subprocesses | None = None,
) -> int:
    """Run what is missing, then write the tables. 0: all done; 1: a run failed; 128 + number: a signal ended it.

    Raises UserError for a mistake in the study, its recipes, or a pattern of `only`, for files that its runs would
    miss, where another study is at work, and for a report of nothing.
    """
    study = Study(path)
    wanted = study.chosen_rows(only)
    if not report_only:
        study.check_files(wanted)
    if dry_run:
        show(study, wanted)
        return 0
    code = 0
    if report_only:
        if not any(study.outcome(run).finished for row in study.rows.values() for run in study.named(row)):
            raise UserError(f"{study.out}: nothing to report yet, no finished run of {path} in there")
    else:
        with run_folder.lock(study.out, of="out", by="opd study"):
            failed, code = run_all(study, wanted, jobs or study.spec.jobs, launcher or Subprocesses(), _say)
        if failed:
            print(f"failed: {', '.join(run.name for run in failed)}", flush=True)
            code = code or 1
    from opd.study.results import write  # pandas and scipy, which listing and running need not wait for

    write(study, _say)
    return code


def show(study: Study, wanted: list[Row]) -> None:
    """List what there is of every row, and what a study would run."""
    counts = dict.fromkeys(("finished", *TO_RUN, "conflict", "open"), 0)
    for row in wanted:
        named = study.named(row)
        for run in named:
            outcome = study.outcome(run)
            counts[outcome.state] += 1
            why = outcome.error if outcome.state in ("failed", "conflict") else study.problem(run)
            waits = f": {why}" if why and outcome.state != "finished" else ""
            print(f"{outcome.state:9} {run.name}{waits}")
        if open_ := study.count(row) - len(named):
            counts["open"] += open_
            print(f"{'open':9} {row.id}: {open_} runs whose learning rate is not chosen yet")
    total = sum(map(study.count, wanted))
    print(f"{total} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n))


def _say(line: str) -> None:
    print(line, flush=True)
