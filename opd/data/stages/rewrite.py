"""Stage `rewrite`: each record's last question as one would say it, by a chat model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveFloat, field_validator

from opd.data.engine.clip_store import ClipStore
from opd.data.engine.stage import Drop, Record, Work
from opd.data.stages.chat import ChatStage
from opd.data.stages.turns import last_question
from opd.endpoint import Failed

TEMPLATE = """\
Rewrite the request below as a person would say it aloud to a voice assistant. Keep its meaning, its language and \
every fact that is needed to answer it. Write numbers, symbols, units and abbreviations as they are spoken. No lists, \
headings, markup or quotation marks. Do not answer the request: give its spoken form and nothing else.

{text}"""
SPARE = 80  # characters that a rewritten question may always be longer: "3^5" has three, its spoken form many
QUOTES = {'"': '"', "“": "”", "'": "'"}


class Rewrite(ChatStage):
    """Settings of the stage `rewrite`."""

    name: ClassVar[str] = "rewrite"

    template: str = Field(TEMPLATE, description="what is asked; {text} stands for the question")
    longest: PositiveFloat = Field(2.0, description=f"times the characters of the question, and {SPARE} more, at most")

    @field_validator("template")
    @classmethod
    def _has_text(cls, template: str) -> str:
        if "{text}" not in template:
            raise ValueError("expected {text} in it, where the question goes")
        return template

    def begin(self, store: ClipStore) -> Work:
        """Record -> the same with its last question rewritten and the written form in `written`."""

        def work(record: Record) -> Record:
            question = last_question(record)
            asked = [{"role": "user", "content": self.template.replace("{text}", question.text)}]
            text, truncated = self.answer(asked, record["id"])
            text = _unquoted(text.strip(), question.text)
            if not text:
                raise Failed(f"empty answer: {self.endpoint.url}")
            if truncated:
                raise Drop(f"rewritten too long: {self.max_tokens} tokens and no end")
            if len(text) > self.longest * len(question.text) + SPARE:
                raise Drop(f"rewritten too long: {len(text)} characters for {len(question.text)}")
            question.message["content"] = text
            return record | {"written": record.get("written", question.text)}

        return work


def _unquoted(text: str, written: str) -> str:
    """Without the quotation marks that models like to put around what they were asked for."""
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and written[:1] != text[0]:
        return text[1:-1].strip()
    return text
