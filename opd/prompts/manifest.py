"""Manifest -> prompts -> a resumable, sharded stream of batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from opd.scoring.answers import MATCHES, check_answer
from opd.settings import UserError, regular_file, text_lines
from opd.types import Prompt

# of a record
KNOWN = ("messages", "audio", "transcript", "id", "response", "answer", "match", "choices", "tolerance", "group")


def read_manifest(path: str, limit: int | None = None) -> tuple[list[Prompt], list[dict[str, str]]]:
    """Read a manifest: JSONL here; Parquet, JSON, CSV or `hub:owner/name[/config][:split]` through `datasets`.

    A record is `{"messages": [...]}` whose audio parts carry `path` and `transcript`, or the short form
    `{"audio": path, "transcript": str}`; optional: id (a number is taken as text), response, answer, match, choices,
    tolerance, group, and strings and numbers by other names, for teacher.field and the groups of an evaluation. Paths
    are relative to the manifest and must stay inside its folder.

    Returns prompts and the bad records, each {"place", "id", "reason"}. Raises UserError for an unreadable manifest.
    """
    prompts: list[Prompt] = []
    bad: list[dict[str, str]] = []
    seen: dict[str, str] = {}
    root = Path(path).resolve().parent
    for place, record in records(path):
        try:
            prompt = parse_record(record, root, place)
            if prompt.id in seen:
                raise ValueError(f"id {prompt.id!r} was used before, at {seen[prompt.id]}")
            seen[prompt.id] = place
            prompts.append(prompt)
        except ValueError as e:
            name = str(record.get("id", ""))[:60] if isinstance(record, dict) else ""
            bad.append({"place": place, "id": name, "reason": str(e)})
        if limit is not None and len(prompts) >= limit:
            break
    if not prompts and not bad:
        raise UserError(f"{path}: the manifest holds no record")
    return prompts, bad


def parse_record(record: Any, root: Path, place: str) -> Prompt:
    """Make a Prompt of a manifest record; ValueError says which field is wrong, what was expected and found."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    messages = record.get("messages")
    if messages is None:
        if "audio" not in record:
            raise ValueError("expected `messages`, or `audio` with `transcript`; found neither")
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
    if not isinstance(part.get("path"), str) or not part["path"]:
        raise ValueError(f"{where}: the audio part has no path")
    text = part.get("transcript")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: transcript: expected a string, found {type(text).__name__}")
    if not text or not text.strip():
        raise ValueError(f"{where}: the audio part has no transcript; the teacher needs one to read")
    path = (root / part["path"]).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: {part['path']} lies outside the manifest's folder {root}")
    return {"type": "audio", "path": str(path), "transcript": text}


def records(path: str, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a manifest; a ValueError in the place of a row that cannot be read.

    `streaming`: do not load a hub's data set or a Parquet file whole. Raises UserError for an unreadable manifest.
    """
    if path.startswith("hub:") or Path(path).suffix in (".parquet", ".json", ".csv"):
        yield from datasets_records(path, streaming)
        return
    for place, line in text_lines(path, "manifest"):
        try:
            yield place, line if isinstance(line, ValueError) else json.loads(line)
        except json.JSONDecodeError as e:
            yield place, ValueError(f"not valid JSON: {e.msg} at column {e.colno}")
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
            yield place, ValueError(f"not readable as JSON: {e}")


def datasets_records(
    path: str, streaming: bool, prepare: Callable[[Any], Any] = lambda data: data
) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a hub's data set or a file that `datasets` reads, after `prepare` of the data set.

    Raises UserError for what cannot be read.
    """
    import datasets

    name, _, split = path.removeprefix("hub:").partition(":")
    owner, _, rest = name.partition("/")
    title, _, part = rest.partition("/")
    hub = path.startswith("hub:")
    if not hub:
        regular_file(path, "manifest")
    try:
        if hub:
            of = f"{owner}/{title}" if title else owner
            data = datasets.load_dataset(of, part or None, split=split or "train", streaming=streaming)
        else:
            data = datasets.load_dataset(Path(path).suffix[1:], data_files=path, split="train", streaming=streaming)
        for i, row in enumerate(prepare(data)):
            yield f"{path}:{i + 1}", _as_written(row)
    except Exception as e:  # pyarrow, pandas, the hub's client: each with errors of its own
        reason = str(e.__cause__ or e).strip().splitlines() or [type(e).__name__]
        raise UserError(f"{path}: `datasets` cannot read it: {reason[0][:300]}") from e


def _as_written(node: Any) -> Any:
    """Undo what columns of one type make of records: absent keys are None, a text content is a list of one part."""
    if isinstance(node, dict):
        kept = {k: _as_written(v) for k, v in node.items() if v is not None}
        match kept.get("content"):
            case [{"type": "text", "text": str(text), **rest}] if not rest:
                kept["content"] = text
        return kept
    if isinstance(node, list):
        return [_as_written(v) for v in node]
    return node


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
