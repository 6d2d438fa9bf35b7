"""The files that a study's runs will read: there before the first of them starts, and split as they should be."""

from __future__ import annotations

from pathlib import Path

from opd.config.load import resolve_model
from opd.config.schema import Config
from opd.settings import UserError

HUB = "hub:"


def same(one: str | None, other: str | None) -> bool:
    """Whether two manifests are one, however their paths are spelt; names on a hub are compared as they are."""
    if one is None or other is None or one.startswith(HUB) or other.startswith(HUB):
        return one == other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def check(row: str, config: Config, starts: bool) -> None:
    """Raises UserError that names row and key when a manifest, or a local model's folder, of a run is not there.

    `starts`: its student is that of another row's run, which may be still to come. Reads no file, loads no model.
    """
    e = config.eval
    for key, path in (("data.train", config.data.train), ("eval.test", e.test), ("eval.retention", e.retention)):
        if path and not path.startswith(HUB) and not Path(path).is_file():
            raise UserError(f"row {row}: {key} {path}: no such manifest")
    models = [] if starts else [("student.path", config.student.path)]
    for route, teacher in config.teacher.each.items():
        if teacher.path:
            models.append((f"teacher.routes.{route}.path" if route else "teacher.path", teacher.path))
    for key, path in models:
        try:
            resolve_model(path, key)
        except UserError as error:
            raise UserError(f"row {row}: {error}") from error
