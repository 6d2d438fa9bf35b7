"""OpenAI-compatible endpoints: retries, and errors that say whether one record or the endpoint is at fault."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt

from opd.settings import Fatal, Section, T, UserError


class Endpoint(Section):
    """Where an OpenAI-compatible server is, and how patiently it is asked."""

    elsewhere: ClassVar[tuple[str, ...]] = ("url", "key_env", "timeout_s", "retries")

    url: str = Field(description="base URL, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="name of the model there")
    key_env: str | None = Field(None, description="environment variable that holds the API key; none: no key")
    timeout_s: PositiveFloat = Field(120.0, description="for one answer")
    retries: PositiveInt = Field(4, description="after a refused connection, a time-out, HTTP 408, 409, 429 or 5xx")

    def check(self, setting: str) -> None:
        """Raise UserError, naming the setting, unless the URL is one and the key is there."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{setting}.url: expected http://HOST[:PORT]/v1 or https://…, found {self.url!r}")
        if self.key_env and not os.environ.get(self.key_env):
            raise UserError(f"{setting}.key_env: the environment variable {self.key_env} is not set")

    @cached_property
    def client(self) -> Any:
        """The `openai` client, which retries with growing pauses and heeds Retry-After."""
        import openai

        key = os.environ.get(self.key_env, "") if self.key_env else "none"
        http = openai.DefaultHttpxClient(trust_env=not self._own)
        return openai.OpenAI(
            base_url=self.url, api_key=key, timeout=self.timeout_s, max_retries=self.retries, http_client=http
        )

    def reach(self) -> None:
        """Raises Unavailable where nobody listens; whatever is answered is left to the first question."""
        import httpx

        try:
            httpx.get(self.url, timeout=min(self.timeout_s, 10.0), trust_env=not self._own)
        except httpx.ConnectError as e:
            raise Unavailable(f"{self.url}: cannot be reached ({e})") from e
        except httpx.HTTPError:
            pass

    @property
    def _own(self) -> bool:
        """Whether it is this machine, for which no proxy is asked."""
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    def ask(self, call: Callable[[Any], T]) -> T:
        """What `call` gives for the client.

        Raises Unavailable when the endpoint is down, too slow or refuses everything (no such model, wrong key), and
        Failed when it refuses this request or its answer makes no sense.
        """
        import openai

        try:
            return call(self.client)
        except openai.APITimeoutError as e:
            raise Unavailable(f"{self.url}: no answer in {self.timeout_s:g} s, {self.retries + 1} times") from e
        except openai.APIConnectionError as e:
            raise Unavailable(f"{self.url}: cannot be reached ({e.__cause__ or e})") from e
        except openai.APIStatusError as e:
            told = f"{self.url}: HTTP {e.status_code}: {' '.join(e.message.split())[:200]}"
            if e.status_code in (401, 403, 404, 408, 409, 429) or e.status_code >= 500:
                raise Unavailable(told) from e
            raise Failed(f"refused: {told}") from e
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError, KeyError) as e:
            raise Failed(f"nonsense: {self.url}: {type(e).__name__}: {e}"[:300]) from e


class Failed(Exception):
    """This record could not be made this time, as when an endpoint answers nonsense: the next run tries it again."""


class Unavailable(Fatal):
    """Nothing more can be made for now, as when an endpoint is down: what is done is kept, the next run goes on."""
