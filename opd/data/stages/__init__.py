"""The stages of `opd data`: which there are, in the order in which a recipe runs them, and what each does."""

import importlib
from typing import NamedTuple

from opd.data.engine.stage import Stage


class Listed(NamedTuple):
    """A stage: module:class, the module's name relative to this package, and what it does."""

    of: str
    does: str
    in_recipes: bool = True


STAGES = {
    "prompts": Listed(".prompts:Prompts", "questions to speak, from chats, instructions or plain text"),
    "rewrite": Listed(".chat:Rewrite", "questions as one would say them, by a chat model"),
    "speak": Listed(".speak:Speak", "speak the questions, by espeak-ng or an OpenAI-compatible endpoint"),
    "natural": Listed(".natural:Natural", "spoken prompts from recordings that have transcripts"),
    "verify": Listed(".verify:Verify", "leave out clips in which a speech recogniser hears something else"),
    "respond": Listed(".chat:Respond", "the teacher's own answers to the transcripts"),
    "benchmark": Listed(".benchmark:LoadBenchmark", "a public benchmark of speech, for `opd eval`", in_recipes=False),
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage, imported when it is asked for."""
    module, _, of = STAGES[name].of.partition(":")
    return getattr(importlib.import_module(module, __package__), of)
