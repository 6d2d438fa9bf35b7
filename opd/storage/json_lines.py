"""JSON lines that are read strictly, and files that are written whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from opd.settings import UserError


class Line(BaseModel):
    """What every line of a run's JSON lines carries; a reader that needs more of a file says so in a subclass."""

    model_config = ConfigDict(strict=True, extra="allow")
    step: NonNegativeInt


def read_lines(path: Path, shape: type[BaseModel] = Line) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; none when there is no such file.

    A last line without its line end that does not parse was cut off while it was written, and is left out. Raises
    UserError naming file and line for any other line that is not an object of this shape.
    """
    if not path.exists():
        return
    try:
        with open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                if not raw.strip():
                    continue
                try:
                    found = finite(json.loads(raw.decode("utf-8")))
                except (ValueError, RecursionError) as e:
                    if not raw.endswith(b"\n"):
                        return
                    start = raw[:60].decode("utf-8", "backslashreplace").strip()
                    raise UserError(f"{path}:{number}: expected a JSON object, found {start!r} ({e})") from e
                yield conform(found, shape, f"{path}:{number}")
    except OSError as e:
        raise UserError(f"{path}: expected a readable file ({e.strerror})") from e


def conform(value: Any, shape: type[BaseModel], where: str) -> dict[str, Any]:
    """The value itself, when it is an object of this shape. Raises UserError, with the place in front, when not."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {type(value).__name__}")
    try:
        shape.model_validate(value)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UserError(f"{where}: expected a key {key}, found none") from e
        message = first["msg"].removeprefix("Value error, ")
        found = json.dumps(first["input"], default=str)[:60]
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}, found {found}") from e
    return value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write aside, then rename: a reader sees the old content or the new, never a half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def finite(node: Any) -> Any:
    """JSON has no NaN and no infinity: null. Scalars and arrays of numpy and torch become plain numbers and lists."""
    if isinstance(node, dict):
        return {k: finite(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [finite(v) for v in node]
    if hasattr(node, "tolist"):
        return finite(node.tolist())
    return None if isinstance(node, float) and not math.isfinite(node) else node
