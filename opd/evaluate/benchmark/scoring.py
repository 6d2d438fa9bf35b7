"""lmms-eval's scoring, watched: tried before anything is asked, guesses seeded and counted, faults collected."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import datasets
import huggingface_hub
from lmms_eval.api.task import Task
from lmms_eval.tasks import TaskManager
from loguru import logger

from opd.evaluate.benchmark.judging import JudgeFailed
from opd.evaluate.benchmark.settings import Benchmark
from opd.settings import UserError
from opd.storage.digests import canonical

DRAWS = 20  # of a guess, until the task can take it
PROBE = "A"  # an answer that every way of scoring takes
JUDGED = ("gpt", "judge", "semantic_match")  # in the names of metrics that an LLM gives


class Faults:
    """What lmms-eval logs as an error while it scores: it goes on with a 0 then."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._handler = logging.Handler(logging.ERROR)
        self._handler.emit = lambda record: self.found.append(record.getMessage())  # type: ignore[method-assign]

    def watch(self) -> None:
        """From now on; for the rest of the process."""
        logger.add(lambda message: self.found.append(message.record["message"]), level="ERROR")
        logging.getLogger("lmms_eval").addHandler(self._handler)


class Guesses:
    """Random choices of a task that finds no answer in a response: seeded by record and response, and counted.

    lmms-eval draws from the process's one generator, in the order in which its threads come.
    """

    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed, self.faults, self.count = seed, faults, Counter[str]()
        self._here, self._lock = threading.local(), threading.Lock()
        self._choice = random.choice

    def install(self) -> None:
        """In the place of random.choice, for the rest of the process."""
        random.choice = self._drawn  # type: ignore[assignment]

    def _drawn(self, options: Any) -> Any:
        source = getattr(self._here, "source", None)
        if source is None:
            return self._choice(options)
        self._here.guessed = True
        return source.choice(options)

    def around(self, task: str, score: Callable[..., Any]) -> Callable[..., Any]:
        """`score` of (record, responses), with its guesses drawn here.

        A guess that the task itself cannot take (the fourth of three options) is drawn again. A response that it cannot
        take is a fault, and scored as one that says nothing: lmms-eval would end there.
        """

        def scored(doc: Any, results: Any, **more: Any) -> Any:
            place = canonical([self.seed, task, {k: str(v) for k, v in doc.items()}, results])
            self._here.source = random.Random(place)
            try:
                return self._score(task, partial(score, doc, **more), results)
            except Exception as e:
                self.faults.found.append(f"{task}: response {str(results)[:300]}: {type(e).__name__}: {e}")
                return self._score(task, partial(score, doc, **more), [""] * len(results))
            finally:
                self._here.source = None

        return scored

    def _score(self, task: str, score: Callable[..., Any], results: list[Any]) -> Any:
        for left in reversed(range(DRAWS)):
            self._here.guessed = False
            try:
                found = score(list(results))
            except Exception:
                if self._here.guessed and left:
                    continue
                raise
            with self._lock:
                self.count[task] += self._here.guessed
            return found
        raise AssertionError


class Tasks(TaskManager):
    """lmms-eval's tasks with the settings of a benchmark file; a task is tried as soon as it is loaded."""

    def __init__(self, benchmark: Benchmark, guesses: Guesses, faults: Faults) -> None:
        own = {"include_path": benchmark.include, "model_name": benchmark.prompts}
        super().__init__("WARNING", include_defaults=benchmark.include is None, **own)
        if not set(benchmark.tasks) <= set(self.all_subtasks):  # lmms-eval's own: 2,000 files, which takes seconds
            super().__init__("WARNING", include_defaults=True, **own)
        self.benchmark, self.guesses, self.faults = benchmark, guesses, faults
        self.loaded: dict[str, Task] = {}
        for name in benchmark.tasks:
            if name not in self.all_tasks:
                close = ", ".join(get_close_matches(name, self.all_tasks, n=3)) or "none is close"
                raise UserError(f"tasks: {name}: lmms-eval has no such task ({close})")

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        given = dict(config.get("dataset_kwargs") or {})
        if given.get("token") is True and huggingface_hub.get_token() is None:
            del given["token"]  # of a public data set none is needed
        if revision := self.benchmark.revisions.get(str(config.get("dataset_path"))):
            given["revision"] = revision
        if "dataset_path" not in config:
            return config
        return {**config, "dataset_kwargs": given, "process_docs": _undecoded(config.get("process_docs"))}

    def load_task_or_group(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As lmms-eval does, then try the scoring of each task. Raises UserError."""
        try:
            found = super().load_task_or_group(*args, **kwargs)
        except Exception as e:
            names, cause = ", ".join(self.benchmark.tasks), _cause(e)
            raise UserError(f"tasks {names}: do not load: {type(cause).__name__}: {cause}"[:600]) from e
        self.loaded = _leaves(found)
        for name, task in self.loaded.items():
            self._try(name, task)
        self.guesses.count.clear()
        return found

    def _try(self, name: str, task: Task) -> None:
        """Score one made-up response to the first record: a missing package, judge or field ends it here."""
        judged = [m for m in task.aggregation() if any(part in m.lower() for part in JUDGED)]
        if judged and self.benchmark.judge is None:
            raise UserError(
                f"task {name}: its {', '.join(judged)} needs a judge and the benchmark has none; name one, such as "
                "'benchmark.judge={url: \"http://127.0.0.1:8000/v1\", model: NAME}'"
            )
        score = task.config.process_results
        if not callable(score):
            return
        task.config.process_results = self.guesses.around(name, score)
        before = len(self.faults.found)
        try:
            task.config.process_results(dict(task.eval_docs_no_media[0]), [PROBE])
        except JudgeFailed as e:
            raise UserError(f"task {name}: {e}") from e
        except Exception as e:
            raise UserError(f"task {name}: its scoring fails on its first record: {type(e).__name__}: {e}") from e
        if len(self.faults.found) > before:
            raise UserError(f"task {name}: its scoring fails on its first record: {self.faults.found[before][:300]}")


def _undecoded(then: Callable[..., Any] | None) -> Callable[[Any], Any]:
    """A task's process_docs, on records whose sound is as it was stored.

    `datasets` decodes with torchcodec, which the CPU stack has not; training reads clips with soundfile.
    """

    def process(docs: Any) -> Any:
        for name, feature in docs.features.items():
            if isinstance(feature, datasets.Audio):
                docs = docs.cast_column(name, datasets.Audio(decode=False))
        return then(docs) if then else docs

    return process


def _cause(error: BaseException) -> BaseException:
    """What was retried in vain, where that is all an error says."""
    attempt = getattr(error, "last_attempt", None)
    return (attempt.exception() or error) if attempt is not None else error


def _leaves(found: dict[Any, Any]) -> dict[str, Task]:
    out: dict[str, Task] = {}
    for name, task in found.items():
        out |= _leaves(task) if isinstance(task, dict) else {name: task}
    return out
