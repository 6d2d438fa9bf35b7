"""An OpenAI-compatible server on loopback that answers as it is told: well, slowly, with nonsense, or not at all."""

from __future__ import annotations

import email
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile


@dataclass
class Call:
    """One request: a JSON body, or the fields of a form (a file as bytes)."""

    path: str
    body: dict[str, Any]
    key: str  # of the API


@dataclass
class Reply:
    """What to send; `cut`: only so many bytes of it, then the connection is closed."""

    content: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None


class FakeOpenAI:
    """`answer` makes the reply to each call; what is queued in `first` goes before."""

    def __init__(self, answer: Callable[[Call], Reply], *first: Reply) -> None:
        self.answer, self.first = answer, list(first)
        self.calls: list[Call] = []
        self.url = ""
        self._lock = threading.Lock()

    def reply(self, call: Call) -> Reply:
        with self._lock:
            self.calls.append(call)
            if self.first:
                return self.first.pop(0)
        return self.answer(call)


@contextmanager
def serving(fake: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """The fake at its URL until the block ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            call = Call(self.path, _body(self.headers["Content-Type"], raw), self.headers.get("Authorization", ""))
            reply = fake.reply(call)
            time.sleep(reply.delay)
            binary = isinstance(reply.content, bytes)
            content = reply.content if binary else json.dumps(reply.content).encode()
            try:
                self.send_response(reply.status)
                kind = "application/octet-stream" if binary else "application/json"
                for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content if reply.cut is None else content[: reply.cut])
            except OSError:  # the client did not wait
                self.close_connection = True
            self.close_connection |= reply.cut is not None

        def log_message(self, *_: Any) -> None:
            """Be quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def _body(kind: str, raw: bytes) -> dict[str, Any]:
    if not kind.startswith("multipart/"):
        return json.loads(raw)
    form = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
    fields: dict[str, Any] = {}
    for part in form.get_payload():
        value = part.get_payload(decode=True)
        fields[part.get_param("name", header="content-disposition")] = value if part.get_filename() else value.decode()
    return fields


def said(text: str | None, finish: str = "stop") -> Reply:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    return Reply({"choices": [{"index": 0, "message": message, "finish_reason": finish}]})


def tone(seconds: float, rate: int = 24000, channels: int = 2, level: float = 0.5) -> bytes:
    """A WAV file with a sine of 440 Hz."""
    wave = level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave] * channels, 1), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()
