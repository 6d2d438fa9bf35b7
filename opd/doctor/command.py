"""`opd doctor`: every check of a recipe, the cheap ones of `opd launch` first, then those that need a live server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from opd.config.load import load_config
from opd.doctor import preflight
from opd.doctor.checks import Check, Facts, Skip, Warned, first_line
from opd.settings import UserError

WIDTH = 16  # of the names' column
Outcome = Literal["pass", "warn", "FAIL", "not run"]


@dataclass(frozen=True)
class Line:
    """What came of one check."""

    name: str
    outcome: Outcome
    found: str
    remedy: str
    seconds: float

    def __str__(self) -> str:
        remedy = f"; remedy: {self.remedy}" if self.remedy else ""
        return f"{self.name:{WIDTH}}{self.outcome:9}{self.found}{remedy}"


def main(recipe: str, overrides: list[str], server: bool = True, json_file: Path | None = None) -> int:
    """`opd doctor`: print a line per check as it finishes; 0 when none fails, else 1.

    json_file: takes the same lines. Raises UserError when the recipe itself cannot be read, or that file not written.
    """
    config = load_config(recipe, overrides)
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise UserError(f"--json {json_file}: expected a file in a folder that exists")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the table
    lines = []
    with ExitStack() as stack:
        for line in examine(checks(), Facts(config, stack=stack), server):
            print(line, flush=True)
            lines.append(line)
    failed = [line.name for line in lines if line.outcome == "FAIL"]
    seconds = sum(line.seconds for line in lines)
    print(f"{'fails: ' + ', '.join(failed) if failed else 'nothing fails'} ({seconds:.0f} s)")
    if json_file is not None:
        about = {"recipe": recipe, "overrides": overrides, "passed": not failed, "seconds": seconds}
        json_file.write_text(json.dumps(about | {"checks": [asdict(line) for line in lines]}, indent=1) + "\n")
    return int(bool(failed))


def checks() -> tuple[Check, ...]:
    """All checks in their order: what takes no server first."""
    from opd.doctor import live

    return (*preflight.checks(), *live.CHECKS)


def examine(every: Iterable[Check], facts: Facts, server: bool = True) -> Iterable[Line]:
    """Run the checks that can be run. One that needs what failed, or was not run, is not run either."""
    done: set[str] = set()
    for check in every:
        began = time.perf_counter()
        outcome: Outcome
        try:
            if check.live and not server:
                raise Skip("--no-server")
            if missing := [n for n in check.needs if n not in done]:
                raise Skip(f"needs {', '.join(missing)}")
            found = check.run(facts)
            outcome = "warn" if isinstance(found, Warned) else "pass"
            done.add(check.name)
        except Skip as e:
            outcome, found = "not run", str(e)
        except Exception as e:  # whatever it is, the other checks go on
            outcome, found = "FAIL", first_line(e)
        remedy = check.remedy if outcome == "FAIL" else ""
        yield Line(check.name, outcome, str(found), remedy, time.perf_counter() - began)
