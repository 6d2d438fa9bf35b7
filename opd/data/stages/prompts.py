"""Stage `prompts`: questions to speak, from chats, instructions or plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from opd.data.engine.stage import ClipStore, Drop, Record, Stage, content_id
from opd.scoring.words import CONTROL, normal, word_count
from opd.settings import UserError, plain_text, text_lines
from opd.types import Message


class Columns(NamedTuple):
    """Where a data set keeps things; none: nowhere."""

    prompt: str | None = None
    more: str | None = None  # what an instruction is about
    chat: str | None = None  # messages, instead of a prompt
    system: str | None = None
    response: str | None = None
    answer: str | None = None
    group: str | None = None
    id: str | None = None


PERMUTATIONS = 128
RECALL = 0.995  # of the pairs that are just similar enough
# Columns as the data sets' cards give them.
MAPPINGS = {
    "chat": Columns(chat="messages", id="id"),
    "sharegpt": Columns(chat="conversations", id="id"),
    "instruction": Columns("instruction", "input", response="output"),
    "text": Columns("text"),
    "tulu3": Columns(chat="messages", group="source", id="id"),  # allenai/tulu-3-sft-mixture
    "natural_reasoning": Columns("question", answer="reference_answer"),  # facebook/natural_reasoning
    "openorca": Columns("question", system="system_prompt", response="response", id="id"),  # Open-Orca/OpenOrca
}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class Prompts(Stage):
    """Settings of the stage `prompts`."""

    name: ClassVar[str] = "prompts"
    raw: ClassVar[bool] = True

    mapping: Literal["chat", "sharegpt", "instruction", "text", "tulu3", "natural_reasoning", "openorca"] = Field(
        "chat", description="which columns hold what"
    )
    columns: dict[str, str] = Field(
        {}, description="changes: {prompt|more|chat|system|response|answer|group|id: column}"
    )
    turns: Literal["first", "all"] = Field("first", description="of a chat: its first question, or up to its last one")
    keep_response: bool = Field(True, description="the data set's own answer becomes `response`")
    min_words: NonNegativeInt = Field(
        2, description="of the question; without spaces, two letters (Thai: four) are one"
    )
    max_words: PositiveInt = Field(60, description="of the question; a hundred take about 40 s to say")
    languages: list[str] = Field([], description="ISO 639-1 codes; none: any")
    duplicates: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity (3-word shingles) from which on what is asked is left out"
    )

    @model_validator(mode="after")
    def _known(self) -> Prompts:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words: expected at most max_words ({self.max_words}), found {self.min_words}")
        if unknown := [k for k in self.columns if k not in Columns._fields]:
            raise ValueError(f"columns: unknown {unknown[0]} (known: {', '.join(Columns._fields)})")
        return self

    def rows(self, source: str) -> Iterator[tuple[str, Any]]:
        """As of any stage; of a .txt file its lines, in the column `text`."""
        if not source.endswith(".txt") or source.startswith("hub:"):
            return super().rows(source)
        return ((at, {"text": line} if isinstance(line, str) else line) for at, line in text_lines(source))

    def check(self) -> None:
        """Raises UserError for a language that cannot be told."""
        if self.languages:
            import py3langid

            known = sorted({code for code, _ in py3langid.rank("")})
            if unknown := [code for code in self.languages if code not in known]:
                raise UserError(f"languages: cannot tell {unknown[0]!r}; known: {', '.join(known)}")

    def one(self, store: ClipStore, row: Record) -> Record:
        """Row -> {"id", "messages", ...}."""
        columns = MAPPINGS[self.mapping]._replace(**self.columns)
        messages, response = _chat(row, columns, self.turns) if columns.chat else _single(row, columns)
        question = messages[-1]["content"]
        words = word_count(question)
        if words < self.min_words:
            raise Drop(f"too short: {words} words")
        if words > self.max_words:
            raise Drop(f"too long: {words} words")
        if found := CONTROL.search("\n".join(m["content"] for m in messages)):
            raise Drop(f"a control token: {found[0]}")
        if self.languages:
            import py3langid

            if (code := py3langid.classify(question)[0]) not in self.languages:
                raise Drop(f"another language: {code}")
        record: Record = {"messages": messages}
        if response and self.keep_response:
            record["response"] = response
        record |= {key: text for key in ("answer", "group") if (text := _text(row, getattr(columns, key)))}
        return {"id": _text(row, columns.id) or content_id(record)} | record

    def chosen(self) -> Callable[[Record], str | None]:
        """Leaves out what was asked before, in other words or the same."""
        seen: set[str] = set()
        near = NearTexts(self.duplicates) if self.duplicates < 1 else None

        def choose(record: Record) -> str | None:
            text = normal("\n".join(m["content"] for m in record["messages"] if m["role"] == "user"))
            if text in seen:
                return "duplicate"
            seen.add(text)
            return "near duplicate" if near and near.take(text) else None

        return choose


def _single(row: Record, columns: Columns) -> tuple[list[Message], str]:
    if columns.prompt is None or columns.prompt not in row:
        raise Drop(f"no column {columns.prompt}: the row has {', '.join(row)}")
    question = "\n".join(filter(None, (_text(row, columns.prompt), _text(row, columns.more))))
    if not question:
        raise Drop("empty")
    system = _text(row, columns.system)
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": question}], _text(row, columns.response)


def _chat(row: Record, columns: Columns, turns: str) -> tuple[list[Message], str]:
    chat = row.get(columns.chat or "")
    if not isinstance(chat, list):
        raise Drop(f"no chat: expected a list in column {columns.chat}, found {type(chat).__name__}")
    messages = []
    for turn in chat:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        role = ROLES.get(str(role), role)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise Drop(f"no chat: expected turns with role and content, found {str(turn)[:60]}")
        messages.append({"role": role, "content": plain_text(content)})
    asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if not asked or not messages[asked[0]]["content"]:
        raise Drop("empty")
    last = asked[0] if turns == "first" else asked[-1]
    answer = messages[last + 1] if last + 1 < len(messages) else {"role": "", "content": ""}
    return messages[: last + 1], answer["content"] if answer["role"] == "assistant" else ""


def _text(row: Record, column: str | None) -> str:
    value = row.get(column) if column else None
    if value is None or isinstance(value, bool | list | dict):
        return ""
    return plain_text(str(value))  # ids and answers are often numbers


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two normal texts: the share of their shingles that both have."""
    a, b = _shingles(one), _shingles(other)
    return len(a & b) / len(a | b)


class NearTexts:
    """Finds texts that ask nearly the same: taken before, and at least as similar as `least`, within (0, 1).

    MinHash sketches (Broder 1997) in bands find candidates; whether they are similar is counted on the texts. A text
    takes about 6 kB at 0.8.
    """

    def __init__(self, least: float) -> None:
        from datasketch import MinHashLSH

        self.least = least
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(least))

    def take(self, text: str, always: bool = False) -> list[str]:
        """The normal texts near this one; it is taken too when there are none, or `always`. None is taken twice."""
        from datasketch import MinHash

        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([s.encode(errors="surrogatepass") for s in _shingles(text)])
        near = sorted(t for t in self._index.query(sketch) if similarity(t, text) >= self.least)
        if (always or not near) and text not in self._index:
            self._index.insert(text, sketch)
        return near


def _shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _bands(least: float) -> tuple[int, int]:
    """How many bands of how many hashes: as few false candidates as RECALL at the threshold allows.

    Texts of similarity s share a band of r hashes with chance s^r, one of b bands with 1 - (1 - s^r)^b (Leskovec et
    al., Mining of Massive Datasets, 3.4).
    """
    best = PERMUTATIONS, 1
    for rows in range(1, PERMUTATIONS + 1):
        bands = math.ceil(math.log(1 - RECALL) / math.log1p(-(least**rows)))
        if bands * rows <= PERMUTATIONS:
            best = max(2, bands), rows
    return best
