"""The checkpoints of a run folder, and which of them a name means. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.settings import UserError

LAST, BEST = "last", "best"


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = [p for p in Path(run_dir, "checkpoints").glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def best_of(run_dir: str | Path) -> dict[str, Any] | None:
    """What `checkpoints/best.json` says: step, metric, value, stderr; None without one. Raises UserError if broken."""
    path = Path(run_dir, "checkpoints", "best.json")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        int(found["step"]), str(found["metric"]), float(found["value"])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path}: expected an object with step, metric and value; delete it to go without") from e
    return found


def split(path: str) -> tuple[Path, str]:
    """RUN, RUN:best or RUN:40 -> the run folder, and which of its checkpoints: the newest where none is named."""
    head, colon, which = path.rpartition(":")
    return (Path(head), which) if colon and (which in (LAST, BEST) or which.isdecimal()) else (Path(path), LAST)


def find(run: Path, which: str, where: str) -> Path:
    """The checkpoint of a run that `last`, `best` or a step names. Raises UserError, `where` in front, without it."""
    found = {p.name: p for p in checkpoints(run)}
    if not found:
        raise UserError(f"{where}: a run folder without a finished checkpoint; run its recipe first")
    if which == LAST:
        return list(found.values())[-1]
    if which == BEST:
        best = best_of(run)
        if best is None:
            raise UserError(f"{where}: expected checkpoints/best.json, found none; a run with eval.best writes it")
        which = str(best["step"])
    if not which.isdecimal() or (name := f"step_{int(which)}") not in found:
        kept = ", ".join(n.removeprefix("step_") for n in found)
        raise UserError(f"{where}: expected last, best or a step whose checkpoint is kept ({kept}), found {which!r}")
    return found[name]
