"""Whether two tokenizers mean the same by their ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from opd.models.base import Family
from opd.settings import UserError


def check_byte_level(family: Family, teacher: Any, path: str) -> None:
    """Refuse a pair of tokenizers that cannot be aligned by bytes."""
    for setting, tokenizer in ((f"student.path {family.path}", family.tokenizer), (f"teacher.path {path}", teacher)):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not trl_module("utils").is_byte_level_tokenizer(backend):
            raise UserError(
                f"{setting}: objective.name uld needs byte-level BPE tokenizers, found {type(tokenizer).__name__}; "
                "choose another teacher, or one with the student's tokenizer for another objective"
            )
    if teacher.eos_token_id is None:
        raise UserError(f"teacher.path {path}: its tokenizer names no eos_token, which would end an answer")


def trl_module(name: str) -> Any:
    """A module of trl.experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of vLLM's version, which nothing here asks
        return import_module(f"trl.experimental.{name}")


TEXTS = (
    *("What is 12 plus 3? It's fifteen.", "1 234 567.89 and 10%, 3/4, 2e-5", "  spaces at both ends  "),
    *("Zürich, Привет, 你好, नमस्ते 🎧", "one line\nand another\n\n\tand a tab", "<b>no token</b> #1"),
)


def check_tokenizers(family: Family, teacher: Any, teacher_path: str, texts: Iterable[str] = TEXTS) -> None:
    """Refuse a teacher whose tokenizer gives any shared id another meaning, or other ids to any of the texts.

    The differing tokens are named. Ids that only the student has must be the audio-only ones, which are banned.
    """
    ours = {i: t for t, i in family.tokenizer.get_vocab().items()}
    theirs = {i: t for t, i in teacher.get_vocab().items()}
    banned = set(family.banned_ids)
    wrong = [i for i in sorted(ours.keys() | theirs.keys()) if i not in banned and ours.get(i) != theirs.get(i)]
    if wrong:
        shown = ", ".join(f"{i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in wrong[:5])
        raise UserError(
            f"teacher.path {teacher_path}: its tokenizer differs from the student's in {len(wrong)} ids "
            f"(id: student / teacher): {shown}; choose a teacher with the student's tokenizer, or objective.name=uld"
        )
    for text in texts:
        a, b = (t(text, add_special_tokens=False).input_ids for t in (family.tokenizer, teacher))
        if a != b:
            raise UserError(f"teacher.path {teacher_path}: same vocabulary, but {text[:80]!r} becomes {b}, not {a}")
