"""The two views of a prompt: what the student hears and what the teacher reads."""

from __future__ import annotations

from typing import Any

from opd.types import Message, Prompt, View


def render(prompt: Prompt, view: View) -> list[Message]:
    """Chat messages of one view.

    The speech view keeps every audio part (without its transcript: the student must hear it, not read it); the text
    view puts a text part with the transcript in its place. Everything else is identical.
    """
    return [{**m, "content": _content(m["content"], view)} for m in prompt.messages]


def audio_paths(prompt: Prompt) -> list[str]:
    """Paths of a prompt's audio parts, in the order in which they are heard."""
    return [part["path"] for part in _audio_parts(prompt)]


def transcript(prompt: Prompt) -> str:
    """The whole prompt as readable text, for logs and samples."""
    lines = []
    for m in render(prompt, "text"):
        text = m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"])
        lines.append(f"{m['role']}: {text}")
    return "\n".join(lines)


def joined(message: Message) -> Message:
    """Text templates of many LLMs take strings only: join the text parts."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(p["text"] for p in content)}


def _audio_parts(prompt: Prompt) -> list[dict[str, Any]]:
    contents = [m["content"] for m in prompt.messages if not isinstance(m["content"], str)]
    return [part for content in contents for part in content if part["type"] == "audio"]


def _content(content: Any, view: View) -> Any:
    if isinstance(content, str):
        return content
    return [_part(part, view) for part in content]


def _part(part: dict[str, Any], view: View) -> dict[str, Any]:
    if part["type"] != "audio":
        return part
    if view == "speech":
        return {"type": "audio", "path": part["path"]}
    return {"type": "text", "text": part["transcript"]}
