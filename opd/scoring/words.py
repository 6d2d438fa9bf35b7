"""The words of a text in any script: how many there are, and which texts say the same. Imports no torch."""

from __future__ import annotations

import unicodedata

import regex

CONTROL = regex.compile(r"<[|｜][^|｜<>\s]+[|｜]>|\[/?INST\]|<(?:start|end)_of_turn>")  # tokens of chat templates
PAIRED = r"\p{Han}\p{Hiragana}\p{Katakana}"  # written without spaces: two letters, about, are a word
CLUSTERED = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"  # and here four, with the marks on them
AROUND = r"[\p{P}\p{Cf}]"
CLUSTERS = rf"(?:(?:[{PAIRED}ー]\p{{M}}*){{1,2}}|(?:[[{CLUSTERED}]--\p{{P}}]\p{{M}}*){{1,4}})"
SPACELESS = regex.compile(rf"(?V1)(?:(?<!{AROUND}){AROUND}+)?{CLUSTERS}{AROUND}*")
LONE = rf"[[{PAIRED}{CLUSTERED}]--[\d\p{{P}}]]\p{{M}}*"  # a letter that is a word
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[\d{PAIRED}{CLUSTERED}]]"
HYPHEN = (
    r"(?<!\w\p{L}\p{M}*)-(?=\s*\d)|(?<=\d\s*)-(?!\p{L}\p{L})|(?<=\b\p{L}\s*)-(?=\s*\p{L}\b)"  # 12 - 7, x - y
    r"|(?<![^\s(\[{])-(?=\w)|(?<=^\s*)-(?=\s*$)"  # -x, and a text that is no more
)
POWER = r"(?<=\w)\*\*(?=\d)|(?<=\w )\*\*(?= \d)"  # 2**3; others are emphasis
NOT = r"(?<=\d)!|!(?==)|(?<![^\s(\[{!&|])!(?=\w)"  # 5!, x != y, !p
SIGN = rf"[\p{{S}}--`]|(?<!\*)\*(?!\*)|[/#%&@\\]|{POWER}|{NOT}|[()\[\]{{}}](?=\d)|(?<=\d)[()\[\]{{}}]|{HYPHEN}"
WORDS = regex.compile(rf"(?V1)(?:(?<![\w.,)])-)?\d+(?:[.,]\d+)*|{LONE}|{LETTER}+")
WORDS_AND_SIGNS = regex.compile(rf"(?V1){LONE}|(?:{LETTER}|[\d_]|(?<=\d)[.,](?=\d))+|{SIGN}")


def normal(text: str, signs: bool = True) -> str:
    """What tells a text from another: its words in small letters, a space between; equal texts ask the same.

    A word is a run of digits and letters with their marks (vowel signs, accents, tones); in scripts that are written
    without spaces every letter is one. Signs are words too: symbols (+ = < $ ° ^, emoji), * ** / # % & @ \\, brackets
    beside a number, ! of 5!, != and !p, and a hyphen or minus beside a number, between single letters or before a word.
    Other punctuation, what nobody sees, and letters' width and composition (NFKC, case folding) tell nothing:
    [a,b) and (a,b], f'(x) and f(x), a:b and a;b are alike.
    Not `signs`: of signs there is only the minus of a number, in one word with it; letters and digits are words apart.
    """
    text = regex.sub(r"[\p{Default_Ignorable_Code_Point}'’]", "", text)
    text = regex.sub(r"[⁰¹²³⁴-⁹]+", r"^\g<0>", regex.sub(r"[¼-¾⅐-⅞]", r" \g<0>", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.translate({0x2044: "/", **dict.fromkeys([0x2010, 0x2011, 0x2012, 0x2013, 0x2212], "-")})
    return " ".join((WORDS_AND_SIGNS if signs else WORDS).findall(text))


def word_count(text: str) -> int:
    """How many words a speaker says: what white space parts, and the share of words of scripts without spaces."""
    return len(SPACELESS.sub(" x ", text).split())
