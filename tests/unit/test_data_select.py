"""What is chosen to be spoken: clusters, misalignment, weights, the draw."""

from __future__ import annotations

import numpy as np
import pytest

from opd.data.clusters import cluster, draw, misalignment, weights

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


def test_misalignment_is_a_mean_over_tokens_drawn_to_the_whole() -> None:
    found, nats, tokens = np.array([0, 0, 1]), np.array([2.0, 4.0, 0.0]), np.array([1.0, 3.0, 2.0])
    assert misalignment(found, nats, tokens, 2, prior=0.0) == pytest.approx([6 / 4, 0.0])
    m = misalignment(found, nats, tokens, 3)  # the mean of all is 1 nat a token, a record has 2 tokens
    assert m == pytest.approx([(6 + 2) / (4 + 2), (0 + 2) / (2 + 2), 1.0])


def test_weights_by_hand() -> None:
    share, m = np.array([0.5, 0.25, 0.25]), np.array([1.0, 2.0, 0.5])
    raw = [0.5 * 1, 0.25 * 2**5, 0.25 * 0.5**5]
    assert weights(share, m, 5.0, None, 0.15) == pytest.approx([r / sum(raw) for r in raw])
    assert weights(share, m, 0.0, None, 0.15) == pytest.approx(share)
    wer = np.array([0.1, 0.9, np.nan])
    assert weights(share, m, 5.0, wer, 0.34) == pytest.approx(
        [raw[0] / (raw[0] + raw[2]), 0, raw[2] / (raw[0] + raw[2])]
    )
    assert weights(share, m, 5.0, wer, 0.3) == pytest.approx([r / sum(raw) for r in raw])  # 0.9 of a cluster is none
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
