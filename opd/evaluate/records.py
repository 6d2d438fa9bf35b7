"""What an evaluation measures: its settings, the records, and what is measured already. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from os.path import commonprefix, isfile
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from opd.config.load import load_config
from opd.config.schema import Config
from opd.evaluate.results import renamed
from opd.processes.with_servers import served
from opd.prompts.manifest import read_manifest
from opd.scoring.scorer import Scorer
from opd.settings import UserError
from opd.storage import run_folder
from opd.storage.journal import canonical, digest, stats
from opd.storage.json_lines import read_lines, write_atomic
from opd.types import Prompt, audio_paths, render, transcript

VERSION = 1  # higher when the same settings measure something else than before
SETS: tuple[Literal["test", "retention"], ...] = ("test", "retention")
JUDGE = ("model", "prompt", "rating_prompt", "rubric_prompt", "system", "max_tokens", "temperature", "top_p", "samples")
RECORDS, SETTINGS = "records.jsonl", "settings.yaml"


@dataclass(frozen=True)
class Item:
    """A record to be measured."""

    part: Literal["test", "retention"]
    prompt: Prompt
    record: str  # digest of what is asked and expected, with the bytes of its clips: the same in any evaluation
    key: str  # digest of that and of the settings: the same where it would be measured alike
    divergences: bool


class Line(BaseModel):
    """What `opd compare` relies on in a line of records.jsonl."""

    model_config = ConfigDict(strict=True, extra="allow")
    id: str
    part: str
    record: str
    question: str
    views: dict[str, dict[str, Any]]


def eval_config(recipe: str, overrides: list[str], out: Path, teacher: bool) -> Config:
    """A recipe as an evaluation has it: no learner, models resolved, the teacher on a server, or no `teacher` at all.

    Raises UserError for a recipe that has nothing to measure, or a teacher that no server is.
    """
    config = load_config(recipe, overrides, teacher)
    e, t = config.eval, config.teacher
    if e.test is None and e.retention is None:
        raise UserError(f"{recipe}: nothing to evaluate: expected eval.test or eval.retention, found neither")
    if teacher and not (t.about.servers and t.path):
        told = f"expected one teacher with a path of its own, found teacher.kind {t.kind}"
        remedy = "name it by teacher.kind=server teacher.path=..., or go without it: --no-teacher"
        raise UserError(f"{recipe}: {told}; {remedy}")
    return served(config, out, teacher)


def settings(config: Config) -> dict[str, Any]:
    """All that a measurement depends on beside the record itself."""
    e, judge, t = config.eval, config.eval.judge, config.teacher
    models = {"student": config.student} | ({"teacher": t} if t.about.servers == "all" else {})
    return {
        **{name: model(m.path, m.dtype) for name, m in models.items()},
        "family": config.student.family,
        "max_tokens": config.rollout.max_tokens,
        "max_audio_seconds": config.data.max_audio_seconds,
        "seed": config.run.seed,
        "match": e.match,
        "tolerance": e.tolerance,
        "judge": judge and {n: getattr(judge, n) for n in JUDGE},
        "version": VERSION,
    }


def model(path: str, dtype: str) -> dict[str, str]:
    """A model, and what tells it from other weights at the same place."""
    files = stats(Path(path), "*.safetensors") if Path(path).is_dir() else []
    return {"path": path, "dtype": dtype, "files": hashlib.sha256(canonical(files)).hexdigest()[:16]}


def claim(out: Path, found: dict[str, Any]) -> None:
    """Make a folder this evaluation's. Raises UserError when it holds another one, naming what differs.

    One that failed before anything was measured is no evaluation yet.
    """
    before = stored(out)
    other = {} if before is None else differing(before, found)
    kept = [*out.glob("*/journal-*.jsonl"), *out.glob(RECORDS)]
    if other and any(file.stat().st_size for file in kept):
        shown = ", ".join(f"{k} ({old} -> {new})" for k, (old, new) in other.items())
        raise UserError(f"--out {out}: holds an evaluation under other settings: {shown}; name another folder")
    if before is not None and not other:
        return
    if (out / "config.yaml").is_file():
        raise UserError(f"--out {out}: holds a run; name a folder of the evaluation's own")
    about = {"versions": run_folder.package_versions(), "git_commit": run_folder.git_commit()}
    write_atomic(out / SETTINGS, yaml.safe_dump({"settings": found, **about}, sort_keys=False))


def stored(out: Path) -> dict[str, Any] | None:
    """The settings that a folder was measured under; None where it has none. Raises UserError for unreadable ones."""
    path = out / SETTINGS
    if not path.is_file():
        return None
    try:
        return dict(yaml.safe_load(path.read_text())["settings"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, KeyError) as e:
        raise UserError(f"{path}: not readable as an evaluation's settings; move the folder away") from e


def differing(before: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Settings in which two measurements differ, each with both values, briefly; of two judges, what of them does.

    Where a judge listens is nothing that is measured; older folders name it. A setting that is not there is None.
    """
    a, b = _flat(before, found), _flat(found, before)
    return {k: _brief(a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def _flat(some: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What counts of a judge as settings of their own, where both have one."""
    flat: dict[str, Any] = {}
    for k, v in some.items():
        judges = k.endswith("judge") and isinstance(v, dict) and isinstance(other.get(k), dict)
        flat |= {f"{k}.{n}": v.get(n) for n in JUDGE} if judges else {k: v}
    return flat


def _brief(first: Any, other: Any) -> tuple[str, str]:
    """Both values on one line; of long ones what is around their first difference."""
    a, b = (str(v if not isinstance(v, dict) else v.get("path") or v.get("model")) for v in (first, other))
    start = max(0, len(commonprefix([a, b])) - 20) if max(len(a), len(b)) > 80 else 0
    a, b = ("…" * (start > 0) + " ".join(v[start : start + 80].split()) for v in (a, b))
    return a, b


def read_items(config: Config) -> list[Item]:
    """The records of eval.test and eval.retention. Raises UserError for one that cannot be measured."""
    scorer, found, held = Scorer(config.eval), settings(config), stored(Path(config.run.dir))
    if held is not None and not differing(held, found):
        found = held  # as an older version spells it: what it measured has its digest
    measured = hashlib.sha256(canonical(found)).hexdigest()
    items = []
    for part in SETS:
        path, name = getattr(config.eval, part), f"eval.{part}"
        if path is None:
            continue
        prompts, bad = read_manifest(path, config.eval.limit)
        if bad:
            told = "mend or remove it: every record must be good"
            raise UserError(f"{name}: {bad[0]['place']}: {bad[0]['reason']}; {told}")
        scorer.check(prompts, name)
        for i, prompt in enumerate(prompts):
            if gone := [p for p in audio_paths(prompt) if not isfile(p)]:
                raise UserError(f"{name}: {prompt.place}: {gone[0]}: no such audio file; mend or remove the record")
            divergences = part == "test" and i < config.eval.kl_limit
            record = _digest(prompt, config.eval.match or prompt.match)
            key = hashlib.sha256(canonical([measured, part, record, divergences])).hexdigest()[:32]
            items.append(Item(part, prompt, record, key, divergences))
    return items


def _digest(p: Prompt, match: str) -> str:
    clips = [digest(path) for path in audio_paths(p)]
    content: list[Any] = [p.id, render(p, "text"), p.answer, p.match, p.choices, p.tolerance, clips]
    if match == "voicebench_bbh":
        content.append(p.group)  # it names the task, whose rule grades
    return hashlib.sha256(canonical(content)).hexdigest()[:16]


def fields(prompt: Prompt) -> dict[str, str]:
    """What a record says of itself, by field."""
    return ({"group": prompt.group} if prompt.group else {}) | prompt.other


def line(item: Item, measured: dict[str, Any]) -> dict[str, Any]:
    """A line of records.jsonl: what the manifest says now, and what was measured."""
    p = item.prompt
    about = {"id": p.id, "part": item.part, "record": item.record, "question": transcript(p), "answer": p.answer}
    more = {"fields": fields(p), "numbers": {"seconds": measured["seconds"]} | p.numbers}
    return about | more | {k: v for k, v in measured.items() if k != "seconds"}


def write_records(out: Path, lines: list[dict[str, Any]]) -> None:
    """Replace records.jsonl."""
    write_atomic(out / RECORDS, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation's records.jsonl. Raises UserError naming file and line."""
    found = [renamed(r) for r in read_lines(folder / RECORDS, Line)]
    if not found:
        raise UserError(f"{folder / RECORDS}: expected the records of an evaluation, found none; run `opd eval` again")
    return found
