"""Answers that are compared without a judge: exact, regular expression, choice, number, tokens. Imports no torch."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase
from typing import get_args

import regex

from opd.scoring import voicebench as official
from opd.scoring.words import normal
from opd.types import Match, Prompt

MATCHES: tuple[str, ...] = get_args(Match)
NO_ANSWER = ("voicebench_refusal", "rating")  # compared with nothing of the record's
HAIR = 1e-14  # of rounding, relative; whole numbers have none


def correct(prompt: Prompt, text: str, match: Match | None = None, tolerance: float | None = None) -> bool:
    """Whether a whole response gives the prompt's answer, compared as `match` or else the record says; no judge.

    exact: equal but for white space around and how letters are composed (NFC). regex: `re.fullmatch` of the trimmed
    response. choice: `choice_of`.
    number: `number_of`, at most the tolerance away from the answer's (the record's own, else the given, else 0).
    tokens: `tokens_match`.
    """
    if prompt.answer is None:
        return False
    kind = match or prompt.match
    if kind == "tokens":
        return tokens_match(text, prompt.answer, prompt.choices)
    if kind == "regex":
        return re.fullmatch(prompt.answer, text.strip()) is not None
    if kind == "choice":
        return choice_of(text, prompt.choices) == key_of(prompt.answer, prompt.choices)
    if kind == "number":
        found, wanted = number_of(text), number_of(prompt.answer)
        if found is None or wanted is None:
            return False
        allowed = (prompt.tolerance if prompt.tolerance is not None else tolerance) or 0.0
        hair = 0.0 if found % 1 == wanted % 1 == 0 else HAIR * abs(wanted)
        return abs(found - wanted) <= allowed + hair
    assert kind == "exact", kind
    return unicodedata.normalize("NFC", text).strip() == unicodedata.normalize("NFC", prompt.answer).strip()


def check_answer(answer: str | None, match: str, choices: Sequence[str], group: str = "") -> None:
    """Raise ValueError, saying what was expected, unless answers can be compared with this one."""
    if answer is None:
        return
    if match == "regex":
        try:
            re.compile(answer)
        except re.error as e:
            raise ValueError(f"answer: expected a regular expression, found {answer!r} ({e})") from e
    elif match == "number" and number_of(answer) is None:
        raise ValueError(f"answer: match number needs one with a number in digits, found {answer!r}")
    elif match == "tokens":
        if not _tokens(answer) or answer not in choices:
            raise ValueError(f"answer: match tokens needs one of the choices, found {answer!r}")
    elif match == "choice":
        if len(choices) == 1 or len(choices) > len(ascii_uppercase):
            raise ValueError(f"choices: expected 2 to {len(ascii_uppercase)} options, found {len(choices)}")
        told = [_plain(c, choices) for c in choices]
        if len(set(told)) < len(told) or not all(told):
            raise ValueError("choices: expected options that differ")
        if key_of(answer, choices) is None:
            expected = f"one of {', '.join(map(repr, choices))}, or its letter" if choices else "a letter"
            raise ValueError(f"answer: match choice needs {expected}, found {answer!r}")
    else:
        official.check_answer(answer, match, group)


def tokens_match(text: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether a response has all words of the answer, and none that only the other choices have.

    The string match of MMAU (arXiv 2410.19168, evaluation.py) and MMAR (arXiv 2505.13032, code/evaluation.py): words
    are runs of letters, digits and underscores in small letters, their order and number do not matter, and words that
    the answer shares with another choice do not count against it.
    """
    said, wanted = _tokens(text), _tokens(answer)
    return bool(said) and wanted <= said and not said & set().union(*map(_tokens, choices)) - wanted


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


ALONE = re.compile(r"[\W_]*([A-Za-z])(?![+#])[\W_]*")  # C++ and C# are no letters
# "the answer is (B)", "option b", "I choose B."
NAMED = re.compile(
    r"\b(?P<by>answer|option|choice|choose|pick|select|go with|going with)\b(?: (?:is|would be|must be|should be))?"
    r"(?: (?P<as>option|choice|letter|answer))?\s*[:=]?\s*[*\"'“‘(\[]*(?P<letter>[A-Z])\b(?!['’+#])",
    re.IGNORECASE,
)
CLOSED = re.compile(r"[*\"'”’]*([).\]:,;!?]|\s*$)")
LABEL = re.compile(r"[\W_]*([A-Za-z])[*_]*[).:\]]")
# A and I are words of English
LETTER = regex.compile(r"(?<![\p{Latin}\p{M}\d_'’])([B-HJ-Z])(?![\p{Latin}\p{M}\d_'’+#])")


def key_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of an answer that is a letter ("B", "(b)") or the text of an option; None for anything else."""
    texts, said = [_plain(c, choices) for c in choices], _plain(answer, choices)
    said = said if said in texts else said.removesuffix(" .")
    if said in texts:
        return ascii_uppercase[texts.index(said)]
    alone = ALONE.fullmatch(answer.strip())
    return alone[1].upper() if alone and alone[1].upper() in _letters(choices) else None


def choice_of(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that a response chooses; None when it chooses none, or leaves open which.

    The first that applies:
    1. the response is the text of an option, or a letter, and no more: "B", "(b).", "**B**"
    2. it names a letter, and the last one counts: "the answer is B", "option b", "I choose (B)"
    3. it begins with a letter as a label: "B. Paris", "b) Paris"
    4. it holds the words of exactly one option; of options within one another the longest
    5. it holds exactly one capital letter by itself that is no English word, as A and I are

    Letters count only as far as there are options, when `choices` gives them.
    """
    letters = _letters(choices)
    text = text.strip()
    if own := key_of(text, choices):
        return own
    named = [m["letter"].upper() for m in NAMED.finditer(text) if _is_label(m)]
    if valid := [letter for letter in named if letter in letters]:
        return valid[-1]
    if (m := LABEL.match(text)) and m[1].upper() in letters:
        return m[1].upper()
    told = _mentioned(text, choices)
    if len(told) == 1:
        return told.pop()
    alone = {m[1] for m in LETTER.finditer(text)} & set(letters)
    return alone.pop() if len(alone) == 1 and not told else None


def _is_label(m: re.Match[str]) -> bool:
    """Whether a match of NAMED means its letter: in "the answer is a dog" and "the answer is I think" it does not."""
    if CLOSED.match(m.string, m.end()) or m["letter"].isupper() and m["letter"] != "I":
        return True
    return (m["as"] or m["by"]).lower() in ("option", "choice", "letter") and m["letter"] not in "aI"


def _mentioned(text: str, choices: Sequence[str]) -> set[str]:
    """Letters of the options whose words are in the text, where no longer option's words have them."""
    left, found = f" {_plain(text, choices)} ", set()
    told = [f" {_plain(c, choices)} " for c in choices]
    for i in sorted(range(len(choices)), key=lambda i: -len(told[i])):
        if told[i] in left:
            found.add(ascii_uppercase[i])
            left = left.replace(told[i], " | ")
    return found


def _letters(choices: Sequence[str]) -> str:
    return ascii_uppercase[: len(choices)] if choices else ascii_uppercase


def _plain(text: str, choices: Sequence[str]) -> str:
    """Words and numbers in small letters; where options need it with signs (C++, C#), or else as written (H₂O, H2O)."""
    told = {normal(c, signs=False) for c in choices}
    if len(told) == len(choices) and all(len(t) > 1 or t.isdigit() for t in told):
        return normal(text, signs=False)
    if len({normal(c) for c in choices}) == len(choices):
        return normal(text)
    return " ".join(regex.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFC", text)))


GAP = "[ \u00a0\u2007\u2009\u202f'’_]"  # parts thousands, and nothing else
MARKED = (
    rf"(?P<whole>\d{{1,3}}(?:{GAP}\d{{3}})+)(?:[.,](?P<part>\d+))?",  # 1 234,5
    r"(?P<whole>\d{1,3}(?:\.\d{3})+),(?P<part>\d+)",  # 1.234,5
    r"(?P<whole>\d{1,3}(?:\.\d{3}){2,}|\d{1,2}(?:\.\d\d)+\.\d{3})(?:,(?P<part>\d+))?",  # 1.234.567 and 12.34.567
    r"(?P<whole>[1-9]\d{0,2}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?:\.(?P<part>\d+))?",  # 1,234.5 and 12,34,567
    r"(?P<whole>\d+)[.,](?P<part>\d+)",
)
COMMA = r"(?<![^\s=+-]|\d\s),"  # that begins a number
NUMBER = regex.compile(
    r"(?:(?<![\w.,)])(?P<sign>[-+]))?(?:\p{Sc}\s?(?P<sign>-)?)?(?:(?P<units>\d+)[ \u00a0\u202f](?=\d{1,2}\s?/\s?\d))?"
    rf"(?<!\d)(?:(?<!\d[.,])(?:{'|'.join(MARKED)})(?![.,]?\d)|(?P<whole>\d+)(?!\d)|(?:\.|{COMMA})(?P<part>\d+)(?!\d))"
    r"(?P<power>[eE][-+]?\d+)?(?:\s?/\s?(?P<under>\d+(?:\.\d+)?))?"
)
ALIKE = str.maketrans("\u2013\u2212\u2044\u066b\u066c", "--/.,")  # dash, minus, fraction slash, Arabic marks
WIDE = regex.compile(r"[¼-¾⅐-⅞﹐-﹫！-～￠-￦]")
APART = regex.compile(r"(?<![\d)]\s*|\b\p{L}\s)(?:\u2212\s|[-\u2013][\u00a0\u202f])(?=[\d.,])")  # a sign and a space


def number_of(text: str) -> float | None:
    """The last number of a text, in digits: 1,234.5, -3, $7, 2e-5, 3/4, 1 1/2, 12 of "12%"; None without one.

    Thousands are parted by spaces, apostrophes, commas or points, in groups of three (commas also as in India:
    12,34,567). Where there are commas and points, the last is the decimal mark. A single comma before exactly three
    digits parts thousands (1,500 is 1500), unless it follows a zero; any other comma, and a single point, is the
    decimal mark (1,5 is 1.5, and 1.500 too). What fits none of this are numbers by themselves (1,2,3 ends in 3).
    Digits are those of any script. Numbers in words are not read, nor fractions over zero. A hyphen or dash after a
    word or a digit is no sign: the last number of "10-12" is 12. Whole numbers in digits alone are exact, as int.
    """
    text = regex.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), APART.sub("-", text)).translate(ALIKE)
    text = regex.sub(r"\d", lambda m: str(unicodedata.decimal(m[0])), text)
    for m in reversed([*NUMBER.finditer(text)]):
        whole = regex.sub(r"\D", "", m["whole"] or "0")
        value = float(f"{whole}.{m['part'] or 0}{m['power'] or ''}")
        under = float(m["under"] or 1)
        if not math.isfinite(value) or not under:
            continue
        value = value / under + float(m["units"] or 0) * (value < under)
        if not any(m[part] for part in ("part", "power", "under", "units")):
            value = int(whole)
        return -value if m["sign"] == "-" else value
    return None
