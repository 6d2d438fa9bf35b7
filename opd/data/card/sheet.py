"""What a manifest holds, counted: the numbers of its card, leaks between splits, shared speakers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd.data.stages.prompts import NearTexts
from opd.prompts import audio
from opd.prompts.manifest import folder_of, parse_record
from opd.prompts.tables import records
from opd.scoring.words import CONTROL, normal, word_count
from opd.settings import UserError, attempt
from opd.storage.journal import canonical, digest
from opd.types import Prompt, audio_paths, render, transcript

SHOWN = 20  # of what is listed by frequency
NEAR = 0.8  # Jaccard similarity of 3-word shingles


@dataclass
class Sheet:
    """What is in one manifest."""

    path: Path
    name: str  # of the split
    records: int = 0
    bad: list[str] = field(default_factory=list)  # place and reason
    seconds: list[float] = field(default_factory=list)  # of each clip
    unreadable: list[str] = field(default_factory=list)  # record and clip
    words: list[int] = field(default_factory=list)  # of each question
    vocabulary: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)  # records of each
    spoken: dict[str, float] = field(default_factory=dict)  # seconds of each
    groups: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    wer: list[float] = field(default_factory=list)
    texts: dict[bytes, list[str]] = field(default_factory=dict)  # digest of a question: the records that ask it
    clips: dict[str, list[str]] = field(default_factory=dict)  # digest of a clip: the records that have it
    control: list[str] = field(default_factory=list)  # record and control token in its texts
    near: list[str] = field(default_factory=list)  # records close to an earlier one
    leaks: list[list[str]] = field(default_factory=list)  # those of earlier sheets, and the record close to them

    def add(self, prompt: Prompt, row: dict[str, Any], name: str) -> list[str]:
        """Count a record, called `name` in lists; the words of its question."""
        question = normal(_question(prompt)).split()
        self.records += 1
        self.words.append(word_count(_question(prompt)))
        if found := CONTROL.search(f"{transcript(prompt)}\n{prompt.response or ''}"):
            self.control.append(f"{name}: {found[0]}")
        self.vocabulary.update(question)
        self.fields.update(row.keys())
        self.groups.update([prompt.group] if prompt.group else [])
        if question:
            self.texts.setdefault(hashlib.sha256(" ".join(question).encode()).digest(), []).append(name)
        wer = row.get("wer")
        if isinstance(wer, int | float) and not isinstance(wer, bool):
            self.wer.append(float(wer))
        seconds = sum(self._hear(path, name) for path in audio_paths(prompt))
        if speaker := next((row[k] for k in ("speaker", "voice") if row.get(k) is not None), None):
            speaker = speaker if isinstance(speaker, str) else canonical(speaker).decode()
            self.speakers[speaker] += 1
            self.spoken[speaker] = self.spoken.get(speaker, 0.0) + seconds
        return question

    def _hear(self, path: str, name: str) -> float:
        """Seconds of a clip."""
        found = attempt(audio.seconds, path)
        if isinstance(found, ValueError):
            self.unreadable.append(f"{name}: {path}")
            return 0.0
        self.seconds.append(found)
        self.clips.setdefault(digest(path), []).append(name)
        return found

    def summary(self) -> dict[str, Any]:
        """The numbers, as card.json has them."""
        return {
            "manifest": str(self.path),
            "records": self.records,
            "bad": self.bad,
            "control_tokens": self.control,
            "clips": {
                "count": len(self.seconds),
                "hours": sum(self.seconds) / 3600,
                "unreadable": self.unreadable,
                "seconds": spread(self.seconds),
            },
            "words": spread(self.words),
            "vocabulary": {
                "types": len(self.vocabulary),
                "tokens": self.vocabulary.total(),
                "most_frequent": dict(self.vocabulary.most_common(SHOWN)),
            },
            "speakers": {n: {"records": k, "hours": self.spoken[n] / 3600} for n, k in self.speakers.most_common()},
            "groups": dict(self.groups.most_common()),
            "fields": dict(self.fields.most_common()),
            "wer": spread(self.wer),
            "duplicates": {
                "same_question": [names for names in self.texts.values() if len(names) > 1],
                "same_clip": [names for names in self.clips.values() if len(names) > 1],
                "near": self.near,
            },
            "made": made(self.path),
        }


def leaks(sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """What more than one manifest has: {"what": question, near-identical question or clip, "records": [name, …]}."""
    questions = in_several([sheet.texts for sheet in sheets]).values()
    clips = in_several([sheet.clips for sheet in sheets]).values()
    return [
        *({"what": "question", "records": sum(names, [])} for names in questions),
        *({"what": "near-identical question", "records": near} for sheet in sheets for near in sheet.leaks),
        *({"what": "clip", "records": sum(names, [])} for names in clips),
    ]


def in_several(tables: Sequence[Mapping[Any, Any]]) -> dict[Any, list[Any]]:
    """Keys that more than one of the tables has, with their values."""
    where: dict[Any, list[Any]] = {}
    for table in tables:
        for key, value in table.items():
            where.setdefault(key, []).append(value)
    return {key: values for key, values in where.items() if len(values) > 1}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Count, mean and quantiles; none of nothing."""
    if not values:
        return None
    low, few, half, most, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist()
    mean = float(np.mean(values))
    return {"count": len(values), "mean": mean, "min": low, "p5": few, "median": half, "p95": most, "max": high}


def made(manifest: Path) -> list[dict[str, Any]]:
    """What the stages that made a manifest told of themselves, the last one first, as far back as they are here."""
    found: list[dict[str, Any]] = []
    while True:
        try:
            about = json.loads((manifest.with_suffix(".stage") / "stage.json").read_text())
            source = Path(about["source"])
            whole = about.keys() >= {"stage", "read", "written", "settings"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return found
        if not whole or about in found:
            return found
        found.append(about)
        manifest = source


class Asked:
    """What the splits ask: finds questions that are nearly the same, within a split and across."""

    def __init__(self) -> None:
        self._texts = NearTexts(NEAR)
        self._who: dict[str, dict[str, str]] = {}  # question -> split: the first record that asks it

    def ask(self, split: str, record: str, question: str) -> list[tuple[str, str]]:
        """(split, record) of what is near a question that the split has not asked before."""
        who = self._who.setdefault(question, {})
        if split in who:
            return []
        who[split] = record
        near = [text for text in self._texts.take(question, always=True) if text != question]
        return [found for text in near for found in self._who[text].items()]


def sheet_of(path: Path, name: str, asked: Asked) -> Sheet:
    """The sheet of a manifest, as the split `name`. Raises UserError for one without a usable record."""
    sheet, root = Sheet(path, name), folder_of(str(path))
    for place, row in records(str(path), streaming=True):
        prompt = attempt(parse_record, row, root, place)
        if isinstance(prompt, ValueError):
            sheet.bad.append(f"{place}: {prompt}")
            continue
        record = f"{place} ({prompt.id})" if "id" in row else place
        question = " ".join(sheet.add(prompt, row, record))
        near = asked.ask(name, record, question)
        if any(split == name for split, _ in near):
            sheet.near.append(record)
        if others := [other for split, other in near if split != name]:
            sheet.leaks.append([*others, record])
    if not sheet.records:
        why = f", such as {sheet.bad[0]}" if sheet.bad else ""
        raise UserError(f"{path}: holds no usable record{why}")
    return sheet


def _question(prompt: Prompt) -> str:
    """What is said and typed in a prompt but by its system message."""
    said = [m["content"] for m in render(prompt, "text") if m["role"] != "system"]
    return "\n".join(c if isinstance(c, str) else " ".join(p["text"] for p in c) for c in said)
