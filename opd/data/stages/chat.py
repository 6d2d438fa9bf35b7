"""Stages that ask a chat model."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveInt

from opd.data.engine.stage import Stage
from opd.endpoint import Endpoint, Failed
from opd.types import Message


class Answer(NamedTuple):
    """What the model wrote, and whether it was cut off at max_tokens."""

    text: str
    truncated: bool


class ChatStage(Stage):
    """A stage whose records are made by an OpenAI-compatible /v1/chat/completions."""

    workers: ClassVar[Literal["process", "thread"]] = "thread"

    endpoint: Endpoint = Field(description="an OpenAI-compatible /v1/chat/completions, such as a local vLLM server")
    temperature: NonNegativeFloat = Field(0.0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    max_tokens: PositiveInt = Field(512, description="of an answer")
    seed: int = Field(0, description="of the sampling, together with the record's id")
    extra: dict[str, Any] = Field(
        {"top_k": 0, "repetition_penalty": 1.0},
        description="more fields of the request; these keep vLLM from the checkpoint's own; {} where they are refused",
    )

    def check(self) -> None:
        """Raises UserError for an endpoint that cannot be one."""
        self.endpoint.check("endpoint")

    def answer(self, messages: list[Message], id: str) -> Answer:
        """The model's answer to a chat of plain strings. Raises Failed and Unavailable as Endpoint.ask does."""

        def call(client: Any) -> tuple[Any, Any]:
            choice = client.chat.completions.create(
                model=self.endpoint.model,
                messages=messages,
                temperature=self.temperature,
                top_p=self.top_p,
                max_completion_tokens=self.max_tokens,
                seed=zlib.crc32(f"{self.seed}/{id}".encode()) & 0x7FFFFFFF,
                extra_body=self.extra,
            ).choices[0]
            return choice.message.content, choice.finish_reason

        content, finish = self.endpoint.ask(call)
        if not isinstance(content, str) or finish not in ("stop", "length"):
            raise Failed(f"no answer: {self.endpoint.url}: content {str(content)[:60]!r}, finish_reason {finish!r}")
        return Answer(content, finish == "length")
