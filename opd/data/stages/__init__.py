"""The stages of `opd data`: which there are, in the order in which a recipe runs them, and what each does."""

import importlib
from typing import NamedTuple

from opd.data.engine.stage import Stage


class Listed(NamedTuple):
    """A stage: module:class, and what it does."""

    of: str
    does: str
    in_recipes: bool = True


STAGES = {
    "prompts": Listed("opd.data.stages.prompts:Prompts", "questions to speak, from chats, instructions or plain text"),
    "rewrite": Listed("opd.data.stages.rewrite:Rewrite", "questions as one would say them, by a chat model"),
    "speak": Listed(
        "opd.data.stages.speak:Speak", "speak the questions, by espeak-ng or an OpenAI-compatible endpoint"
    ),
    "natural": Listed("opd.data.stages.natural:Natural", "spoken prompts from recordings that have transcripts"),
    "verify": Listed(
        "opd.data.stages.verify:Verify", "leave out clips in which a speech recogniser hears something else"
    ),
    "respond": Listed("opd.data.stages.respond:Respond", "the teacher's own answers to the transcripts"),
    "benchmark": Listed(
        "opd.data.stages.benchmark:LoadBenchmark", "a public benchmark of speech, for `opd eval`", in_recipes=False
    ),
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage, imported when it is asked for."""
    module, _, of = STAGES[name].of.partition(":")
    return getattr(importlib.import_module(module), of)
