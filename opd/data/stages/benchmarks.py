"""Public benchmarks of speech: what their columns hold. benchmarks.yaml says where they are. Imports no torch.

An audio part of the records made here has `clip`, what a row has of it, in the place of a path.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from opd.data.engine.stage import Drop, Record
from opd.scoring.answers import check_answer
from opd.scoring.voicebench import TASKS, criteria
from opd.settings import Section, read_yaml

Row = dict[str, Any]
TURNS = 8  # of a user, at most, in Audio MultiChallenge
AUDIO = ("audio", "audio_path", "audio_id", "file_name", *(f"user_turn_{k}_audio" for k in range(1, TURNS + 1)))
UNHEARD = "(a recording)"  # the transcript of what is not only speech
OPTIONS = "{question}\n{options}\nAnswer with one of these options, word for word."


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


LISTED = read_yaml(Path(__file__).with_name("benchmarks.yaml"))
BENCHMARKS = {name: Benchmark.model_validate(about) for name, about in LISTED.items()}


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


# ---- VoiceBench -----------------------------------------------------------------------------------------------------


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


# ---- others ---------------------------------------------------------------------------------------------------------


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
