"""Checks that student and teacher mean the same by the same ids: tokenizers, chat templates, stop ids, banned ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from opd.config.needs import asks_teacher
from opd.doctor.checks import Facts, Warned
from opd.models.base import control_ids
from opd.settings import UserError
from opd.teachers.base import TEXTS, check_byte_level, check_tokenizers
from opd.types import BadAudio, Message, Prompt, joined, render

FIRST = 64  # records of the manifest, whose texts are put into ids
ASK: Message = {"role": "user", "content": [{"type": "text", "text": "What is 12 plus 3?"}]}
ANSWER, ASK_AGAIN = "Fifteen.", {"role": "user", "content": [{"type": "text", "text": "And 4 more?"}]}
IdsOf = Callable[[list[Message]], list[int]]


def tokenizers(facts: Facts) -> str:
    """The teacher has a tokenizer, which gives the same ids the same meaning, and the same ids to the same texts.

    With an objective for another tokenizer, that their texts can be aligned.
    """
    config, family = facts.config, facts.family
    if not asks_teacher(config):
        return "the student's alone"
    if config.teacher.about.weights == "student":
        facts.tokenizer = family.tokenizer
        return "the teacher is the student"
    path = facts.teacher
    try:
        facts.tokenizer = family.text_tokenizer(path)
    except (OSError, ValueError) as e:
        raise UserError(f"teacher.path {path}: no loadable tokenizer: {str(e).splitlines()[0]}") from e
    added = getattr(facts.tokenizer, "added_tokens_decoder", None)
    if len(facts.tokenizer) <= (len(added) if isinstance(added, dict) else 0):
        raise UserError(f"teacher.path {path}: expected tokenizer files such as tokenizer.json, found none")
    family.readers.append((facts.tokenizer, control_ids(facts.tokenizer)))
    if config.objective.about.other_tokenizer:
        check_byte_level(family, facts.tokenizer, path)
        return f"both are byte-level: objective {config.objective.name} aligns them"
    found = texts(facts)
    check_tokenizers(family, facts.tokenizer, path, found)
    return f"same tokens, and the same ids for {len(found)} texts"


def texts(facts: Facts) -> list[str]:
    """Ordinary texts: some of ours, then what the manifest's first records hold.

    Composed (NFC): one of two tokenizers with the same tokens may compose by itself, which changes no meaning.
    """
    records = facts.prompts.get("data.train", [])[:FIRST]
    return [*TEXTS, *(unicodedata.normalize("NFC", t) for p in records for t in (*_spoken(p), p.response) if t)]


def templates(facts: Facts) -> str:
    """The chat templates hold the text view and a generation prompt that a reply can follow."""
    both, other = sides(facts), facts.config.objective.about.other_tokenizer
    for name, tok, ids_of in both:
        end_of_turn(name, tok, ids_of)
    different = None
    records = facts.prompts["data.train"][:FIRST]
    for prompt in records:
        view = render(prompt, "text")
        try:
            read = [ids_of(view) for _, _, ids_of in both]
        except BadAudio:  # it spells a control token: a bad record, which the clips' check counts
            continue
        for (name, tok, _), ids in zip(both, read, strict=True):
            if lost := [t for t in _spoken(prompt) if _plain(t) not in _plain(tok.decode(ids))]:
                raise UserError(f"{prompt.place}: the {name}'s chat template loses the transcript {lost[0][:80]!r}")
        if different is None and read[0] != read[-1] and not other:
            different = difference(prompt, (both[0][1], read[0]), (both[-1][1], read[-1]))
    if different is not None:
        return Warned(f"transcripts, generation prompt and end of turn are there; {different}")
    alike = "" if other or len(both) == 1 else f"; {len(records)} text views alike in both"
    return f"transcripts, generation prompt and end of turn are there{alike}"


def difference(prompt: Prompt, student: tuple[Any, list[int]], teacher: tuple[Any, list[int]]) -> str:
    """Where the student's and the teacher's ids, each with its tokenizer, of a text view part, in words."""
    (_, ours), (_, theirs) = student, teacher
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [repr(tok.decode(ids[at : at + 8])) for tok, ids in (student, teacher)]
    told = f"the text view of {prompt.id} has {len(ours)} ids for the student and {len(theirs)} for the teacher"
    return f"{told}; they part at {at}: {shown[0]} and {shown[1]}"


def sides(facts: Facts) -> list[tuple[str, Any, IdsOf]]:
    """Student and teacher, if there is one: name, tokenizer, and ids of a chat of texts with the generation prompt."""
    family = facts.family
    found: list[tuple[str, Any, IdsOf]] = [("student", family.tokenizer, lambda chat: family.prompt_ids(chat, []))]
    if asks_teacher(facts.config) and facts.config.teacher.about.weights == "student":
        found.append(("teacher", facts.tokenizer, found[0][2]))
    elif asks_teacher(facts.config):
        found.append(("teacher", facts.tokenizer, lambda c: family.text_ids(facts.tokenizer, [joined(m) for m in c])))
    return found


def end_of_turn(name: str, tokenizer: Any, ids_of: IdsOf) -> int:
    """The id that a chat template puts behind an answer.

    Raises UserError when a chat with an answer does not begin as the prompt for it does, or nothing ends the answer.
    """
    what, prompt = f"the {name}'s chat template", ids_of([ASK])
    chat = ids_of([ASK, {"role": "assistant", "content": ANSWER}, ASK_AGAIN])
    if chat[: len(prompt)] != prompt:
        ends, read = tokenizer.decode(prompt[-12:]), tokenizer.decode(chat[: len(prompt)][-12:])
        raise UserError(f"{what}: a prompt ends in {ends!r}, yet an answered one reads {read!r} there")
    rest = chat[len(prompt) :]
    said = next((k for k in range(1, len(rest)) if tokenizer.decode(rest[:k]).strip().endswith(ANSWER)), None)
    behind = [i for i in rest[said:] if tokenizer.decode([i]).strip()] if said else []
    if not behind:
        raise UserError(f"{what}: no token ends the answer in {tokenizer.decode(chat)!r}")
    return behind[0]


def stop_ids(facts: Facts) -> str:
    """What ends the student's responses: known to both, allowed, and what both chat templates end a turn with."""
    family, both, path = facts.family, sides(facts), facts.student
    eos = [i for i in family.eos_ids if i is not None]
    if not eos:
        raise UserError(f"student.path {path}: neither generation_config.json nor its tokenizer names a stop id")
    other = facts.config.objective.about.other_tokenizer  # then the teacher's stop id is its tokenizer's own
    ours = names(family.tokenizer)
    theirs = ours if other else names(both[-1][1])
    shown = ", ".join(f"{i} {ours.get(i)!r}" for i in eos)
    for i in eos:
        if i not in ours or ours[i] != theirs.get(i):
            raise UserError(f"stop id {i} is {ours.get(i)!r} to the student and {theirs.get(i)!r} to the teacher")
    if banned := sorted(set(eos) & set(family.banned_ids)):
        raise UserError(f"stop id {banned[0]} {ours[banned[0]]!r} is banned: no response could end")
    ends = {name: end_of_turn(name, tokenizer, ids_of) for name, tokenizer, ids_of in both}
    for name, end in ends.items():
        if end not in ([facts.tokenizer.eos_token_id] if other and name == "teacher" else eos):
            found = f"ends a turn with {end} {ours.get(end)!r}, generation stops at {shown}"
            raise UserError(f"the {name}'s chat template {found}")
    return f"{shown}: " + ("both chat templates end turns so" if len(both) > 1 else "its chat template ends turns so")


def banned_ids(facts: Facts) -> str:
    """What may never be sampled: the placeholder and the padded rows at least, and nothing that texts are made of."""
    family = facts.family
    banned, names_of = set(family.banned_ids), names(family.tokenizer)
    if family.audio_id not in banned:
        raise UserError(f"the audio placeholder {family.audio_id} {names_of.get(family.audio_id)!r} is not banned")
    padded = range(len(family.tokenizer), family.vocab_size)
    if missing := [i for i in padded if i not in banned]:
        raise UserError(f"{len(missing)} padded rows of the vocabulary are not banned, such as {missing[0]}")
    for text in texts(facts):
        found = [i for i in family.tokenizer(text, add_special_tokens=False).input_ids if i in banned]
        if found and names_of.get(found[0], "") not in text:  # a record that spells a token has itself to blame
            raise UserError(f"{text[:80]!r} has the banned id {found[0]} {names_of.get(found[0])!r}")
    named = sorted(banned - set(padded))
    shown = ", ".join(f"{i} {names_of.get(i)!r}" for i in named[:8]) + (" ..." if len(named) > 8 else "")
    return f"{shown}; {len(padded)} padded rows"


def names(tokenizer: Any) -> dict[int, str]:
    """Token of each id."""
    return {i: t for t, i in tokenizer.get_vocab().items()}


def _spoken(prompt: Prompt) -> list[str]:
    """Transcripts of a prompt."""
    contents = [m["content"] for m in prompt.messages if not isinstance(m["content"], str)]
    return [part["transcript"] for content in contents for part in content if part["type"] == "audio"]


def _plain(text: str) -> str:
    """Letters as they are compared: templates may trim, tokenizers may compose."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
