"""Stage `respond`: the teacher's own answer to each record's transcript, for a warm start."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from opd.data.engine.clip_store import ClipStore
from opd.data.engine.stage import Drop, Record, Work
from opd.data.stages.chat import ChatStage
from opd.types import Prompt, joined, render


class Respond(ChatStage):
    """Settings of the stage `respond`."""

    name: ClassVar[str] = "respond"

    truncated: Literal["drop", "keep"] = Field("drop", description="an answer that max_tokens cut off")

    def begin(self, store: ClipStore) -> Work:
        """Record -> the same with `response`.

        The teacher reads the text view, its parts joined as a local teacher joins them, so the server's chat template
        makes the prompt that a teacher of a run reads.
        """

        def work(record: Record) -> Record:
            if record["messages"][-1]["role"] != "user":
                raise Drop("no question: the chat ends with another turn than the user's")
            prompt = Prompt(id=record["id"], messages=tuple(record["messages"]))
            text, truncated = self.answer([joined(m) for m in render(prompt, "text")], prompt.id)
            if not text.strip():
                raise Drop("empty answer")
            if truncated and self.truncated == "drop":
                raise Drop(f"answer truncated: {self.max_tokens} tokens and no end")
            return record | {"response": text}

        return work
