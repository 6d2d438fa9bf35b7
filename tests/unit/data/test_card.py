"""`opd data card`: the numbers of manifests, and leaks between them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from data_stages import Ask
from huggingface_hub import DatasetCard

from opd import cli
from opd.data.card.page import write_card
from opd.data.card.sheet import spread
from opd.data.engine.runner import run_stage
from opd.settings import UserError


def clip(folder: Path, name: str, seconds: float, seed: int) -> str:
    path = folder / "clips" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * 8000)), 8000)
    return f"clips/{name}"


def manifest(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG = "please tell me what the third largest city in the north of italy is called today"


@pytest.fixture
def train(tmp_path: Path) -> Path:
    again = clip(tmp_path, "again.wav", 2.0, 1)
    rows = [
        {"id": "a", "audio": clip(tmp_path, "a.wav", 1.0, 0), "transcript": "What is one?", "voice": "f1", "wer": 0.0},
        {"id": "b", "audio": again, "transcript": "What is two", "voice": "f1", "wer": 0.5, "group": "sums"},
        {"id": "c", "audio": again, "transcript": "what is ONE", "speaker": "m <2>", "group": "sums"},
        {"id": "d", "audio": clip(tmp_path, "d.wav", 4.0, 2), "transcript": LONG, "voice": {"name": "x"}},
        {"id": "e", "audio": "clips/none.wav", "transcript": f"{LONG}, then?"},
        {"id": "f", "audio": "clips/none.wav"},
    ]
    return manifest(tmp_path, "train.jsonl", rows)


def test_numbers(tmp_path: Path, train: Path) -> None:
    assert [p.name for p in write_card([train], tmp_path / "card")] == ["card.json", "card.html", "README.md"]
    found = json.loads((tmp_path / "card" / "card.json").read_text())
    split = found["splits"]["train"]
    assert found["leaks"] == [] and found["title"] == "card"
    assert split["records"] == 5 and split["clips"]["count"] == 4
    assert split["clips"]["hours"] == pytest.approx((1 + 2 + 2 + 4) / 3600)
    assert split["clips"]["seconds"] == pytest.approx(
        {"count": 4, "mean": 2.25, "min": 1, "p5": 1.15, "median": 2, "p95": 3.7, "max": 4}
    )
    assert split["words"]["max"] == 17 and split["words"]["median"] == 3 and split["words"]["count"] == 5
    words = split["vocabulary"]
    assert words["tokens"] == 3 * 3 + 16 + 17 and words["types"] == 2 + 2 + 14  # what, is, the, one are shared
    assert words["most_frequent"]["is"] == 5 and next(iter(words["most_frequent"])) in ("is", "what")
    assert split["speakers"] == {
        "f1": {"records": 2, "hours": pytest.approx(3 / 3600)},
        "m <2>": {"records": 1, "hours": pytest.approx(2 / 3600)},
        '{"name":"x"}': {"records": 1, "hours": pytest.approx(4 / 3600)},
    }
    assert split["groups"] == {"sums": 2} and split["wer"]["mean"] == 0.25 and split["wer"]["count"] == 2
    assert split["fields"]["audio"] == 5 and split["fields"]["group"] == 2
    assert split["duplicates"] == {
        "same_question": [[f"{train}:1 (a)", f"{train}:3 (c)"]],
        "same_clip": [[f"{train}:2 (b)", f"{train}:3 (c)"]],
        "near": [f"{train}:5 (e)"],
    }
    assert split["bad"][0].startswith(f"{train}:6: no transcript: expected `messages`, or `audio` with")
    assert split["clips"]["unreadable"] == [f"{train}:5 (e): {tmp_path / 'clips' / 'none.wav'}"]
    assert spread([]) is None


class Loads(HTMLParser):
    """What a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith("#")]
        self.open += [tag] if tag in ("main", "table", "figure", "details") else []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("main", "table", "figure", "details"):
            assert self.open.pop() == tag


def test_pages(tmp_path: Path, train: Path) -> None:
    test = manifest(tmp_path, "test-1.jsonl", [{"messages": [{"role": "user", "content": "a|b *c* <d> e"}]}])
    write_card([train, test], tmp_path, about={"title": "Sums & <more>", "license": "cc-by-4.0", "language": "en"})
    page = (tmp_path / "card.html").read_text()
    assert Loads(page).found == [] and Loads(page).open == []
    assert "<h1>Sums &amp; &lt;more&gt;</h1>" in page and page.count("<svg") == 3 and "m &lt;2&gt;" in page
    assert "<m <2>" not in page
    text = (tmp_path / "README.md").read_text()
    card = DatasetCard(text)  # as the Hub reads it
    assert card.data.to_dict() == {
        "language": "en",
        "license": "cc-by-4.0",
        "task_categories": ["audio-text-to-text"],
        "size_categories": "n<1K",
        "pretty_name": "Sums & <more>",
        "tags": ["speech", "spoken-prompts"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": "train.jsonl"},
                    {"split": "test_1", "path": "test-1.jsonl"},
                ],
            }
        ],
    }
    assert "| train | 5 | 0.00 | 4 | 2.0 (1.1 to 3.7) | 3 (3 to 17) | 18 | 42 | 3 | 1 | 25.0 |" in text
    assert "| train | 1 | 1 | 1 | 1 | 0 | 1 |" in text and "| test_1 | 0 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "- group: 2 of 5 in train, 0 of 1 in test_1" in text


def test_signs_part_questions_and_control_tokens_are_told(tmp_path: Path) -> None:
    def split(name: str, text: str, seed: int, **more: str) -> Path:
        row = {"id": name, "audio": clip(tmp_path, f"{name}.wav", 0.5, seed), "transcript": text}
        return manifest(tmp_path, f"{name}.jsonl", [row | more])

    train = split("train", "What is 12 + 7?", 1, response="19<|im_end|>")
    write_card([train, split("test", "What is 12 - 7?", 2)], tmp_path / "card")
    found = json.loads((tmp_path / "card" / "card.json").read_text())
    assert found["leaks"] == [] and found["splits"]["train"]["words"]["max"] == 5
    assert "+" in found["splits"]["train"]["vocabulary"]["most_frequent"]
    told = [split["control_tokens"] for split in found["splits"].values()]
    assert told == [[f"{train}:1 (train): <|im_end|>"], []]
    with pytest.raises(UserError, match="they share 1 question:"):
        write_card([train, split("again", "what is 12 + 7", 3)], tmp_path / "card")


def test_leaks_are_refused(tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips" / "copy.wav").write_bytes((tmp_path / "clips" / "d.wav").read_bytes())
    rows = [
        {"id": "x", "audio": clip(tmp_path, "x.wav", 1, 9), "transcript": "what is -- two!"},
        {"id": "y", "audio": "clips/copy.wav", "transcript": "something else"},
        {"audio": clip(tmp_path, "z.wav", 1, 10), "transcript": "what is three"},
    ]
    test = manifest(tmp_path, "test.jsonl", rows)
    args = ["data", "card", str(train), str(test), "--out", str(tmp_path / "card")]
    assert cli.main(args) == 2
    assert capsys.readouterr().err == (
        f"opd: error: splits leak into one another: they share 1 question and 1 clip: the question of {train}:2 (b) = "
        f"{test}:1 (x); the clip of {train}:4 (d) = {test}:2 (y); take them out of one manifest, or pass "
        "--allow-leaks\n"
    )
    assert not (tmp_path / "card").exists()
    assert cli.main([*args, "--allow-leaks"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 3
    found = json.loads((tmp_path / "card" / "card.json").read_text())
    assert found["leaks"] == [
        {"what": "question", "records": [f"{train}:2 (b)", f"{test}:1 (x)"]},
        {"what": "clip", "records": [f"{train}:4 (d)", f"{test}:2 (y)"]},
    ]
    for name in ("card.html", "README.md"):
        assert "Splits leak into one another, in 2 questions or clips" in (tmp_path / "card" / name).read_text()


def test_nearly_the_same_question_leaks_and_a_shared_speaker_is_noted(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(14)]

    def split(name: str, speaker: str, *texts: str) -> Path:
        rows = [
            {
                "id": f"{name}{i}",
                "audio": clip(tmp_path, f"{name}{i}.wav", 1, len(name) * 10 + i + ord(name[1])),
                "transcript": t,
            }
            for i, t in enumerate(texts)
        ]
        return manifest(tmp_path, f"{name}.jsonl", [r | {"speaker": speaker} for r in rows])

    train = split("train", "ann", " ".join(words), " ".join([*words, "more"]))
    test = split("test", "ann", " ".join(words[:13]), "an entirely different question of its own")
    with pytest.raises(UserError, match=r"they share 1 near-identical question: .*train0\) = .*test0\); take them"):
        write_card([train, test], tmp_path / "card")
    write_card([train, test], tmp_path / "card", allow_leaks=True)
    found = json.loads((tmp_path / "card" / "card.json").read_text())
    (leak,) = found["leaks"]
    assert leak["what"] == "near-identical question"
    assert leak["records"] == [f"{train}:1 (train0)", f"{train}:2 (train1)", f"{test}:1 (test0)"]
    assert [found["splits"][s]["duplicates"]["near"] for s in ("train", "test")] == [[f"{train}:2 (train1)"], []]
    assert found["shared_speakers"] == {"ann": ["train", "test"]}
    for page in ("card.html", "README.md"):
        assert (
            "Note: speakers or voices in more than one split (1): ann (train, test)."
            in (tmp_path / "card" / page).read_text()
        )
    other = split("other", "ben", " ".join([*words[:7], *(f"{w}x" for w in words[7:])]))
    write_card([train, other], tmp_path / "card")
    found = json.loads((tmp_path / "card" / "card.json").read_text())
    assert found["leaks"] == [] and found["shared_speakers"] == {}


def test_how_it_was_made(tmp_path: Path) -> None:
    source = manifest(tmp_path, "in.jsonl", [{"id": "a", "messages": [{"role": "user", "content": "one two"}]}])
    run_stage(Ask(suffix="?"), str(source), tmp_path / "mid.jsonl")
    run_stage(Ask(suffix="!"), str(tmp_path / "mid.jsonl"), tmp_path / "end.parquet")
    write_card([tmp_path / "end.parquet"], tmp_path / "card")
    made = json.loads((tmp_path / "card" / "card.json").read_text())["splits"]["end"]["made"]
    assert [(m["stage"], m["settings"]["suffix"], m["written"]) for m in made] == [("ask", "!", 1), ("ask", "?", 1)]
    text = (tmp_path / "card" / "README.md").read_text()
    assert f"- end: `ask` (1 of 1 records) from `ask` (1 of 1 records) from {source}" in text
    assert yaml.safe_load(text.split("---")[1])["configs"][0]["data_files"] == [{"split": "end", "path": "end.parquet"}]


def test_what_cannot_be_counted(tmp_path: Path, train: Path) -> None:
    bad = manifest(tmp_path, "bad.jsonl", [{"audio": "a.wav"}])
    for manifests, message in (
        ([train, tmp_path / "." / "train.jsonl"], "train.jsonl: is there twice"),
        ([bad], "bad.jsonl: holds no usable record, such as .*bad.jsonl:1: no transcript"),
        ([tmp_path / "none.jsonl"], "none.jsonl: no such manifest"),
    ):
        with pytest.raises(UserError, match=message):
            write_card(manifests, tmp_path / "card")
    with pytest.raises(UserError, match="--out .*train.jsonl: File exists"):
        write_card([train], train)
