"""The stages of `opd data`: which there are, in the order in which a recipe runs them, and what each does."""

import importlib
from typing import NamedTuple

from opd.data.engine.stage import Stage


class Listed(NamedTuple):
    """A stage, by its class in the module of its name."""

    of: str
    does: str
    in_recipes: bool = True


STAGES = {
    "prompts": Listed("Prompts", "questions to speak, from chats, instructions or plain text"),
    "rewrite": Listed("Rewrite", "questions as one would say them, by a chat model"),
    "speak": Listed("Speak", "speak the questions, by espeak-ng or an OpenAI-compatible endpoint"),
    "natural": Listed("Natural", "spoken prompts from recordings that have transcripts"),
    "verify": Listed("Verify", "leave out clips in which a speech recogniser hears something else"),
    "respond": Listed("Respond", "the teacher's own answers to the transcripts"),
    "benchmark": Listed("LoadBenchmark", "a public benchmark of speech, for `opd eval`", in_recipes=False),
}


def stage_class(name: str) -> type[Stage]:
    """The class of a stage, imported when it is asked for."""
    return getattr(importlib.import_module(f"opd.data.stages.{name}"), STAGES[name].of)
