"""Public benchmarks of speech: where they are, what their columns hold, and which rule grades them. Imports no torch.

An audio part of the records made here has `clip`, what a row has of it, in the place of a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd.data.engine.stage import Drop, Record
from opd.scoring.answers import check_answer
from opd.scoring.voicebench import TASKS, criteria

Row = dict[str, Any]
TURNS = 8  # of a user, at most, in Audio MultiChallenge
AUDIO = ("audio", "audio_path", "audio_id", "file_name", *(f"user_turn_{k}_audio" for k in range(1, TURNS + 1)))
UNHEARD = "(a recording)"  # the transcript of what is not only speech
OPTIONS = "{question}\n{options}\nAnswer with one of these options, word for word."


@dataclass(frozen=True)
class Part:
    """A benchmark, or a subset of one that is a data set of its own."""

    match: str
    splits: tuple[str, ...]
    needs: str = ""  # columns besides the audio; one/other: either
    judge: str = ""  # settings of eval.judge as the authors have it


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and how its rows become records."""

    source: str  # hub:owner/name
    paper: str
    make: Callable[[Row, str, str], Record]  # of row, subset and split, its answer, group, messages
    parts: dict[str, Part] = field(default_factory=dict)  # by subset; "" where there are none
    heard_only: bool = False  # what is heard is not only speech: no transcript says it
    hint: str = ""  # to a column that is not there


def make(benchmark: str, subset: str, split: str, row: Row, instruction: str) -> Record:
    """A record of a row: messages, match, answer and group where there are, further strings. Raises Drop."""
    about = BENCHMARKS[benchmark]
    record = about.make(row, subset, split)
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


ACCENTS = ("aus", "gbr", "ind_n", "ind_s", "irl", "kenya", "nga", "nzl", "phl", "usa", "zaf")
DOMAINS = (
    *("law", "engineering", "other", "biology", "business", "economics", "health", "philosophy"),
    *("psychology", "history", "chemistry", "physics"),
)
TEST = ("test",)
SAMPLING = "system: voicebench, samples: 3, temperature: 0.5, top_p: 0.95"  # of VoiceBench's judge
RATED = Part("rating", TEST, "prompt", judge=SAMPLING)
BENCHMARKS = {
    "voicebench": Benchmark(
        "hub:hlt-lab/voicebench",
        "arXiv 2410.17196",
        _voicebench,
        {
            **dict.fromkeys(("alpacaeval", "alpacaeval_full", "commoneval", "wildvoice"), RATED),
            "sd-qa": Part("judge", ACCENTS, "prompt reference", judge=f"prompt: voicebench_qa, {SAMPLING}"),
            "mmsu": Part("voicebench_mcq", DOMAINS, "prompt reference"),
            "openbookqa": Part("voicebench_mcq", TEST, "prompt reference"),
            "bbh": Part("voicebench_bbh", TEST, "prompt reference id"),
            "ifeval": Part("ifeval", TEST, "prompt instruction_id_list kwargs"),
            "advbench": Part("voicebench_refusal", TEST, "prompt"),
        },
    ),
    "big_bench_audio": Benchmark(
        "hub:fixie-ai/big_bench_audio:train",
        "huggingface.co/blog/big-bench-audio-release",
        _big_bench_audio,
        {"": Part("judge", ("train",), "official_answer transcript/original_question", "prompt: big_bench_audio")},
        hint="ArtificialAnalysis/big_bench_audio has no transcripts; fixie-ai/big_bench_audio, the default, has",
    ),
    "mmar": Benchmark(
        "hub:ngqtrung/mmar",
        "arXiv 2505.13032",
        _options,
        {"": Part("tokens", TEST, "question choices answer")},
        heard_only=True,
        hint="BoJack/MMAR has its clips in an archive: unpack it and name the folder as source",
    ),
    "mmau": Benchmark(
        "hub:lmms-lab-audio/mmau",
        "arXiv 2410.19168",
        _options,
        {"": Part("tokens", ("test_mini",), "question choices answer")},
        heard_only=True,
        hint="the answers of MMAU's test split are not public; test-mini has them",
    ),
    "audio_multichallenge": Benchmark(
        "hub:ScaleAI/audiomc",
        "arXiv 2512.14865",
        _multichallenge,
        {"": Part("rubric", TEST, "user_turn_1_transcript rubric")},
    ),
}
