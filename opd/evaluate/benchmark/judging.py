"""The judge of lmms-eval's tasks: our endpoint in the place of its `openai` provider, so that no failure becomes a 0.

lmms-eval's verifiers and tasks turn any Exception of a judge into the score 0. A judge that fails here therefore raises
what `except Exception` does not catch.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from lmms_eval.llm_judge import ProviderFactory, Request, Response, ServerInterface
from lmms_eval.llm_judge.providers.openai import build_sampling_kwargs

from opd.endpoint import Failed, Unavailable
from opd.evaluate.benchmark.settings import JudgeConfig


class JudgeFailed(BaseException):
    """No verdict: none is configured, it is down, or it refused. No Exception, see above."""


class Judge(ServerInterface):
    """Asks the endpoint of the benchmark file, whatever model a task names, and keeps what was asked and said."""

    config_of: JudgeConfig | None = None
    log: Path | None = None
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
            raise JudgeFailed(
                f"judge: {judge.url}: {judge.model} replied with nothing; if it thinks, give it more tokens"
            )
        self._keep(body["messages"], content)
        return Response(content=content, model_used=judge.model)

    def _keep(self, messages: list[dict[str, Any]], content: str) -> None:
        cls = type(self)
        with cls._lock:
            cls.asked += 1
            if cls.log is not None:
                with open(cls.log, "a") as f:
                    f.write(json.dumps({"asked": messages, "said": content}, ensure_ascii=False) + "\n")


def install(judge: JudgeConfig | None, log: Path) -> None:
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
