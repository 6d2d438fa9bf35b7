"""The records that travel between the parts of the loop.

Shape legend, used in every file:
    B responses   T response tokens   L prompt + response tokens   V vocabulary   H hidden size
    C clips       F mel frames        S audio embeddings of one clip
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np  # a tenth of a second of every `opd --help`

View = Literal["speech", "text"]
Match = Literal[
    "exact", "regex", "choice", "number", "tokens", "judge", "rating", "rubric",
    "voicebench_mcq", "voicebench_bbh", "voicebench_refusal", "ifeval",
]  # fmt: skip
VIEWS: tuple[View, View] = ("speech", "text")
Message = dict[str, Any]
Clips: TypeAlias = "dict[str, np.ndarray]"  # audio path -> mono float32 waveform at the family's sampling rate
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One record of a manifest: a chat whose audio parts carry their own transcript.

    `messages` is in the Hugging Face chat format; an audio part is
    `{"type": "audio", "path": absolute path, "transcript": str}`.
    """

    id: str
    messages: tuple[Message, ...]
    response: str | None = None  # gold response, for `source: dataset` and teacher-forced metrics
    _: KW_ONLY
    answer: str | None = None  # what an evaluation compares with
    match: Match = "exact"
    group: str = ""
    place: str = ""  # "file.jsonl:12", for error messages
    other: dict[str, str] = field(default_factory=dict)  # further strings of the record, by name
    numbers: dict[str, float] = field(default_factory=dict)  # and numbers
    choices: tuple[str, ...] = ()  # options of a multiple choice, A first
    tolerance: float | None = None  # of a number that is compared
    numbered: bool = False  # the manifest has a number for its id, which is taken as text


@dataclass(frozen=True)
class Rollout:
    """One response to one view of one prompt. `token_ids` are never re-tokenised."""

    prompt: Prompt
    view: View
    token_ids: tuple[int, ...]  # [T], the end-of-turn token included when the model wrote one
    logprobs: np.ndarray | None  # [T] of the sampler, float32; None when no student sampled it
    version: int  # of the weights that sampled; -1 when no student sampled it
    truncated: bool  # the length limit ended it, not an end-of-turn token
    seed: int = 0
    _: KW_ONLY
    top_ids: np.ndarray | None = None  # [T, K] of the sampler's best ids, with objective.top_k of the student
    stands_for: int = 1  # responses, in a mean over responses


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the teacher's log-probabilities of the same tokens, read in the text view."""

    rollout: Rollout
    teacher_logprobs: np.ndarray | None  # [T] float32; None when the objective reads logits instead
    top_ids: np.ndarray | None = None  # [T, K] int64 with objective.top_k, -1 where there is none
    top_logprobs: np.ndarray | None = None  # [T, K] float32, the teacher's


@dataclass
class Sample:
    """A scored rollout made ready for the learner."""

    scored: ScoredRollout
    prompt_ids: list[int]  # of the rollout's view, audio placeholders expanded
    clips: list[str]  # keys into Batch.clips, in the order of the placeholders; [] in the text view
    weight: float = 0.0  # of every token of this response in the loss: lambda and the global denominator
    place: int = -1  # in Batch.samples; -1: it only fills up

    @property
    def response_ids(self) -> tuple[int, ...]:
        """[T] token ids of the response."""
        return self.scored.rollout.token_ids


@dataclass
class Batch:
    """What one rank feeds its learner in one step."""

    samples: list[Sample]
    clips: Clips
    micro_batches: list[list[Sample]] = field(default_factory=list)  # same count on every rank
    tokens: int = 0  # supervised tokens over all ranks
    responses: int = 0  # responses over all ranks


class BadAudio(ValueError):
    """A clip that cannot be used; the message says why and what was expected."""


class TooLong(BadAudio):
    """A clip, or a prompt with its clips, that is longer than the recipe has room for."""


def packed(items: Iterable[T], fits: Callable[[list[T], T], bool]) -> list[list[T]]:
    """Items in their order, in runs: each joins the run before it if it `fits` there, else begins the next."""
    runs: list[list[T]] = []
    for item in items:
        if runs and fits(runs[-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def render(prompt: Prompt, view: View) -> list[Message]:
    """Chat messages of one view.

    The speech view keeps every audio part (without its transcript: the student must hear it, not read it); the text
    view puts a text part with the transcript in its place. Everything else is identical.
    """

    def shown(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "audio":
            return part
        found = {"type": "audio", "path": part["path"]}
        return found if view == "speech" else {"type": "text", "text": part["transcript"]}

    return with_parts(prompt.messages, shown)


def with_parts(messages: Iterable[Message], change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Message]:
    """The same messages with every part of their contents changed; a content that is a string stays."""
    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else list(map(change, m["content"]))}
        for m in messages
    ]


def audio_paths(prompt: Prompt, view: View = "speech") -> list[str]:
    """Paths of a prompt's audio parts that a view holds, in the order in which they are heard."""
    contents = [m["content"] for m in prompt.messages if not isinstance(m["content"], str) and view == "speech"]
    return [part["path"] for content in contents for part in content if part["type"] == "audio"]


def transcript(prompt: Prompt) -> str:
    """The whole prompt as readable text, for logs and samples."""
    return "\n".join(f"{m['role']}: {joined(m)['content']}" for m in render(prompt, "text"))


def joined(message: Message) -> Message:
    """Text templates of many LLMs take strings only: join the text parts."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "".join(p["text"] for p in content)}
