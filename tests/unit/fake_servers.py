"""A web server on loopback where a vLLM server would be: records what it is asked, answers as it is told."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


class FakeServer:
    """`calls` holds (path with query, body) in order; `failing` and `hanging` are paths that fail or wait."""

    def __init__(self, world_size: int = 1) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.version, self.world_size, self.delay = "default", world_size, 0.0
        self.failing: set[str] = set()
        self.hanging: dict[str, threading.Event] = {}
        self.url = ""

    @property
    def paths(self) -> list[str]:
        """Paths of all calls."""
        return [path for path, _ in self.calls]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of one request."""
        self.calls.append((path, body))
        at = urlsplit(path).path
        if at in self.hanging:
            self.hanging[at].wait()
        if at in self.failing:
            return 500, {"error": "broken"}
        if at == "/finish_weight_update":
            self.version = body["weight_version"]
        if at in ("/v1/chat/completions", "/v1/completions"):
            time.sleep(self.delay)
        return 200, {"weight_version": self.version, "world_size": self.world_size, "asked": body}


@contextmanager
def serving(*servers: FakeServer) -> Iterator[list[str]]:
    """URLs of fakes that answer until the block ends."""
    started = [_start(s) for s in servers]
    try:
        yield [s.url for s in servers]
    finally:
        for fake, server in zip(servers, started, strict=True):
            for event in fake.hanging.values():
                event.set()
            server.shutdown()
            server.server_close()


def _start(fake: FakeServer) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = fake.answer(self.command, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    return server
