"""The command `opd benchmark`: servers up, lmms-eval through, one table. Imports no torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from opd.config.load import load_config
from opd.evaluate.benchmark.results import text
from opd.evaluate.benchmark.settings import read, split
from opd.evaluate.records import claim, model
from opd.processes.with_servers import ask, served
from opd.settings import UserError
from opd.storage import run_folder

WORKER = "opd.evaluate.benchmark.worker:run"
INSTALL = "pip install 'opd[benchmarks]'"


def main(recipe: str, benchmark: Path, overrides: list[str], out: Path, plain: bool = False) -> int:
    """Answer, score, print the table. 0: done; 128 + number: a signal ended it.

    Raises UserError for what the user can mend, and RunFailed for all else that ends a server or the benchmark.
    """
    theirs, ours = split(overrides)
    config, found = load_config(recipe, theirs), read(benchmark, ours)
    if find_spec("lmms_eval") is None:
        raise UserError(f"opd benchmark needs the library lmms-eval, which is not installed: {INSTALL}")
    config = served(config, out, teacher=False)
    given = {"recipe": recipe, "benchmark": str(benchmark), "overrides": overrides}
    with run_folder.lock(out, of="--out", by="opd benchmark"):
        claim(out, {"student": model(config.student.path, config.student.dtype), "tasks": found.tasks})
        (out / "benchmark.json").unlink(missing_ok=True)
        if not config.rollout.urls:  # a mistake is told before servers take minutes to start
            print("trying the tasks", flush=True)
            if code := ask(config, "tasks", WORKER, given | {"check_only": True}, plain, start=False):
                return code
        if code := ask(config, "benchmark", WORKER, given, plain):
            return code
        print(text(json.loads((out / "benchmark.json").read_text())))
        for name in ("benchmark.json", "lmms_eval/results.json"):
            print(f"wrote {out / name}")
    return 0
