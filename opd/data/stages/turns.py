"""The turns of a record that stages read and change."""

from __future__ import annotations

from typing import Any, NamedTuple

from opd.data.engine.stage import Drop, Record
from opd.types import joined


class Question(NamedTuple):
    """The last user turn of a record: the message itself, to be changed in place, and its text."""

    message: dict[str, Any]
    text: str


def last_question(record: Record) -> Question:
    """The last user turn, which must be text. Raises Drop where there is none, it is empty, or it holds audio."""
    message = next((m for m in reversed(record["messages"]) if m["role"] == "user"), None)
    if message is None:
        raise Drop("no user turn")
    if any(part["type"] != "text" for part in message["content"] if isinstance(part, dict)):
        raise Drop("spoken already")
    text = joined(message)["content"].strip()
    if not text:
        raise Drop("empty")
    return Question(message, text)
