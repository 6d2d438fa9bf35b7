"""Manifest -> prompts -> a resumable, sharded stream of batches."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from opd.prompts.tables import hub_bytes, records
from opd.scoring.answers import MATCHES, check_answer
from opd.settings import Fatal, UserError, attempt, plain_text, shown
from opd.storage.json_lines import write_atomic
from opd.types import Prompt

NAME_BYTES = 255  # of a file's name, at most

# of a record
KNOWN = ("messages", "audio", "transcript", "id", "response", "answer", "match", "choices", "tolerance", "group")


def read_manifest(path: str, limit: int | None = None) -> tuple[list[Prompt], list[dict[str, str]]]:
    """Read a manifest: JSONL, JSON, CSV and TSV here; Parquet and `hub:owner/name[/config][:split]` through `datasets`.

    A record is `{"messages": [...]}` whose audio parts carry `path` and `transcript`, or the short form
    `{"audio": path, "transcript": str}`; optional: id (a number is taken as text), response, answer, match, choices,
    tolerance, group, and strings and numbers by other names, for teacher.field and the groups of an evaluation. Paths
    are relative to the manifest and must stay inside its folder; an Audio column's bytes are put into the cache of
    `datasets`, where a path leads to them.

    Returns prompts and the bad records, each {"place", "id", "reason"}. Raises UserError for an unreadable manifest.
    """
    prompts: list[Prompt] = []
    bad: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    root = folder_of(path)
    for place, record in records(path):
        prompt = attempt(parse_record, record, root, place)
        if not isinstance(prompt, ValueError) and prompt.id in seen:
            prompt = ValueError(f"id {prompt.id!r} was used before, at {seen[prompt.id]}")
        if isinstance(prompt, ValueError):
            name = str(record.get("id", ""))[:60] if isinstance(record, dict) else ""
            bad.append({"place": place, "id": name, "reason": str(prompt)})
            continue
        seen[prompt.id] = place
        prompts.append(prompt)
        if limit is not None and len(prompts) >= limit:
            break
    if not prompts and not bad:
        raise UserError(f"{path}: the manifest holds no record")
    return prompts, bad


def parse_record(record: Any, root: Path, place: str) -> Prompt:
    """Make a Prompt of a manifest record; ValueError says which field is wrong, what was expected and found.

    Call it through `attempt`, which has a word for all else that can be wrong.
    """
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    record = unmarked(record)
    messages = record.get("messages")
    if messages is None:
        if missing := [key for key in ("audio", "transcript") if key not in record]:
            names = ", ".join(map(str, record))[:200] or "nothing"
            expected = f"no {missing[0]}: expected `messages`, or `audio` with `transcript`, found {names}"
            raise ValueError(f"{expected}; `opd data natural` reads tables by columns.{missing[0]}=NAME")
        part = {"type": "audio", "path": record["audio"], "transcript": record.get("transcript")}
        messages = [{"role": "user", "content": [part]}]
    elif both := [key for key in ("audio", "transcript") if key in record]:
        raise ValueError(f"expected `messages`, or `audio` with `transcript`; found `messages` and `{both[0]}`")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list of chat messages, found {type(messages).__name__}")
    match = record.get("match", "exact")
    if match not in MATCHES:
        raise ValueError(f"match: expected {', '.join(MATCHES[:-1])} or {MATCHES[-1]}, found {match!r}")
    for key in ("response", "answer"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise ValueError(f"{key}: expected a string, found {type(record[key]).__name__}")
    choices, tolerance = record.get("choices") or [], record.get("tolerance")
    if isinstance(tolerance, str):  # of a table without types
        with suppress(ValueError):
            tolerance = float(tolerance)
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"choices: expected a list of strings, found {str(choices)[:60]!r}")
    if tolerance is not None and (not _number(tolerance) or tolerance < 0):
        raise ValueError(f"tolerance: expected a number of 0 or more, found {tolerance!r}")
    check_answer(record.get("answer"), match, choices, str(record.get("group") or ""))
    name = place if record.get("id") is None else record["id"]
    if not isinstance(name, str) and not _number(name):
        raise ValueError(f"id: expected a string or a number, found {type(name).__name__}")
    return Prompt(
        id=str(name),
        messages=tuple(_message(m, i, root) for i, m in enumerate(messages)),
        response=record.get("response"),
        answer=record.get("answer"),
        match=match,
        group=str(record.get("group") or ""),
        place=place,
        other={k: v for k, v in record.items() if k not in KNOWN and isinstance(v, str)},
        numbers={k: float(v) for k, v in record.items() if k not in KNOWN and _number(v)},
        choices=tuple(choices),
        tolerance=tolerance,
        numbered=not isinstance(name, str),
    )


def unmarked(node: Any) -> Any:
    """Texts without a byte-order mark, which belongs to none. Raises UnicodeEncodeError for half a surrogate pair."""
    if isinstance(node, str):
        node.encode()
        return node.lstrip("\ufeff")
    if isinstance(node, dict):
        return {key: unmarked(value) for key, value in node.items()}
    return [unmarked(value) for value in node] if isinstance(node, list) else node


def _number(value: Any) -> bool:
    """Whether it is a number that a float can hold: JSON has longer ones."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _message(m: Any, i: int, root: Path) -> dict[str, Any]:
    where = f"messages[{i}]"
    if not isinstance(m, dict) or m.get("role") not in ("system", "user", "assistant") or "content" not in m:
        raise ValueError(f"{where}: expected role (system, user or assistant) and content, found {str(m)[:60]!r}")
    if isinstance(m["content"], str):
        return {"role": m["role"], "content": m["content"]}
    if not isinstance(m["content"], list):
        raise ValueError(f"{where}.content: expected text or a list of parts, found {type(m['content']).__name__}")
    parts = [_part(p, f"{where}.content[{j}]", root) for j, p in enumerate(m["content"])]
    return {"role": m["role"], "content": parts}


def _part(part: Any, where: str, root: Path) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "audio":
        raise ValueError(f"{where}: expected a text part or an audio part, found {str(part)[:60]!r}")
    text = part.get("transcript")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: transcript: expected a string, found {type(text).__name__}")
    if not text or not plain_text(text):
        raise ValueError(f"{where}: the audio part has no transcript; the teacher needs one to read")
    clip = attempt(clip_of, part.get("path"), root)
    if isinstance(clip, ValueError):
        raise ValueError(f"{where}: {clip}")
    path = _cached(clip["bytes"], clip["path"]) if "bytes" in clip else clip["path"]
    return {"type": "audio", "path": path, "transcript": text}


def clip_of(clip: Any, root: Path) -> dict[str, Any]:
    """`bytes`, else `path`, of a recording as a row has it: bytes, a path, or both in an Audio column.

    `root`: the folder of the data set, or its `hub:` name. Raises ValueError where there is none, or one elsewhere.
    """
    clip = clip if isinstance(clip, dict) else {"bytes" if isinstance(clip, bytes) else "path": clip}
    content, path = clip.get("bytes"), clip.get("path")
    if content is not None:
        return {"bytes": content, "path": str(path or "")}
    if not isinstance(path, str) or not path:
        raise ValueError(f"expected a recording's path or bytes, found {str(path)[:60]!r}")
    if str(root).startswith("hub:"):
        return {"bytes": hub_bytes(path), "path": path}
    return {"path": str(within(root, path))}


def _cached(content: bytes, name: str) -> str:
    """A file of these bytes in the cache of `datasets`, named by them."""
    import datasets

    key = hashlib.sha256(content).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE, "opd_clips", key[:2], key + Path(name).suffix[:8])
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
    except OSError as e:
        raise Fatal(f"{path}: {e.strerror or e}; HF_DATASETS_CACHE names another folder for clips in tables") from e
    return str(path)


def folder_of(path: str) -> Path:
    """The folder that paths in a manifest are relative to: where its name is, even a link; of the Hub its name."""
    return Path(path if path.startswith("hub:") else os.path.dirname(os.path.abspath(path)))


def within(root: Path, name: str) -> Path:
    """The file `name` of a data set in `root`. Raises ValueError for one elsewhere: a data set names only its own.

    Links in it are followed when it is read, not here: the Hub's cache consists of them, and who owns the folder put
    them there.
    """
    if "\0" in name or max(len(part.encode()) for part in name.split("/")) > NAME_BYTES:
        raise ValueError(f"{shown(name)}: no such audio file")
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)):
        raise ValueError(f"{name} lies outside of {root}")
    return path


class PromptStream:
    """Shuffled batches of prompts, a function of (seed, step) alone: resuming needs no more than the step.

    Every epoch is a fresh permutation; a batch may span two epochs.
    """

    def __init__(self, prompts: list[Prompt], batch_size: int, seed: int) -> None:
        if not prompts:
            raise UserError("data.train: no usable record")
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        self._order: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[Prompt]:
        """The global batch of a step (0-based)."""
        return [self.prompts[self._index(step * self.batch_size + i)] for i in range(self.batch_size)]

    def epoch(self, step: int) -> int:
        """The epoch that a step's batch begins in, which is that of all its clips."""
        return step * self.batch_size // len(self.prompts)

    def shard(self, step: int, rank: int, world: int) -> list[tuple[int, Prompt]]:
        """This rank's (position in the global batch, prompt) pairs: positions rank, rank + world, ..."""
        return list(enumerate(self.batch(step)))[rank::world]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch not in self._order:
            order = list(range(len(self.prompts)))
            Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = {e: o for e, o in self._order.items() if e >= epoch - 1} | {epoch: order}
        return self._order[epoch][offset]
