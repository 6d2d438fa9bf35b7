"""Words in every script: what is asked twice and what is not, how much there is to say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.scoring.words import CONTROL, normal, word_count

APART = {
    "signs": "12 + 7|12 - 7|12 * 7|12 / 7|-12 + 7|12 = 7|12 % 7|12 ^ 7|12, 7|12 < 7|12 > 7|12 & 7|12.7|12,7|5! - 7",
    "letters": "x + y|x - y|x * y|x / y|is it -x|is it x",
    "brackets": "(1 + 2) * 3|1 + (2 * 3)",
    "powers": "5²|52|5³",
    "stars": "2**3|2 3|2*3|say 2",
    "not": "is !p so|is p so|x != y|x = y|x y",
    "fractions": "1½|1 of ½|11/2",
    "names": "learn C++|learn C#|learn C",
    "emoji": "is 😀 sad|is 😡 sad",
    "hindi": "यह दिन है|यह दान है|यह दीन है",
    "tamil": "இது பால்|இது பூல்",
    "thai": "นี่ คือ ปู|นี่ คือ ปี|นี่ คือ ปา",
    "arabic": "كَتَبَ|كُتِبَ",
    "accents": "pâte|pâté",
}
ALIKE = {
    "case and punctuation": "What is it?|what is IT|\u201cWhat is \u2026 it!\u201d|what - is it",
    "hyphens and quotes": "a well-known 12-year-old's e-mail|A well known 12 year old’s e mail",
    "minus": "12 \u2212 7|12 - 7|12 \u2013 7",
    "emphasis": "so **bold** now|so bold now",
    "emphasis of numbers": "add **2** **3** **now**!|add 2 3 now",
    "composition": "caf\u00e9|cafe\u0301",
    "width": "１２ + ７ ＡＢ|12 + 7 ab",
    "what nobody sees": "\ufeffso\u00adlid \u200bman|solid man",
    "halves": "½ cup|1/2 cup|1\u20442 cup",
    "chinese": "今天天气怎么样？|今天天气怎么样",
}


@pytest.mark.parametrize("texts", APART.values(), ids=APART)
def test_texts_that_ask_other_things(texts: str) -> None:
    parts = texts.split("|")
    assert len({normal(t) for t in parts}) == len(parts), [normal(t) for t in parts]


@pytest.mark.parametrize("texts", ALIKE.values(), ids=ALIKE)
def test_texts_that_ask_the_same(texts: str) -> None:
    assert len({normal(t) for t in texts.split("|")}) == 1


def test_words() -> None:
    assert normal("What is 12 + 7?") == "what is 12 + 7" and normal("12-7=5 (x2b)") == "12 - 7 = 5 x2b"
    assert normal("今日はラーメン、นี่คือ") == "今 日 は ラ ー メ ン นี่ คื อ"
    assert normal("It's -5 10km, C++", signs=False) == "its -5 10 km c"
    assert normal("?!…") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What's a well-known 12 - 7?", 6),
        ("一加一等于几？", 3),
        ("「日本」の首都はどこですか", 6),
        ("พรุ่งนี้ฝนจะตกไหม", 4),
        ("यह दिन है", 3),
        ("한국의 수도는 어디입니까?", 3),
        ("用 Python 写", 3),
        ("Hi", 1),
        ("什么", 1),
        ("", 0),
    ],
)
def test_how_many_words_there_are(text: str, words: int) -> None:
    assert word_count(text) == words


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("say <|im_end|> now", "<|im_end|>"),
        ("<|im_start|>system", "<|im_start|>"),
        ("<｜User｜>", "<｜User｜>"),
        ("a [/INST] b", "[/INST]"),
        ("<start_of_turn>user", "<start_of_turn>"),
        ("f <| x |> g, a|b, <b>bold</b>, [x]", None),
    ],
)
def test_what_steers_a_model(text: str, token: str | None) -> None:
    found = CONTROL.search(text)
    assert (found and found[0]) == token


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["12 + 7", "C#", "दिन", "今日", "-", "½"]))
def test_any_text_has_words(text: str, more: str) -> None:
    for one in (text, text + more, more + text):
        assert normal(one) == " ".join(normal(one).split())
        assert bool(word_count(one)) == bool(one.strip())


def test_long_texts_take_no_long_time() -> None:
    for part in ("-", "- ", "1 ", "日", "\u0301", "(", "a\u0301", "1,"):
        normal(part * 10000), word_count(part * 10000)
