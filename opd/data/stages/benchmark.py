"""Stage `benchmark`: a public benchmark as a manifest that `opd eval` measures, in both views.

benchmarks.yaml says where they are. An audio part of the records of `make` has `clip`, what a row has of it, in the
place of a path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, PositiveFloat

from opd.data.engine.stage import ClipStore, Drop, Record, Stage, audio_parts
from opd.data.stages.natural import Natural, content_digest, dropping_bad_audio
from opd.prompts import audio
from opd.prompts.manifest import clip_of, folder_of
from opd.prompts.tables import is_table, records, table
from opd.scoring.answers import check_answer
from opd.scoring.scorer import template
from opd.scoring.voicebench import TASKS, criteria
from opd.settings import Section, UserError, attempt, read_yaml

Row = dict[str, Any]
TURNS = 8  # of a user, at most, in Audio MultiChallenge
AUDIO = ("audio", "audio_path", "audio_id", "file_name", *(f"user_turn_{k}_audio" for k in range(1, TURNS + 1)))
UNHEARD = "(a recording)"  # the transcript of what is not only speech
OPTIONS = "{question}\n{options}\nAnswer with one of these options, word for word."
ANSWER_TOKENS = 2048  # that answers should have room for
WINDOW_S = 30  # that many families hear at most
TABLES = (".parquet", ".jsonl", ".json")


class Part(Section):
    """A benchmark, or a subset of one that is a data set of its own."""

    match: str
    splits: list[str] = ["test"]
    needs: str = ""  # columns besides the audio; one/other: either
    judge: str = ""  # settings of eval.judge as the authors have it


class Benchmark(Section):
    """Where a benchmark is, and what its rows have."""

    source: str  # hub:owner/name
    paper: str
    parts: dict[str, Part]  # by subset; "" where there are none
    heard_only: bool = False  # what is heard is not only speech: no transcript says it
    hint: str = ""  # to a column that is not there


BENCHMARKS = {k: Benchmark.model_validate(v) for k, v in read_yaml(Path(__file__).with_name("benchmarks.yaml")).items()}


class LoadBenchmark(Stage):
    """Settings of the stage `benchmark`."""

    name: ClassVar[str] = "benchmark"
    raw: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[str, ...]] = ("source",)

    subset: str = Field("", description="of voicebench: alpacaeval, commoneval, wildvoice, sd-qa, mmsu, bbh, …")
    split: str = Field("", description="one split only, such as usa of sd-qa; none: all that the benchmark has")
    source: str | None = Field(
        None, description="hub:owner/name, a folder or a .parquet, .jsonl or .json file; none: the benchmark's own"
    )
    instruction: Annotated[str, AfterValidator(partial(template, names=("question", "options")))] = Field(
        OPTIONS, description="of mmar and mmau, behind the clip: with {question} and {options}, which are listed"
    )
    max_seconds: PositiveFloat = Field(600.0, description="of a clip; what is longer is left out")

    def rows(self, source: str) -> Iterator[tuple[str, Any]]:
        """Rows of the benchmark that `source` names, with what a record needs to know beside its columns."""
        about, part = self._named(source)
        for split in [self.split] if self.split else part.splits:
            for number, (place, root, row) in enumerate(self._split(source, about, part, split)):
                if isinstance(row, ValueError):
                    yield place, row
                    continue
                name = row.get("id")
                if source == "voicebench" or name in (None, ""):
                    name = "/".join(filter(None, (self.subset, split, str(number))))
                yield place, {"id": str(name), "benchmark": source, "split": split, "root": str(root), "row": row}

    def _named(self, name: str) -> tuple[Benchmark, Part]:
        about = BENCHMARKS.get(name)
        if about is None:
            raise UserError(f"opd data benchmark {name}: expected one of {', '.join(BENCHMARKS)}")
        part = about.parts.get(self.subset)
        if part is None:
            known = ", ".join(about.parts) if "" not in about.parts else "none, for it has no subsets"
            raise UserError(f"opd data benchmark {name}: subset: expected {known}, found {self.subset!r}")
        if self.split and self.source is None and self.split not in part.splits:
            known = ", ".join(part.splits)
            raise UserError(f"opd data benchmark {name}: split: expected one of {known}, found {self.split!r}")
        return about, part

    def _split(self, name: str, about: Benchmark, part: Part, split: str) -> Iterator[tuple[str, Path, Any]]:
        """(place, folder that paths are relative to, row) of a split."""
        source = self.source or about.source
        if source.startswith("hub:"):
            title, _, own = source.partition(":")[2].partition(":")
            if self.subset and title.count("/") == 1:
                title += f"/{self.subset}"
            files = [f"hub:{title}:{self.split or own or split}"]
        else:
            if Path(source).is_file() and len(part.splits) > 1 and not self.split:
                known = ", ".join(part.splits)
                raise UserError(f"source {source}: is one file: say of which split it is, split= one of {known}")
            files = [str(f) for f in _files(Path(source), self.subset, split, len(part.splits))]

        def columns(there: list[str]) -> None:
            for some in (*(either.split("/") for either in part.needs.split()), AUDIO):
                if not set(some) & set(there):
                    hint = f"; {about.hint}" if about.hint else ""
                    raise ValueError(f"{name} needs a column {some[0]}, found {', '.join(there)}{hint}")

        for file in files:
            root = folder_of(file)
            if is_table(file):
                yield from ((place, root, row) for place, row in table(file, check=columns))
                continue
            for place, row in records(file):
                if isinstance(row, dict):
                    try:
                        columns(list(row))
                    except ValueError as e:
                        raise UserError(f"{place}: {e}") from e
                yield place, root, row if isinstance(row, dict | ValueError) else ValueError("expected an object")

    def key(self, record: Record) -> str:
        """A clip is known by its bytes, a record by these and its columns: where they lie does not matter."""
        if "row" not in record:
            return super().key(record)
        row = {k: _content(v, record["root"]) if k in AUDIO else v for k, v in record["row"].items()}
        return super().key({k: v for k, v in record.items() if k != "root"} | {"row": row})

    def one(self, store: ClipStore, given: Record) -> Record:
        """Row -> {"id", "messages", "match", "seconds", answer, choices, group, benchmark, subset where there are}."""
        natural = Natural(min_seconds=0.01, max_seconds=self.max_seconds)  # the shortest: of a benchmark all is asked
        record = make(given["benchmark"], self.subset, given["split"], given["row"], self.instruction)
        seconds = 0.0
        for part in audio_parts(record):
            clip = attempt(clip_of, part.pop("clip"), Path(given["root"]))
            if isinstance(clip, ValueError):
                raise Drop(f"no audio: {clip}")
            with dropping_bad_audio():
                path, length = natural.whole(store, {"id": given["id"], **clip})
            part["path"] = str(path)
            seconds += length
        return {"id": given["id"], **record, "seconds": round(seconds, 3)}

    def advice(self, source: str, out: Path) -> list[str]:
        """How the manifest is evaluated, with the settings that it needs."""
        about, part = self._named(source)
        made = [row for _, row in records(str(out), streaming=True)]
        clips = {str(out.parent / p["path"]) for row in made for p in audio_parts(row)}
        longest = math.ceil(max(audio.seconds(c) for c in clips))
        keys = ("eval.retention", "eval.test") if about.heard_only else ("eval.test", "eval.retention")
        words = [f"{keys[0]}={out}", f"{keys[1]}=", f"data.max_audio_seconds={max(longest, WINDOW_S)}"]
        words += [f"rollout.max_tokens={ANSWER_TOKENS}"]
        if part.match in ("judge", "rating", "rubric"):
            more = f", {part.judge}" if part.judge else ""
            words.append(f"'eval.judge={{url: …, model: …{more}}}'")
        lines = []
        if longest > WINDOW_S:
            told = f"clips up to {longest} s: for a family that takes {WINDOW_S} s, load it with max_seconds={WINDOW_S}"
            lines.append(f"{told}, which leaves the longer ones out")
        lines += [f"{source} ({about.paper}): opd eval RECIPE {' '.join(words)} --out FOLDER"]
        if about.heard_only:
            told = "its clips are not only speech: no transcript says what is heard, so it measures retention"
            typed = f"its typed accuracy is that of the question with {UNHEARD!r} in the clip's place"
            lines.append(f"{told}, in the speech view only; as eval.test {typed}")
        return lines


def _files(source: Path, subset: str, split: str, splits: int) -> list[Path]:
    """Tables of a local copy: the file itself, or those of a folder that belong to the subset and the split."""
    if source.is_file() and source.suffix in TABLES:
        return [source]
    if not source.is_dir():
        raise UserError(f"source {source}: expected hub:owner/name, a folder or a file ({', '.join(TABLES)})")
    folder = source / subset if subset and (source / subset).is_dir() else source
    found = [f for suffix in TABLES for f in sorted(folder.rglob(f"*{suffix}"))]
    named = [f for f in found if f.stem == split or f.stem.startswith((f"{split}-", f"{split}."))]
    if named or splits > 1:
        found = named
    tables = [f for f in found if f.suffix == ".parquet"] or found
    if not tables:
        raise UserError(f"source {folder}: expected tables ({', '.join(TABLES)}) of the split {split}, found none")
    return tables


def _content(clip: Any, root: str) -> Any:
    try:
        return content_digest(clip_of(clip, Path(root)))
    except ValueError:
        return clip


def make(benchmark: str, subset: str, split: str, row: Row, instruction: str) -> Record:
    """A record of a row: messages, match, answer and group where there are, further strings. Raises Drop."""
    about = BENCHMARKS[benchmark]
    record = MAKE[benchmark](row, subset, split)
    if about.heard_only:
        options = "\n".join(f"- {c}" for c in record["choices"])
        asked = instruction.format(question=str(row["question"]).strip(), options=options)
        record["messages"] = [{"role": "user", "content": [_audio(row, UNHEARD), {"type": "text", "text": asked}]}]
    named = {"benchmark": benchmark} | ({"subset": subset} if subset else {})
    match = about.parts[subset].match
    try:
        check_answer(record.get("answer"), match, record.get("choices", ()), record.get("group", ""))
    except ValueError as e:
        raise Drop(str(e)) from e
    return record | {"match": match} | named


def _said(row: Row, *names: str) -> str:
    """The text of the first of these columns that has one. Raises Drop."""
    text = next((str(row[n]).strip() for n in names if row.get(n) not in (None, "")), "")
    if not text:
        raise Drop(f"no {names[0]}")
    return text


def _audio(row: Row, transcript: str, *names: str) -> dict[str, Any]:
    clip = next((row[n] for n in names or AUDIO if row.get(n) not in (None, "")), None)
    if clip is None:
        raise Drop("no audio")
    return {"type": "audio", "clip": clip, "transcript": transcript}


def _spoken(row: Row, *transcript: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [_audio(row, _said(row, *transcript))]}]


def _voicebench(row: Row, subset: str, split: str) -> Record:
    record: Record = {"messages": _spoken(row, "prompt")}
    if subset in ("sd-qa", "mmsu", "openbookqa", "bbh"):
        record["answer"] = _said(row, "reference")
    if subset in ("sd-qa", "mmsu"):
        record["group"] = split  # accents and domains are splits
    if subset == "bbh":
        name = _said(row, "id")
        task = next((t for t in TASKS if t in name), None)
        if task is None:
            raise Drop(f"unknown task: {name}")
        record["group"] = task
    if subset == "ifeval":
        record["answer"] = _instructions(row)
    return record


def _instructions(row: Row) -> str:
    try:
        names, kwargs = (_listed(row.get(n)) for n in ("instruction_id_list", "kwargs"))
        pairs = zip(names, kwargs, strict=True)
        return json.dumps([{"id": str(n), "kwargs": {k: v for k, v in (kw or {}).items() if v}} for n, kw in pairs])
    except (ValueError, AttributeError) as e:
        raise Drop(f"instructions: expected instruction_id_list and as many kwargs ({e})") from e


def _listed(value: Any) -> list[Any]:
    """A list, also one that is written as JSON. Raises ValueError."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise ValueError(f"expected a list, found {str(found)[:60]!r}")
    return found


def _big_bench_audio(row: Row, subset: str, split: str) -> Record:
    answer = {"answer": _said(row, "official_answer"), "group": str(row.get("category") or "")}
    return {"messages": _spoken(row, "transcript", "original_question")} | answer


LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s*(.*)", re.DOTALL)


def _options(row: Row, subset: str, split: str) -> Record:
    """MMAR and MMAU: options as they are, or as "A. option" with a letter for an answer."""
    try:
        choices = [str(c).strip() for c in _listed(row.get("choices"))]
    except ValueError as e:
        raise Drop(f"choices: {e}") from e
    answer = _said(row, "answer")
    lettered = [LETTERED.fullmatch(c) for c in choices]
    if all(m and m[1] == chr(65 + i) for i, m in enumerate(lettered)):
        choices = [m[2].strip() for m in lettered if m]
        if re.fullmatch(r"[A-Z]", answer) and ord(answer) - 65 < len(choices):
            answer = choices[ord(answer) - 65]
        elif m := LETTERED.fullmatch(answer):
            answer = m[2].strip()
    if answer not in choices:
        raise Drop(f"answer: {answer!r} is none of the choices")
    record: Record = {"choices": choices, "answer": answer, "group": str(row.get("modality") or row.get("task") or "")}
    names = {"category": ("category",), "sub_category": ("sub-category", "subcategory"), "difficulty": ("difficulty",)}
    return record | {k: str(row[n]) for k, some in names.items() for n in some if row.get(n)}


def _multichallenge(row: Row, subset: str, split: str) -> Record:
    """Audio MultiChallenge: the earlier turns of the assistant are given, the last user turn is answered."""
    turns = [k for k in range(1, TURNS + 1) if row.get(f"user_turn_{k}_audio") or row.get(f"user_turn_{k}_transcript")]
    if turns != list(range(1, len(turns) + 1)) or not turns:
        raise Drop("user turns: expected turns from 1 on without a gap")
    messages: list[dict[str, Any]] = []
    for k in turns:
        part = _audio(row, _said(row, f"user_turn_{k}_transcript"), f"user_turn_{k}_audio")
        messages.append({"role": "user", "content": [part]})
        if k < len(turns):
            messages.append({"role": "assistant", "content": _said(row, f"assistant_turn_{k}_transcript")})
    rubric = row.get("rubric")
    try:
        wanted = criteria(rubric if isinstance(rubric, str) else json.dumps(rubric))
    except ValueError as e:
        raise Drop(f"rubric: {e}") from e
    return {"messages": messages, "answer": json.dumps(wanted, ensure_ascii=False), "group": str(row.get("axis") or "")}


MAKE = {  # of row, subset and split: its answer, group, messages
    "voicebench": _voicebench,
    "big_bench_audio": _big_bench_audio,
    "mmar": _options,
    "mmau": _options,
    "audio_multichallenge": _multichallenge,
}
