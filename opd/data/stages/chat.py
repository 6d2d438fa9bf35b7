"""Stages that ask a chat model: `rewrite`, questions as one would say them, and `respond`, a teacher's answers."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from opd.data.engine.stage import ClipStore, Drop, Record, Stage, last_question
from opd.endpoint import Endpoint, Failed
from opd.types import Message, Prompt, joined, render

TEMPLATE = """\
Rewrite the request below as a person would say it aloud to a voice assistant. Keep its meaning, its language and \
every fact that is needed to answer it. Write numbers, symbols, units and abbreviations as they are spoken. No lists, \
headings, markup or quotation marks. Do not answer the request: give its spoken form and nothing else.

{text}"""
SPARE = 80  # characters that a rewritten question may always be longer: "3^5" has three, its spoken form many
QUOTES = {'"': '"', "“": "”", "'": "'"}  # that models like to put around what they were asked for


class ChatStage(Stage):
    """A stage whose records are made by an OpenAI-compatible /v1/chat/completions."""

    endpoint: Endpoint = Field(description="an OpenAI-compatible /v1/chat/completions, such as a local vLLM server")
    temperature: NonNegativeFloat = Field(0.0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: PositiveInt = Field(512, description="of an answer")
    seed: int = Field(0, description="of the sampling, together with the record's id")
    extra: dict[str, Any] = Field(
        {"top_k": 0, "repetition_penalty": 1.0},
        description="more fields of the request; these keep vLLM from the checkpoint's own; {} where they are refused",
    )

    def answer(self, messages: list[Message], id: str) -> tuple[str, bool]:
        """The model's answer to a chat of plain strings, and whether it was cut off at max_tokens.

        Raises Failed and Unavailable as Endpoint.ask does.
        """

        asked: dict[str, Any] = {"model": self.endpoint.model, "messages": messages, "extra_body": self.extra}
        asked |= {"temperature": self.temperature, "top_p": self.top_p, "max_completion_tokens": self.max_tokens}
        asked["seed"] = zlib.crc32(f"{self.seed}/{id}".encode()) & 0x7FFFFFFF

        def call(client: Any) -> tuple[Any, Any]:
            choice = client.chat.completions.create(**asked).choices[0]
            return choice.message.content, choice.finish_reason

        content, finish = self.endpoint.ask(call)
        if not isinstance(content, str) or finish not in ("stop", "length"):
            raise Failed(f"no answer: {self.endpoint.url}: content {str(content)[:60]!r}, finish_reason {finish!r}")
        return content, finish == "length"


class Rewrite(ChatStage):
    """Settings of the stage `rewrite`: each record's last question as one would say it."""

    name: ClassVar[str] = "rewrite"

    template: str = Field(TEMPLATE, description="what is asked; {text} stands for the question")
    longest: PositiveFloat = Field(2.0, description=f"times the characters of the question, and {SPARE} more, at most")

    @field_validator("template")
    @classmethod
    def _has_text(cls, template: str) -> str:
        if "{text}" not in template:
            raise ValueError("expected {text} in it, where the question goes")
        return template

    def one(self, store: ClipStore, record: Record) -> Record:
        """The record with its last question rewritten and the written form in `written`."""
        message, written = last_question(record)
        asked = [{"role": "user", "content": self.template.replace("{text}", written)}]
        text, truncated = self.answer(asked, record["id"])
        text = text.strip()
        if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and written[:1] != text[0]:
            text = text[1:-1].strip()
        if not text:
            raise Failed(f"empty answer: {self.endpoint.url}")
        if truncated:
            raise Drop(f"rewritten too long: {self.max_tokens} tokens and no end")
        if len(text) > self.longest * len(written) + SPARE:
            raise Drop(f"rewritten too long: {len(text)} characters for {len(written)}")
        message["content"] = text
        return record | {"written": record.get("written", written)}


class Respond(ChatStage):
    """Settings of the stage `respond`: the teacher's own answer to each record's transcript, for a warm start."""

    name: ClassVar[str] = "respond"

    truncated: Literal["drop", "keep"] = Field("drop", description="an answer that max_tokens cut off")

    def one(self, store: ClipStore, record: Record) -> Record:
        """The record with `response`.

        The teacher reads the text view, its parts joined as a local teacher joins them, so the server's chat template
        makes the prompt that a teacher of a run reads.
        """
        if record["messages"][-1]["role"] != "user":
            raise Drop("no question: the chat ends with another turn than the user's")
        prompt = Prompt(id=record["id"], messages=tuple(record["messages"]))
        text, truncated = self.answer([joined(m) for m in render(prompt, "text")], prompt.id)
        if not text.strip():
            raise Drop("empty answer")
        if truncated and self.truncated == "drop":
            raise Drop(f"answer truncated: {self.max_tokens} tokens and no end")
        return record | {"response": text}
