"""lmms-eval's scoring, watched: tried before anything is asked, guesses seeded and counted, faults collected.

Our endpoint judges in the place of its `openai` provider. lmms-eval's verifiers and tasks turn any Exception of a judge
into the score 0. A judge that fails here therefore raises what `except Exception` does not catch.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from lmms_eval.api.task import Task
from lmms_eval.llm_judge import ProviderFactory, Request, Response, ServerInterface
from lmms_eval.llm_judge.providers.openai import build_sampling_kwargs
from lmms_eval.tasks import TaskManager
from loguru import logger

from opd.endpoint import Failed, Unavailable
from opd.evaluate.benchmark.command import Benchmark, JudgeConfig
from opd.settings import UserError
from opd.storage.journal import canonical

DRAWS = 20  # of a guess, until the task can take it
PROBE = "A"  # an answer that every way of scoring takes
JUDGED = ("gpt", "judge", "semantic_match")  # in the names of metrics that an LLM gives


class JudgeFailed(BaseException):
    """No verdict: none is configured, it is down, or it refused. No Exception, see above."""


class Judge(ServerInterface):
    """Asks the endpoint of the benchmark file, whatever model a task names, and keeps what was asked and said."""

    config_of: JudgeConfig | None = None
    log = Path(os.devnull)
    asked = 0
    _lock = threading.Lock()

    def is_available(self) -> bool:
        """Always: what is missing is told when it is needed."""
        return True

    def evaluate(self, request: Request) -> Response:
        """The judge's reply. Raises JudgeFailed."""
        judge = type(self).config_of
        if judge is None:
            raise JudgeFailed("the task asks a judge, and the benchmark has none; name one: benchmark.judge={url: ...}")
        config = request.config or self.config
        body: dict[str, Any] = {"messages": self.prepare_messages(request), **build_sampling_kwargs(config)}
        try:
            said = judge.ask(lambda client: client.chat.completions.create(model=judge.model, **body))
            content = (said.choices[0].message.content or "").strip()
        except (Failed, Unavailable, IndexError, AttributeError) as e:
            raise JudgeFailed(f"judge: {e}") from e
        if not content:
            told = "replied with nothing; if it thinks, give it more tokens"
            raise JudgeFailed(f"judge: {judge.url}: {judge.model} {told}")
        cls = type(self)
        with cls._lock, open(cls.log, "a") as f:
            cls.asked += 1
            f.write(json.dumps({"asked": body["messages"], "said": content}, ensure_ascii=False) + "\n")
        return Response(content=content, model_used=judge.model)


def install_judge(judge: JudgeConfig | None, log: Path) -> None:
    """Make it the judge of every task. Before the first task is loaded: tasks read their environment then.

    A few tasks post to an address of the environment by themselves, and get the same one. Without a judge they get one
    where nothing listens: no task sends anything anywhere unasked.
    """
    log.unlink(missing_ok=True)
    Judge.config_of, Judge.log, Judge.asked = judge, log, 0
    ProviderFactory.register_provider("openai", Judge)
    url, model = (judge.url.rstrip("/"), judge.model) if judge else ("http://127.0.0.1:9", "none")
    key = os.environ.get(judge.key_env, "") if judge and judge.key_env else "none"
    os.environ |= {"API_TYPE": "openai", "OPENAI_API_KEY": key, "MODEL_VERSION": model, "JUDGE_MODEL_VERSION": model}
    os.environ |= {"OPENAI_API_URL": f"{url}/chat/completions", "OPENAI_BASE_URL": url}


class Faults(logging.Handler):
    """What lmms-eval logs as an error while it scores: it goes on with a 0 then."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.found.append(record.getMessage())

    def watch(self) -> None:
        """From now on; for the rest of the process."""
        logger.add(lambda message: self.found.append(message.record["message"]), level="ERROR")
        logging.getLogger("lmms_eval").addHandler(self)


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
            attempt = getattr(e, "last_attempt", None)  # what was retried in vain, where that is all an error says
            names, cause = ", ".join(self.benchmark.tasks), (attempt.exception() or e) if attempt is not None else e
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
            remedy = "name one, such as 'benchmark.judge={url: \"http://127.0.0.1:8000/v1\", model: NAME}'"
            raise UserError(f"task {name}: its {', '.join(judged)} needs a judge and the benchmark has none; {remedy}")
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


def _leaves(found: dict[Any, Any]) -> dict[str, Task]:
    out: dict[str, Task] = {}
    for name, task in found.items():
        out |= _leaves(task) if isinstance(task, dict) else {name: task}
    return out
