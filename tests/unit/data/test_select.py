"""What is chosen to be spoken: clusters, misalignment, weights, the draw."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from opd.cli import main
from opd.data.select import cluster, draw, embed, misalignment, question, weights
from opd.settings import UserError

TEACHER = str(Path(__file__).parents[3] / "recipes/tiny/teacher")

TOPICS = {
    "sums": "what is {} plus {}",
    "colours": "which colour has the {} sky above the {}",
    "animals": "does a {} dog chase the {} cat",
}


def texts(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    topic = rng.integers(3, size=n)
    words = [f"w{i}" for i in range(30)]
    made = [list(TOPICS.values())[t].format(*rng.choice(words, 2)) for t in topic]
    return made, topic


def test_clusters_are_balanced_and_put_like_with_like() -> None:
    corpus, topic = texts(300, 0)
    probe, asked = texts(60, 1)
    found = cluster(corpus, probe, 6, "tfidf", 16, seed=0)
    assert set(np.bincount(found.corpus, minlength=6)) == {50}
    again = cluster(corpus, probe, 6, "tfidf", 16, seed=0)
    assert np.array_equal(found.corpus, again.corpus) and np.array_equal(found.probe, again.probe)
    main = [np.bincount(topic[found.corpus == c], minlength=3) for c in range(6)]
    assert sum(m.max() for m in main) / 300 > 0.8
    assert np.mean([main[c].argmax() == t for c, t in zip(found.probe, asked, strict=True)]) > 0.8


def test_a_sentence_model_embeds_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    from sentence_transformers import SentenceTransformer

    corpus, topic = texts(60, 0)
    vectors, asked = embed(corpus, corpus[:7], TEACHER, 64, seed=0)
    assert np.allclose(asked, vectors[:7], atol=1e-6) and np.allclose(np.linalg.norm(vectors, axis=1), 1.0)
    plain = SentenceTransformer(TEACHER).encode(corpus[0])
    assert np.allclose(vectors[0], plain / np.linalg.norm(plain), atol=1e-6)
    found = cluster(corpus, corpus[:7], 3, TEACHER, 64, seed=0)
    assert set(np.bincount(found.corpus)) == {20}
    for name in ("no/such/folder", str(Path(TEACHER).parent)):
        with pytest.raises(UserError, match=f"embedding {name}: expected tfidf or a sentence-transformers model"):
            embed(corpus, corpus, name, 64, seed=0)


@pytest.mark.parametrize("module", ["the encoder", "a module behind it"])
def test_pickled_weights_are_not_loaded(tmp_path: Path, module: str) -> None:
    import torch
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    model = SentenceTransformer(TEACHER)
    width = model.encode("a").shape[0]
    model.append(Dense(width, 4))
    model.save(str(tmp_path / "m"))
    assert embed(["a"], ["b"], str(tmp_path / "m"), 64, seed=0)[0].shape == (1, 4)
    (whole,) = tmp_path.glob("m/model.safetensors" if module == "the encoder" else "m/*Dense/model.safetensors")
    torch.save(load_file(whole), whole.with_name("pytorch_model.bin"))
    whole.unlink()
    with pytest.raises(UserError, match="expected tfidf or a sentence-transformers model with safetensors"):
        embed(["a"], ["b"], str(tmp_path / "m"), 64, seed=0)


def test_misalignment_is_a_mean_over_tokens_drawn_to_the_whole() -> None:
    found, nats, tokens = np.array([0, 0, 1]), np.array([2.0, 4.0, 0.0]), np.array([1.0, 3.0, 2.0])
    assert misalignment(found, nats, tokens, 2, prior=0.0) == pytest.approx([6 / 4, 0.0])
    m = misalignment(found, nats, tokens, 3)  # the mean of all is 1 nat a token, a record has 2 tokens
    assert m == pytest.approx([(6 + 2) / (4 + 2), (0 + 2) / (2 + 2), 1.0])
    assert misalignment(found, nats, tokens, 3, prior=0.0) == pytest.approx([6 / 4, 0.0, 1.0])


def test_weights_by_hand() -> None:
    share, m = np.array([0.5, 0.25, 0.25]), np.array([1.0, 2.0, 0.5])
    raw = [0.5 * 1, 0.25 * 2**5, 0.25 * 0.5**5]
    assert weights(share, m, 5.0, None, 0.15) == pytest.approx([r / sum(raw) for r in raw])
    assert weights(share, m, 0.0, None, 0.15) == pytest.approx(share)
    wer = np.array([0.1, 0.9, np.nan])
    assert weights(share, m, 5.0, wer, 0.5) == pytest.approx(
        [raw[0] / (raw[0] + raw[2]), 0, raw[2] / (raw[0] + raw[2])]
    )
    assert weights(share, m, 5.0, wer, 0.49) == pytest.approx([r / sum(raw) for r in raw])  # 0.98 of a cluster is none
    assert weights(share, np.zeros(3), 5.0, None, 0.0) == pytest.approx(share)


def test_the_draw_follows_the_weights_and_keeps_the_budget() -> None:
    found = np.repeat([0, 1, 2], [1000, 500, 500])
    seconds = np.full(2000, 2.0)
    chosen = draw(found, np.array([0.2, 0.8, 0.0]), seconds, 201.0, seed=0)
    assert len(chosen) == 100 and len(set(chosen)) == 100 and list(chosen) == sorted(chosen)
    counts = [
        np.bincount(found[draw(found, np.array([0.2, 0.8, 0.0]), seconds, 200, s)], minlength=3) for s in range(50)
    ]
    mean = np.mean(counts, axis=0)
    assert mean[2] == 0 and mean[1] / mean.sum() == pytest.approx(0.79, abs=0.02)  # a little used up on the way
    assert np.array_equal(chosen, draw(found, np.array([0.2, 0.8, 0.0]), seconds, 201.0, seed=0))
    assert len(draw(found, np.array([0.0, 1.0, 0.0]), seconds, 1e9, 0)) == 500


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """A corpus of three topics, and an evaluation that hears sums badly."""
    corpus, _ = texts(300, 0)
    records = [{"id": str(i), "messages": [{"role": "user", "content": t}]} for i, t in enumerate(corpus)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    asked, topic = texts(90, 1)
    folder = tmp_path / "gap"
    folder.mkdir()
    lines = [
        {
            **{"id": str(i), "part": "test", "record": str(i), "question": f"user: {q}", "views": {}},
            "misalignment": {"nats": 20.0 if t == 0 else 2.0, "tokens": 10},
            "numbers": {"wer": 0.5 if t == 2 else 0.0},
            "step": 0,
        }
        for i, (q, t) in enumerate(zip(asked, topic, strict=True))
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "corpus.jsonl", folder


def choose(world: tuple[Path, Path], *more: str) -> tuple[list[dict], dict, str]:
    out = world[0].parent / "chosen.jsonl"
    command = ["data", "select", str(world[0]), "--probe", str(world[1]), "--out", str(out)]
    assert main([*command, "hours=0.05", "clusters=6", "dimensions=16", *more]) == 0
    folder = out.with_suffix(".select")
    found = json.loads((folder / "select.json").read_text())
    return [json.loads(line) for line in out.read_text().splitlines()], found, (folder / "select.html").read_text()


def is_sum(record: dict) -> bool:
    return "plus" in record["messages"][0]["content"]


def test_what_is_heard_badly_is_chosen(world: tuple[Path, Path]) -> None:
    records, found, page = choose(world)
    alike, _, _ = choose(world, "gamma=0", "drop_worst=0")
    share = [sum(map(is_sum, rs)) / len(rs) for rs in (records, alike)]
    assert share[0] > 0.9 and 0.2 < share[1] < 0.5
    spoken = sum(0.4 * len(r["messages"][0]["content"].split()) for r in records)
    assert 0.9 * 180 < spoken <= 180
    assert found["total"]["texts"] == len(records) and found["total"]["of"] == 300
    assert sum(c["chosen"] for c in found["clusters"]) == len(records)
    assert sum(c["probability"] for c in found["clusters"]) == pytest.approx(1)
    assert records[0]["odds"] > 1 and records[0]["cluster"].isdigit()
    assert "<svg" in page and len(re.findall("<tr>", page)) == 7


def test_what_is_not_spoken_takes_no_time(world: tuple[Path, Path]) -> None:
    """A system message and earlier turns are read, not said; a clip's transcript is what is said of a spoken record."""
    plain, _, _ = choose(world)
    lines = [json.loads(line) for line in world[0].read_text().splitlines()]
    before = [{"role": "system", "content": "word " * 50}, {"role": "user", "content": "a"}]
    before.append({"role": "assistant", "content": "b " * 9})
    for line in lines:
        line["messages"] = before + line["messages"]
    world[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [r["id"] for r in choose(world)[0]] == [r["id"] for r in plain]
    part = {"type": "audio", "path": "x.wav", "transcript": "what is one"}
    assert question({"messages": [{"role": "user", "content": [{"type": "text", "text": "Listen."}, part]}]}) == (
        "what is one"
    )


def test_only_what_is_worse_than_others_is_left_out() -> None:
    share, m = np.full(20, 0.05), np.linspace(1, 0.1, 20)
    assert (weights(share, m, 1.0, np.zeros(20), 0.15) > 0).all()
    some = np.full(20, np.nan)
    some[:4] = [0.0, 0.3, 0.0, 0.1]  # four are measured: a quarter of them, not of all
    assert np.flatnonzero(weights(share, m, 1.0, some, 0.25) == 0).tolist() == [1]
    some[3] = 0.3  # of two that are alike neither is the worst
    assert (weights(share, m, 1.0, some, 0.25) > 0).all()


def test_clusters_whose_transcripts_are_not_to_be_believed_are_left_out(world: tuple[Path, Path]) -> None:
    records, found, _ = choose(world, "gamma=0", "drop_worst=0.34")
    out = [c for c in found["clusters"] if c["probability"] == 0]
    assert len(out) == 2 and min(c["wer"] for c in out) >= max(c["wer"] for c in found["clusters"] if c not in out)
    assert not {str(c["cluster"]) for c in out} & {r["cluster"] for r in records}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["clusters=400"], "300 usable records make no 400 clusters"),
        (["hours=0.0001"], "hours: 0.0001 h hold no text"),
        (["hourz=1"], "unknown key hourz (did you mean hours?)"),
    ],
)
def test_mistakes_are_one_line(
    world: tuple[Path, Path], capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    out = world[0].parent / "chosen.jsonl"
    command = ["data", "select", str(world[0]), "--probe", str(world[1]), "--out", str(out), "hours=1", *change]
    assert main(command) == 2 and message in capsys.readouterr().err and not out.exists()
    (world[1] / "records.jsonl").write_text("")
    assert main([*command[:-1], "clusters=6"]) == 2 and "run `opd eval` again" in capsys.readouterr().err


def test_records_that_cannot_be_used_are_told(world: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    part = {"type": "audio", "path": "none.wav"}  # no transcript: nobody can tell what is asked
    with world[0].open("a") as f:
        f.write(json.dumps({"id": "bad", "messages": [{"role": "user", "content": [part]}]}) + "\n")
    _, found, _ = choose(world)
    assert (found["total"]["of"], found["total"]["unusable"]) == (300, 1)
    told = capsys.readouterr().err
    assert f"{world[0]}: 1 of 301 records cannot be used, the first: " in told and "transcript" in told
    command = ["data", "select", str(world[0]), "--probe", str(world[1]), "--out", str(world[0].parent / "o.jsonl")]
    assert main([*command, "hours=1", "clusters=400"]) == 2
    assert "set clusters= (1 of 301 records cannot be used, the first: " in capsys.readouterr().err
