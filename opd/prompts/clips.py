"""Waveforms of a step's prompts; bad records are skipped, counted, listed, and too many end the run."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from opd import types
from opd.config.schema import Config
from opd.prompts import audio
from opd.prompts.augment import Augmenter
from opd.settings import UserError, attempt
from opd.storage.json_lines import read_lines
from opd.types import VIEWS, Prompt, audio_paths, render

if TYPE_CHECKING:
    from opd.models.base import Family


@dataclass(frozen=True)
class ContextLimit:
    """What a server takes: a prompt and its response together have at most `max_model_len` ids, None: no server."""

    family: Family
    max_tokens: int
    max_model_len: int | None

    def filled(self, clip: np.ndarray) -> np.ndarray:
        """A clip [samples] with the silence behind it that its family's tower needs to encode it alike in any batch."""
        entry, rate = self.family.entry, self.family.sampling_rate
        tail = int(entry.tail_s * rate)
        return np.pad(clip, (0, max(tail, int(entry.shortest_s * rate) - len(clip))))

    def check(self, prompt: Prompt, clips: dict[str, np.ndarray]) -> int:
        """Ids of the prompt's longer view.

        Raises BadAudio when a text of the prompt, or its response, spells a control token, TooLong when it leaves no
        room for max_tokens more.
        """
        lengths, entry = [len(clips[p]) for p in audio_paths(prompt)], self.family.entry
        if len(lengths) > entry.clips:
            raise types.BadAudio(f"it has {len(lengths)} clips; {entry.name} takes {entry.clips}")
        self.family.refuse_control(prompt.response or "")
        ids = max(len(self.family.prompt_ids(render(prompt, v), lengths if v == "speech" else [])) for v in VIEWS)
        if self.max_model_len is not None and ids + self.max_tokens > self.max_model_len:
            raise types.TooLong(
                f"its {ids} prompt ids and rollout.max_tokens={self.max_tokens} do not fit into the server's "
                f"{self.max_model_len} ids; raise rollout.server.max_model_len, or shorten the clip or the response"
            )
        return ids


class ClipLoader:
    """Decodes the clips of prompts and keeps the account of bad records."""

    def __init__(
        self, config: Config, rate: int, records: int, bad_before: int = 0, limit: ContextLimit | None = None
    ) -> None:
        """records: in the training manifest, bad ones included; bad_before: found bad when it was read."""
        self.config, self.rate, self.records, self.limit = config, rate, records, limit
        self.bad: dict[str, str] = {}  # place -> reason
        self.bad_before = bad_before
        self._listed = listed(config)
        augment = config.data.augment
        self._augmenter = Augmenter(augment, config.run.seed, rate) if augment.active else None

    def load(self, prompt: Prompt, epoch: int | None = None) -> dict[str, np.ndarray] | None:
        """Waveforms by path; None, and an entry in bad_records.jsonl, when the record cannot be used.

        With an epoch, as data.augment would have them heard in it, by the paths of `apart(prompt)`; when one gets too
        long by that, the record's clips stay as they are.

        Raises UserError when more than data.max_bad_share of the manifest's records are bad.
        """
        if prompt.place in self.bad:
            return None
        found = attempt(self._load, prompt, epoch)
        if isinstance(found, ValueError):
            self._count(prompt, str(found))
            return None
        return found

    def _load(self, prompt: Prompt, epoch: int | None) -> dict[str, np.ndarray]:
        limit, paths = self.config.data.max_audio_seconds, audio_paths(prompt)
        clean = {p: audio.load(p, self.rate, limit) for p in paths}
        own = prompt if epoch is None else self.apart(prompt)
        clips = {key: clean[p] for key, p in zip(audio_paths(own), paths, strict=True)}
        if epoch is not None and self._augmenter is not None:
            with suppress(types.TooLong):
                changed = enumerate(clips.items())
                return self._fitting(own, {k: self._heard(c, self.name(prompt, i), epoch) for i, (k, c) in changed})
        return self._fitting(own, clips)

    def apart(self, prompt: Prompt) -> Prompt:
        """The prompt with paths of its own where data.augment changes clips: records that share a clip hear it apart.

        Such a path is a key of what `load` gives, and no file.
        """
        if self._augmenter is None:
            return prompt
        places = itertools.count()

        def own(part: dict[str, Any]) -> dict[str, Any]:
            of = part["type"] == "audio"
            return part | {"path": f"{part['path']}#{self.name(prompt, next(places))}"} if of else part

        return replace(prompt, messages=tuple(types.with_parts(prompt.messages, own)))

    def _heard(self, clip: np.ndarray, name: str, epoch: int) -> np.ndarray:
        assert self._augmenter is not None
        wave = audio.whole_frames(self._augmenter(clip, name, epoch)[0], self.rate)
        if len(wave) > self.config.data.max_audio_seconds * self.rate:
            raise types.TooLong(f"{name}: too long with data.augment.speed")
        return wave

    def name(self, prompt: Prompt, place: int) -> str:
        """What the clip at a place (0-based) of a record is called wherever the manifest lies."""
        record = prompt.id if prompt.id != prompt.place else prompt.place.removeprefix(self.config.data.train)
        return f"{record}/{place}"

    def _fitting(self, prompt: Prompt, clips: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.limit is not None:
            clips = {p: self.limit.filled(c) for p, c in clips.items()}
            self.limit.check(prompt, clips)
        return clips

    def load_batch(
        self, batch: list[tuple[int, Prompt]], spare: list[Prompt], epoch: int | None = None
    ) -> tuple[list[tuple[int, Prompt]], dict[str, np.ndarray]]:
        """A batch and its clips, as heard in an epoch; for a bad record the next usable one of `spare` is taken."""
        kept, clips = [], {}
        for position, prompt in batch:
            start = next((i for i, p in enumerate(spare) if p.place == prompt.place), 0)
            for taken in [prompt, *spare[start + 1 :], *spare[:start]]:
                if (found := self.load(taken, epoch)) is not None:
                    break
            else:
                raise UserError(f"{self.config.data.train}: no usable record is left")
            kept.append((position, taken if epoch is None else self.apart(taken)))
            clips.update(found)
        return kept, clips

    def _count(self, prompt: Prompt, reason: str) -> None:
        self.bad[prompt.place] = reason
        if prompt.place not in self._listed:
            list_bad(self.config, [{"place": prompt.place, "id": prompt.id, "reason": reason}])
        self.check({prompt.place})

    def check(self, bad: set[str]) -> None:
        """Raise UserError when too many records are bad: `bad` of any rank and those found here, by their places."""
        if count := len(bad | self.bad.keys()):
            example = next(iter(self.bad.items()), (min(bad, default=""), "see bad_records.jsonl"))
            check_share(self.config, count + self.bad_before, self.records, ": ".join(example))


class _Bad(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    place: str


def listed(config: Config) -> set[str]:
    """Places in the run folder's bad_records.jsonl, which an earlier start of the run may have written."""
    file = Path(config.run.dir, "bad_records.jsonl")
    return {line["place"] for line in read_lines(file, _Bad)}


def list_bad(config: Config, bad: list[dict[str, str]]) -> None:
    """Add records to bad_records.jsonl, which a run without any does not have."""
    if not bad:
        return
    with open(Path(config.run.dir, "bad_records.jsonl"), "a") as f:
        f.write("".join(json.dumps(b) + "\n" for b in bad))


def check_share(config: Config, bad: int, records: int, example: str) -> None:
    """Raise UserError when more than data.max_bad_share of the records are bad."""
    if bad > config.data.max_bad_share * records:
        raise UserError(
            f"{bad} of {records} records are bad, more than data.max_bad_share={config.data.max_bad_share:g} allows; "
            f"such as {example}; mend or remove them, or raise data.max_bad_share"
        )
