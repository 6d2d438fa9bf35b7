"""The questions of the tiny world: four skills, each answered step by step in words.

    arithmetic   what is three plus four times two     four times two is eight. three plus eight is eleven.
    sort         sort six one nine two                 one two six nine.
    reverse      reverse cat red dog water             water dog red cat.
    days         what day is two days after monday     tuesday wednesday.

Everything is a function of a seed. A question's split is a hash of its words, so a question of `validation` or `test`
is met nowhere in training: not by the teacher, not by the base student, not by the stages that the recipes run.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TEENS = _words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
ONES = _words("zero one two three four five six seven eight nine") + TEENS
TENS = _words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
THINGS = _words("red blue green black white brown pink cat dog horse bird fish apple lemon bread water")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
}
QUESTION_WORDS = _words("what is plus minus times sort reverse day days after before")
WORDS = QUESTION_WORDS + ONES + TENS[2:] + DAYS + THINGS

# The two instructions that follow a clip in the tasks that no recipe trains on.
SPEAKER_TASK = "\nman or woman"
REPEAT_TASK = "\nrepeat"
SPEAKERS = ("man", "woman")


@dataclass(frozen=True)
class Question:
    """A question, its full answer, and what of the answer is checked.

    `match` "exact": a response must equal `answer`; "regex": `re.fullmatch(answer, response)` must hold.
    """

    skill: str
    question: str
    response: str
    answer: str
    match: Literal["exact", "regex"] = "exact"

    def accepts(self, response: str) -> bool:
        """Whether a finished response is right; one that never ended is wrong, which the caller must see to."""
        if self.match == "regex":
            return re.fullmatch(self.answer, response.strip()) is not None
        return response.strip() == self.answer


def questions(split: Split, seed: int) -> Iterator[Question]:
    """Endless questions of a split, repetitions possible; the same ones for the same seed."""
    rng = random.Random(f"{split}/{seed}")
    while True:
        yield draw(rng, split)


def draw(rng: random.Random, split: Split) -> Question:
    """One question of a split: first the skill, then one of its questions."""
    skill = rng.choices(list(SKILLS), [weight for _, weight in SKILLS.values()])[0]
    make = SKILLS[skill][0]
    while True:
        question = make(rng)
        if split_of(question.question) == split:
            return question


def split_of(question: str) -> Split:
    """The split that a question belongs to: 80% train, 10% validation, 10% test, by a hash of its words."""
    bucket = zlib.crc32(question.encode()) % 10
    if bucket == 0:
        return "validation"
    return "test" if bucket == 5 else "train"


def in_words(n: int) -> str:
    """0 to 99 in words: 7 -> "seven", 42 -> "forty two"."""
    if not 0 <= n <= 99:
        raise ValueError(f"expected a number from 0 to 99, found {n}")
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")


def arithmetic(rng: random.Random) -> Question:
    """Two operations on three digits, "times" first; no step goes below zero."""
    while True:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        first, second = rng.choice(list(OPERATIONS)), rng.choice(list(OPERATIONS))
        if first == second == "times":
            continue
        if second == "times":
            steps = (b, "times", c), (a, first, b * c)
        else:
            steps = (a, first, b), (OPERATIONS[first](a, b), second, c)
        results = [OPERATIONS[op](x, y) for x, op, y in steps]
        if min(results) < 0:
            continue
        question = f"what is {in_words(a)} {first} {in_words(b)} {second} {in_words(c)}"
        said = [
            f"{in_words(x)} {op} {in_words(y)} is {in_words(z)}." for (x, op, y), z in zip(steps, results, strict=True)
        ]
        # Only the result counts; "is" before it, or nothing: "thirty one" must not pass for "one".
        return Question("arithmetic", question, " ".join(said), rf"(.* is )?{in_words(results[-1])}\.", "regex")


def sort(rng: random.Random) -> Question:
    """Four different digits into ascending order."""
    digits = rng.sample(range(1, 10), 4)
    answer = " ".join(map(in_words, sorted(digits))) + "."
    return Question("sort", "sort " + " ".join(map(in_words, digits)), answer, answer)


def reverse(rng: random.Random) -> Question:
    """Four words backwards."""
    words = [rng.choice(THINGS) for _ in range(4)]
    answer = " ".join(reversed(words)) + "."
    return Question("reverse", "reverse " + " ".join(words), answer, answer)


def days(rng: random.Random) -> Question:
    """Two to seven days after or before a weekday, stepping through them; the last word counts."""
    count, start, word = rng.randint(2, 7), rng.randrange(7), rng.choice(["after", "before"])
    sign = 1 if word == "after" else -1
    steps = [DAYS[(start + sign * i) % 7] for i in range(1, count + 1)]
    question = f"what day is {in_words(count)} days {word} {DAYS[start]}"
    return Question("days", question, " ".join(steps) + ".", rf"(.* )?{steps[-1]}\.", "regex")


# skill -> how a question is made, and its share of the questions
SKILLS: dict[str, tuple[Callable[[random.Random], Question], float]] = {
    "arithmetic": (arithmetic, 0.50),
    "sort": (sort, 0.15),
    "reverse": (reverse, 0.23),
    "days": (days, 0.12),
}
