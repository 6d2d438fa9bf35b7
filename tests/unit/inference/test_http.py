"""What a server named in a recipe must be, before anything else starts."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from opd.inference import client as opd_http
from opd.inference.client import Server
from opd.settings import UserError


@pytest.fixture
def answering() -> Iterator[dict[str, bytes]]:
    """A web server on loopback that answers every GET with `body`, None: 404."""
    content: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content.get("body")
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"<!DOCTYPE HTML>")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    content["url"] = f"http://127.0.0.1:{server.server_port}".encode()
    yield content
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("body", [None, b"<html>", b"[]", b'{"data": []}', b'{"data": [{"root": "m"}]}', b""])
def test_something_else_than_vllm(answering: dict[str, bytes], body: bytes | None) -> None:
    if body is not None:
        answering["body"] = body
    with pytest.raises(UserError, match=r"rollout.urls: http://127.0.0.1:\d+: answers, but not as a vLLM server does"):
        Server(answering["url"].decode(), 5).check_model("rollout.urls", "m", "m")


def test_the_right_and_the_wrong_model(answering: dict[str, bytes]) -> None:
    answering["body"] = json.dumps({"data": [{"root": "a/b", "max_model_len": 77}]}).encode()
    server = Server(answering["url"].decode(), 5)
    assert server.check_model("teacher.urls", "a/b", "a/b") == 77
    with pytest.raises(UserError, match="teacher.urls: .* serves a/b, the recipe names c; start it with that model"):
        server.check_model("teacher.urls", "c", "c")


def test_a_port_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opd_http, "ASK_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"rollout.urls: .*: no vLLM server answers there \(ReadTimeout\)"):
            Server(url, 300).check_model("rollout.urls", "m", "m")
    with pytest.raises(UserError, match="rollout.urls: 127.0.0.1:1: no vLLM server answers there"):
        Server("127.0.0.1:1", 300).check_model("rollout.urls", "m", "m")
