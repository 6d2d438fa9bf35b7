"""`opd data card`: what is in manifests, in numbers: card.json, card.html and README.md, a dataset card of the Hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from opd.data.card.sheet import Asked, leaks, shared_speakers, sheet_of
from opd.settings import UserError
from opd.storage.json_lines import write_atomic

NAMED = 5  # records in a message


def write_card(
    manifests: Sequence[Path], out: Path, allow_leaks: bool = False, about: dict[str, str] | None = None
) -> list[Path]:
    """Write card.json, card.html and README.md of manifests to the folder `out`; returns their paths.

    `about`: title, license, language, where known. Raises UserError for a manifest without a usable record, and, unless
    allow_leaks, for two manifests that share a question, nearly the same one, or a clip.
    """
    from opd.data.card.page import page, readme

    names = split_names(manifests)
    asked = Asked()
    sheets = [sheet_of(path, name, asked) for path, name in zip(manifests, names, strict=True)]
    shared = leaks(sheets)
    if shared and not allow_leaks:
        examples = "; ".join(f"the {s['what']} of {' = '.join(s['records'])}" for s in shared[:NAMED])
        kinds = Counter(s["what"] for s in shared)
        counts = " and ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in kinds.items())
        raise UserError(
            f"splits leak into one another: they share {counts}: {examples}{'; …' if len(shared) > NAMED else ''}; "
            "take them out of one manifest, or pass --allow-leaks"
        )
    content = {
        "title": (about or {}).get("title") or out.resolve().name,
        **{k: v for k, v in (about or {}).items() if k != "title"},
        "splits": {s.name: s.summary() for s in sheets},
        "leaks": shared,
        "shared_speakers": shared_speakers(sheets),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = {
            "card.json": json.dumps(content, indent=1, ensure_ascii=False),
            "card.html": page(content, sheets),
            "README.md": readme(content, out),
        }
        for name, text in files.items():
            write_atomic(out / name, text)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror or e}") from e
    return [out / name for name in files]


def split_names(manifests: Sequence[Path]) -> list[str]:
    """A name for each manifest that the Hub takes for a split. Raises UserError for a manifest that is there twice."""
    seen: dict[Path, Path] = {}
    names: list[str] = []
    for path in manifests:
        if path.resolve() in seen:
            raise UserError(f"{path}: is there twice")
        seen[path.resolve()] = path
        name = re.sub(r"\W+", "_", path.stem).strip("_") or "data"
        while name in names:
            name += "_"
        names.append(name)
    return names
