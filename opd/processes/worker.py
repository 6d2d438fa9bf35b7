"""The one entry of processes that work for a command: `python -m opd.processes.worker MODULE:FUNCTION FOLDER JSON`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from opd.processes.commands import Command
from opd.settings import RunFailed, UserError
from opd.storage.metrics import MetricsLog

QUIET = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def arguments(target: str, folder: Path, given: dict[str, Any]) -> list[str]:
    """Module and arguments by which python, or a launcher of ranks, calls the function `target`."""
    return ["opd.processes.worker", target, str(folder), json.dumps(given)]


def worker(name: str, target: str, folder: Path, given: dict[str, Any]) -> Command:
    """One such process, without a GPU."""
    return Command(name, [sys.executable, "-m", *arguments(target, folder, given)], QUIET)


def main(target: str, folder: str, given: str) -> int:
    """Call a function with the folder's log and the keyword arguments that `given` holds as JSON.

    How it ended is in the folder's status.json. 0, or 2 for a user's mistake, which is one line on stderr. All else
    travels.
    """
    module, _, name = target.partition(":")
    log = MetricsLog(Path(folder), [], "", "")
    try:
        getattr(import_module(module), name)(log, **json.loads(given))
    except UserError as e:
        log.failed(0, 1, str(e), True)
        print(f"opd: error: {e}", file=sys.stderr)
        return 2
    except Exception as e:
        log.failed(0, 1, str(e) if isinstance(e, RunFailed) else f"{type(e).__name__}: {e}"[:600], False)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
