"""HTTP to vLLM servers: one client per server, deliberate retries, errors that name the server."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from opd.settings import T, UserError

TLS = ssl.create_default_context()  # made once: it reads every root certificate, 40 ms
REACH: dict[str, Any] = {"verify": TLS, "trust_env": False, "retries": 2}  # of a request that never reached the server
ASK_S = 20.0  # for a server to say what it holds


class ServerError(RuntimeError):
    """A server failed or answered nonsense in mid-run; the message names its URL and the request."""


class Server:
    """One vLLM server. Blocking calls for control, an async one for many requests at a time."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        # A kept connection that the server closes while the learner works would fail the next request.
        transport = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0), **REACH)
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, transport=transport, trust_env=False)

    def get(self, path: str) -> Any:
        """GET `path`; parsed JSON."""
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST `body` to `path`; parsed JSON, None for an empty answer."""
        return self._ask("POST", path, json=body)

    def check_model(self, key: str, path: str, wanted: str) -> int:
        """How many ids it takes, once it is clear that it holds the model at `path`.

        Raises UserError, naming the setting `key` and the model `wanted` by the recipe, when it holds another or is out
        of reach.
        """
        where = f"{key}: {self.url}"
        try:
            found = parse(self._client.get("/v1/models", timeout=min(ASK_S, self.timeout_s)), self.url)["data"][0]
            root, max_model_len = found["root"], found["max_model_len"]
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            remedy = "start it, mend the URL in the recipe, or leave the list empty and let `opd launch` start one"
            raise UserError(f"{where}: no vLLM server answers there ({type(e).__name__}); {remedy}") from e
        except (ServerError, KeyError, IndexError, TypeError) as e:
            raise UserError(f"{where}: answers, but not as a vLLM server does: /v1/models names no model") from e
        if root != path and Path(root).resolve() != Path(path).resolve():
            raise UserError(f"{where} serves {root}, the recipe names {wanted}; start it with that model")
        return max_model_len

    def _ask(self, method: str, path: str, **kwargs: Any) -> Any:
        try:
            return parse(self._client.request(method, path, **kwargs), self.url + path)
        except httpx.HTTPError as e:
            raise _failed(self.url + path, e, self.timeout_s) from e


def _failed(where: str, e: httpx.HTTPError, timeout_s: float) -> ServerError:
    if isinstance(e, httpx.ConnectError):
        return ServerError(f"{where}: the server is gone ({e})")
    return ServerError(f"{where}: {type(e).__name__} after up to {timeout_s:g} s")


def healthy(url: str) -> bool:
    """Whether a vLLM server is up and ready at `url`."""
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def parse(response: httpx.Response, where: str) -> Any:
    """JSON of a successful answer (None when empty); ServerError names `where` otherwise."""
    if response.status_code >= 400:
        raise ServerError(f"{where}: HTTP {response.status_code}: {response.text[:400]}")
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError as e:
        raise ServerError(f"{where}: expected JSON, found {response.text[:80]!r}") from e


class Request(NamedTuple):
    """One of many POST requests that any of several servers may answer."""

    path: str
    body: dict[str, Any]
    tokens: int  # that it may keep a server busy with: of its prompt and of all its answers


class Answer(NamedTuple):
    """What came back, and from which server."""

    url: str
    content: Any


class Load:
    """Outstanding tokens of each of `count` servers. Equals take turns, beginning with number `first`."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.tokens, self._turn = [0] * count, first

    def take(self, tokens: int) -> int:
        """The server with the fewest outstanding tokens, which then has these too."""
        count = len(self.tokens)
        chosen = min(((self._turn + k) % count for k in range(count)), key=self.tokens.__getitem__)
        self._turn = chosen + 1
        self.tokens[chosen] += tokens
        return chosen

    def give_back(self, server: int, tokens: int) -> None:
        """These tokens are outstanding no more."""
        self.tokens[server] -= tokens


def post_all(
    urls: Sequence[str], requests: Sequence[Request], concurrency: int, timeout_s: float, first: int = 0
) -> list[Answer]:
    """POST requests to servers of one kind, at most `concurrency` in flight; answers in the order of the requests.

    Each goes, when its turn comes, to the server with the fewest outstanding tokens; of equals `first` begins. The
    first failure cancels the rest and travels as ServerError.
    """
    load, limits = Load(len(urls), first), httpx.Limits(max_connections=concurrency)

    async def one(request: Request, client: httpx.AsyncClient, gate: asyncio.Semaphore) -> Answer:
        async with gate:
            server = load.take(request.tokens)
            where = urls[server].rstrip("/") + request.path
            try:
                return Answer(urls[server], parse(await client.post(where, json=request.body), where))
            except httpx.HTTPError as e:
                raise _failed(where, e, timeout_s) from e
            finally:
                load.give_back(server, request.tokens)

    async def run() -> list[Answer]:
        gate, transport = asyncio.Semaphore(concurrency), httpx.AsyncHTTPTransport(limits=limits, **REACH)
        async with httpx.AsyncClient(timeout=timeout_s, transport=transport, trust_env=False) as client:
            calls = [asyncio.ensure_future(one(r, client, gate)) for r in requests]
            try:
                return await asyncio.gather(*calls)
            finally:
                for c in calls:
                    c.cancel()

    return asyncio.run(run())


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Results of blocking calls that are made at once, each in a thread; in their order.

    The first failure travels at once and the other calls are left to themselves: the peers of a collective that has
    lost a member may never return.
    """
    if len(calls) == 1:
        return [calls[0]()]
    results: list[Future[T]] = [Future() for _ in calls]

    def run(call: Callable[[], T], result: Future[T]) -> None:
        try:
            result.set_result(call())
        except BaseException as e:  # noqa: BLE001 - raised again below
            result.set_exception(e)

    for pair in zip(calls, results, strict=True):
        threading.Thread(target=run, args=pair, daemon=True).start()  # an executor's threads would be waited for
    ended, _ = wait(results, return_when=FIRST_EXCEPTION)
    for result in ended:
        result.result()  # raises what failed
    return [result.result() for result in results]


def on_each(servers: Sequence[Server], action: Callable[[Server], T]) -> list[T]:
    """What `action` gives for each server, all at once."""
    return together([partial(action, server) for server in servers])


BAN = -100.0  # the strongest logit bias that the API allows


def given(entries: list[dict[str, Any] | None] | None, ids: list[int], last: int, who: str) -> np.ndarray:
    """[T] log-probs of the `last` T of a prompt's ids, from a server's prompt log-probs. Raises ServerError."""
    found = entries or []
    if len(found) != len(ids):
        raise ServerError(f"{who}: expected {len(ids)} prompt log-probs, found {len(found)}")
    told = list(zip(found, ids, strict=True))[len(ids) - last :]
    return np.array([(e or {})[str(y)]["logprob"] for e, y in told], np.float32)
