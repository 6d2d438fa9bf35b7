"""`opd benchmark`: the real lmms-eval against a real vLLM server, on small data sets in the schemas of the Hub's."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import local_benchmarks
import numpy as np
import pytest
from datasets import Audio, Dataset
from live import STUDENT, config_of, opd

from opd.evaluate.benchmark.command import Benchmark, JudgeConfig, read
from opd.evaluate.records import model
from opd.inference.client import ServerError
from opd.models.base import family_of
from opd.prompts import audio
from opd.prompts.clips import ContextLimit
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import decode
from opd.settings import UserError
from opd.storage.journal import Journal
from opd.types import Prompt

RECIPE, FEW, ALL, TOKENS = "recipes/tiny/2_xopd.yaml", 6, 8, 24
TASKS = ("tiny_mmar", "tiny_mmau", "tiny_mmsu", "tiny_own", "tiny_sdqa")


@pytest.fixture(scope="module")
def benchmark(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    local_benchmarks.make(folder / "sets", data / "test.jsonl", ALL)
    content = f"tasks: [{', '.join(TASKS)}]\ninclude: sets/tasks\nmax_tokens: {TOKENS}\nseed: 3\n"
    (folder / "b.yaml").write_text(content)
    return folder / "b.yaml"


def run(benchmark: Path, data: Path, url: str, out: Path, *more: str) -> Any:
    given = [f"student.path={STUDENT}", f"data.train={data}/train.jsonl", f'rollout.urls=["{url}"]']
    return opd("benchmark", RECIPE, str(benchmark), *given, *more, "--out", str(out), "--plain")


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (out / f"lmms_eval/samples_{task}.jsonl").read_text().splitlines()]


def asked_directly(data: Path, url: str, out: Path, texts: list[str]) -> list[str]:
    """What the student says to the first recordings and a text behind each, by training's own sampler."""
    config = config_of("2_xopd", data, out, f"student.path={STUDENT}", f"rollout.max_tokens={TOKENS}")
    family = family_of(STUDENT)
    room = ContextLimit(family, TOKENS, None)
    records = [json.loads(x) for x in (data / "test.jsonl").read_text().splitlines()]
    jobs: Any = []
    clips = {}
    for i, (record, text) in enumerate(zip(records, texts, strict=False)):
        path = str(data / record["messages"][0]["content"][0]["path"])
        clips[path] = room.filled(audio.load(path, family.sampling_rate, 30.0))
        parts = [{"type": "audio", "path": path, "transcript": ""}]
        parts += [{"type": "text", "text": text}] if text else []
        jobs.append((Prompt(str(i), ({"role": "user", "content": parts},)), "speech", str(i)))
    replies = VllmSampler(config, family, [url]).sample(jobs, clips, 1, 0.0, check=False)
    return [decode(family, r.token_ids) for r in replies]


@pytest.fixture(scope="module")
def ran(benchmark: Path, data: Path, student_url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, the process) of a benchmark that the student also judges: poorly, but over the real way."""
    out = tmp_path_factory.mktemp("ran") / "out"
    judge = f'benchmark.judge={{url: "{student_url}/v1", model: student}}'
    done = run(benchmark, data, student_url, out, f"benchmark.limit={FEW}", judge)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def test_what_lmms_eval_scores_is_what_the_student_says(ran: Any, data: Path, student_url: str, tmp_path: Path) -> None:
    out, _ = ran
    for task in TASKS:
        lines = samples(out, task)
        texts = [x["arguments"][0] for x in lines]
        assert [x["filtered_resps"][0] for x in lines] == asked_directly(data, student_url, tmp_path, texts), task
    assert "Please listen to the audio" in samples(out, "tiny_sdqa")[0]["arguments"][0]
    assert samples(out, "tiny_own")[0]["arguments"][0] == ""


def test_values_are_those_worked_by_hand(ran: Any) -> None:
    out, done = ran
    found = json.loads((out / "benchmark.json").read_text())
    rows = {(r["task"], r["metric"]): r for r in found["results"]}
    metrics = ("mmar_accuracy", "accuracy", "accuracy", "exact_match", "gpt4_score")
    assert set(rows) == set(zip(TASKS, metrics, strict=True))
    assert all(r["n"] == FEW for r in rows.values())
    own = [x["filtered_resps"][0] == x["target"] for x in samples(out, "tiny_own")]
    assert rows["tiny_own", "exact_match"]["value"] == pytest.approx(sum(own) / FEW)
    assert rows["tiny_own", "exact_match"]["version"] == 3.0
    mmau = samples(out, "tiny_mmau")
    picked = [100.0 * (x["doc"]["model_prediction"] == x["doc"]["answer"]) for x in mmau]
    row = rows["tiny_mmau", "accuracy"]
    assert row["value"] == pytest.approx(np.mean(picked), abs=1e-4)
    assert row["stderr"] == pytest.approx(np.std(picked, ddof=1) / FEW**0.5)
    lettered = [re.search(r"\b[A-D]\b", x["filtered_resps"][0]) for x in mmau]
    assert row["guessed"] == lettered.count(None) > 0
    for task, metric in (("tiny_mmar", "mmar_accuracy"), ("tiny_mmsu", "accuracy")):
        scores = [100.0 * x[metric]["score"] for x in samples(out, task)]
        assert rows[task, metric]["value"] == pytest.approx(np.mean(scores))
        assert rows[task, metric]["stderr"] == pytest.approx(np.std(scores, ddof=1) / FEW**0.5)
    mmar = [x["mmar_accuracy"] for x in samples(out, "tiny_mmar")]
    assert all(x["score"] == (x["prediction"] == "D") for x in mmar)
    replies = [json.loads(x) for x in (out / "judge.jsonl").read_text().splitlines()]
    assert found["judged"] == len(replies) == FEW + 1  # one to try the task
    assert rows["tiny_sdqa", "gpt4_score"]["value"] == sum(r["said"].lower() == "yes" for r in replies[1:]) / FEW
    assert all(x["filtered_resps"][0] in str(replies) for x in samples(out, "tiny_sdqa"))
    assert "pedant_score is left out: it needs qa_metrics" in found["notes"]
    assert f"the first {FEW} records" in done.stdout and "tiny_mmau" in done.stdout


def student(benchmark: Path, data: Path, url: str, kept: Path, *overrides: str) -> Any:
    """The model that lmms-eval is given, with the records of tiny_own."""
    from opd.evaluate.benchmark.student import Student

    config = config_of("2_xopd", data, kept, f"student.path={STUDENT}", f'rollout.urls=["{url}"]')
    found = Student(
        config,
        read(benchmark, list(overrides)),
        ContextLimit(family_of(STUDENT), 0, 512),
        Journal(kept, 0),
        model(STUDENT, "float32"),
    )
    records = Dataset.from_parquet(str(benchmark.parent / "sets/own/data/test-00000-of-00001.parquet"))
    found.task_dict = {"tiny_own": {"test": records.cast_column("audio", Audio(decode=False))}}
    return found


def instance(i: int, **sampling: Any) -> Any:
    from lmms_eval.api.instance import Instance

    asked = ("", {"do_sample": False, **sampling}, lambda doc: [doc["audio"]], i, "tiny_own", "test")
    return Instance("generate_until", asked, 0, {"task": "tiny_own", "doc_id": i, "repeats": 1})


def test_kept_answers_are_not_asked_again(ran: Any, benchmark: Path, data: Path) -> None:
    out, _ = ran
    assert len((out / "answers/journal-0.jsonl").read_text().splitlines()) == len(TASKS) * FEW
    nobody = student(benchmark, data, "http://127.0.0.1:9", out / "answers")
    said = [x["filtered_resps"][0] for x in samples(out, "tiny_own")]
    assert [a.text for a in nobody.generate_until([instance(i) for i in range(FEW)])] == said
    with pytest.raises(ServerError):
        nobody.generate_until([instance(FEW)])  # a new question does need the server
    with pytest.raises(UserError, match="task tiny_own: record 1: samples with top_p=0.9"):
        nobody.generate_until([instance(1, do_sample=True, temperature=0.7, top_p=0.9)])
    nobody.limit = 0.5
    with pytest.raises(UserError, match="2 of 2 questions have clips longer than 0.5 s"):
        nobody.generate_until([instance(0), instance(1)])


def test_sampling_follows_the_seed(benchmark: Path, data: Path, student_url: str, tmp_path: Path) -> None:
    settings = ["benchmark.temperature=1.5", "benchmark.system=count", "benchmark.max_tokens=16"]

    def says(folder: str, seed: int) -> list[str]:
        asked = student(benchmark, data, student_url, tmp_path / folder, *settings, f"benchmark.seed={seed}")
        found = [a.text for a in asked.generate_until([instance(0), instance(1), instance(0)])]  # the first, twice
        assert len((tmp_path / folder / "journal-0.jsonl").read_text().splitlines()) == 3
        return found

    first = says("a", 1)
    assert first[0] != first[2] and says("b", 1) == first and says("c", 2) != first


def test_a_judge_that_fails_ends_it(benchmark: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lmms-eval would score 0: its tasks and verifiers catch every Exception."""
    from opd.evaluate.benchmark import scoring

    tasks = loaded(monkeypatch, tmp_path, ["tiny_sdqa"], benchmark, None)
    with pytest.raises(UserError, match="task tiny_sdqa: its gpt4_score needs a judge and the benchmark has none"):
        tasks.load_task_or_group(["tiny_sdqa"])
    down = JudgeConfig(url="http://127.0.0.1:9/v1", model="x", retries=1, timeout_s=2.0)
    tasks = loaded(monkeypatch, tmp_path, ["tiny_sdqa"], benchmark, down)
    with pytest.raises(UserError, match="task tiny_sdqa: judge: http://127.0.0.1:9/v1: cannot be reached"):
        tasks.load_task_or_group(["tiny_sdqa"])
    score = tasks.loaded["tiny_sdqa"].process_results  # with lmms-eval's own retries around it
    with pytest.raises(scoring.JudgeFailed):
        score({"prompt": "what", "reference": "that"}, ["this"])


def test_a_missing_package_is_told_first(benchmark: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lmms-eval would log it, and score 0."""
    monkeypatch.setitem(sys.modules, "langdetect", None)
    tasks = loaded(monkeypatch, tmp_path, ["tiny_ifeval"], benchmark, None)
    tasks.faults.watch()
    with pytest.raises(UserError, match="task tiny_ifeval: its scoring fails on its first record: .*langdetect"):
        tasks.load_task_or_group(["tiny_ifeval"])


def test_guesses_follow_the_seed_and_fit(benchmark: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = loaded(monkeypatch, tmp_path, ["tiny_mmau"], benchmark, None)
    tasks.load_task_or_group(["tiny_mmau"])
    score, faults = tasks.loaded["tiny_mmau"].process_results, tasks.faults.found
    doc = {"question": "who", "choices": '["he", "she"]', "answer": "he", "task": "speech"}

    def guessed(i: int) -> str:
        return score(doc | {"id": i}, [f"someone {i}"])["submission"]["model_prediction"]

    first = [guessed(i) for i in range(30)]
    assert first == [guessed(i) for i in range(30)] and set(first) == {"he", "she"}  # never the third of two
    assert tasks.guesses.count["tiny_mmau"] == 60 and not faults
    assert score(doc, ["B"])["accuracy"]["overall"] == 0.0 and score(doc, ["A"])["accuracy"]["overall"] == 1.0
    assert tasks.guesses.count["tiny_mmau"] == 60
    score(doc, ["D"])  # where lmms-eval ends with an IndexError, after ten seconds
    assert len(faults) == 1 and "tiny_mmau: response ['D']: IndexError" in faults[0]


def test_an_unknown_task_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import lmms_eval.tasks

    one = Path(lmms_eval.tasks.__file__).parent / "mmau/__init__.py"  # of 2,000 files; all of them take seconds
    monkeypatch.setattr(lmms_eval.tasks, "__file__", str(one))
    message = r"tasks: mmau_test_minni: lmms-eval has no such task \(mmau_test_mini"
    with pytest.raises(UserError, match=message):
        loaded(monkeypatch, tmp_path, ["mmau_test_mini", "mmau_test_minni"], None, None)


def loaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str], benchmark: Path | None, judge: JudgeConfig | None
) -> Any:
    """Tasks of lmms-eval as the worker has them, undone after the test."""
    from opd.evaluate.benchmark import scoring

    monkeypatch.setattr(os, "environ", os.environ.copy())
    scoring.install_judge(judge, folder / "judge.jsonl")
    faults = scoring.Faults()
    guesses = scoring.Guesses(3, faults)
    monkeypatch.setattr(random, "choice", guesses._drawn)
    include = str(benchmark.parent / "sets/tasks") if benchmark else None
    return scoring.Tasks(Benchmark(tasks=names, include=include, judge=judge), guesses, faults)
