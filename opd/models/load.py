"""From a checkpoint to its speech model family."""

from __future__ import annotations

from importlib import import_module

from opd.models.base import Family
from opd.models.registry import family_entry


def family_of(path: str, name: str | None = None) -> Family:
    """The family of a checkpoint, by its name, else by the `model_type` of its config.

    Raises UserError when it is not one of ours.
    """
    from opd.settings import UserError

    entry = family_entry(path, name)
    module, _, klass = entry.family.partition(":")
    try:
        family: Family = getattr(import_module(module), klass)(path)
    except (OSError, ValueError) as e:
        raise UserError(f"student.path {path}: not a loadable {entry.name} checkpoint: {str(e).splitlines()[0]}") from e
    family.entry = entry
    return family
