"""Audio columns of data sets as they are stored: the bytes of a file, or where the data set keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HUB = "hf://datasets/"


def stored(data: Any, column: str, others: list[str]) -> Any:
    """A streamed data set of that column, as {"path", "bytes"}, and the others; nothing is decoded."""
    import datasets

    class Stored(datasets.Audio):  # theirs asks for torchcodec even to pass a path on
        def encode_example(self, value: Any) -> dict[str, Any]:
            if isinstance(value, str | Path):
                return {"bytes": None, "path": str(value)}
            if isinstance(value, bytes):
                return {"bytes": value, "path": None}
            if not isinstance(value, dict):
                raise ValueError(f"column {column}: expected a recording's path or bytes, found {str(value)[:60]!r}")
            return {"bytes": value.get("bytes"), "path": value.get("path")}

    names = list(dict.fromkeys([column, *others]))
    return data.cast_column(column, Stored(decode=False)).select_columns(names)


def read(path: str | None) -> bytes:
    """A file that a data set of the Hub names: on the Hub, or in this machine's cache of it.

    Raises ValueError for any other place, and for a file that cannot be read.
    """
    import datasets
    from datasets.utils.file_utils import xopen

    where = path or "none"
    file, cache = where.split("::")[-1], Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()
    if not file.startswith(HUB) and not ("://" not in where and Path(where).resolve().is_relative_to(cache)):
        raise ValueError(f"audio: expected the bytes of a recording or its place on the Hub, found {where[:200]!r}")
    try:
        with xopen(where, "rb") as f:
            return f.read()
    except (OSError, ValueError) as e:
        raise ValueError(f"audio: {where}: cannot be read: {str(e)[:200] or type(e).__name__}") from e
