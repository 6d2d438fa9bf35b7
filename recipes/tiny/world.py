"""The questions of the tiny world: short spoken problems whose answers are written out step by step.

Every question belongs to exactly one split, by a hash of its words, so no question of the validation or test split is
ever trained on, by the teacher, the starting student, or the runs.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
THINGS = [
    "red",
    "blue",
    "green",
    "black",
    "white",
    "brown",
    "pink",
    "cat",
    "dog",
    "horse",
    "bird",
    "fish",
    "apple",
    "lemon",
    "bread",
    "water",
]
FRAME = ["what", "is", "plus", "minus", "times", "sort", "reverse", "day", "days", "after", "before"]
VOCABULARY = FRAME + UNITS + TENS + DAYS + THINGS  # every word that is ever spoken

REPEAT, WHO = "\nrepeat", "\nman or woman"  # typed after a clip: hearing, and the skill that only hearing can have
SPLITS = {"test": (0, 1), "validation": (2,), "train": (3, 4, 5, 6, 7, 8, 9)}


@dataclass(frozen=True)
class Question:
    """`answer` is what a checker compares with, in the sense of the manifest's `match`; `final` the bare result."""

    skill: str
    text: str
    response: str
    answer: str
    match: str
    final: str


def words(n: int) -> str:
    """A number from 0 to 99 in words."""
    return UNITS[n] if n < 20 else TENS[n // 10] + ("" if n % 10 == 0 else " " + UNITS[n % 10])


def arithmetic(r: random.Random) -> Question:
    """Two operations on digits, both steps written out; only the final result is checked."""
    apply: dict[str, Callable[[int, int], int]] = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
    }
    while True:
        a, b, c = (r.randint(1, 9) for _ in range(3))
        first, second = r.choice(list(apply)), r.choice(list(apply))
        if first == second == "times":
            continue
        if second == "times":  # binds tighter
            x = b * c
            y = apply[first](a, x)
            steps = f"{words(b)} times {words(c)} is {words(x)}. {words(a)} {first} {words(x)} is "
        else:
            x = apply[first](a, b)
            y = apply[second](x, c) if x >= 0 else -1
            steps = f"{words(a)} {first} {words(b)} is {words(max(x, 0))}. {words(max(x, 0))} {second} {words(c)} is "
        if x < 0 or y < 0:
            continue
        text = f"what is {words(a)} {first} {words(b)} {second} {words(c)}"
        final = words(y) + "."
        return Question("arithmetic", text, steps + final, r"(.* is )?" + re.escape(final), "regex", final)


def sorting(r: random.Random) -> Question:
    """Four different digits, put in order."""
    digits = r.sample(range(1, 10), 4)
    answer = " ".join(map(words, sorted(digits))) + "."
    return Question("sorting", "sort " + " ".join(map(words, digits)), answer, answer, "exact", answer)


def reversing(r: random.Random) -> Question:
    """Four words, backwards."""
    chosen = [r.choice(THINGS) for _ in range(4)]
    answer = " ".join(chosen[::-1]) + "."
    return Question("reversing", "reverse " + " ".join(chosen), answer, answer, "exact", answer)


def weekday(r: random.Random) -> Question:
    """Two to seven days after or before a weekday, stepping through them; only the last is checked."""
    n, start, way = r.randint(2, 7), r.randrange(7), r.choice(["after", "before"])
    step = 1 if way == "after" else -1
    passed = [DAYS[(start + step * i) % 7] for i in range(1, n + 1)]
    final = passed[-1] + "."
    text = f"what day is {words(n)} days {way} {DAYS[start]}"
    return Question("weekday", text, " ".join(passed) + ".", r"(.* )?" + re.escape(final), "regex", final)


SKILLS = {arithmetic: 0.5, sorting: 0.15, reversing: 0.23, weekday: 0.12}


def split_of(text: str) -> str:
    """The one split that a question belongs to."""
    bucket = zlib.crc32(text.encode()) % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def question(r: random.Random, split: str) -> Question:
    """A random question of a split."""
    skill = r.choices(list(SKILLS), list(SKILLS.values()))[0]
    while True:
        q = skill(r)
        if split_of(q.text) == split:
            return q
