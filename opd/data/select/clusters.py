"""Where a student needs speech: clusters of texts, how far the student's hearing is off in each, and what to draw.

Active selection of SALAD (arXiv 2510.13632): texts are clustered, misalignment is measured on a few spoken ones of each
cluster, and texts are drawn with weight P(c) M(c)^gamma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from opd.settings import UserError

FIT = 20000  # texts that the clusters are fitted to: the balanced assignment is a flow problem, slow beyond
BATCH = 256


@dataclass(frozen=True)
class Clusters:
    """A partition of texts."""

    corpus: np.ndarray  # [N] cluster of each text of the corpus
    probe: np.ndarray  # [n] cluster of each probe text
    count: int


def cluster(corpus: Sequence[str], probe: Sequence[str], count: int, embedding: str, size: int, seed: int) -> Clusters:
    """Balanced k-means over embeddings of the corpus; probe texts go to the nearest centre.

    embedding: `tfidf` (word TF-IDF, reduced to `size` dimensions by a truncated SVD), or a sentence-transformers model.
    Beyond FIT texts a random sample is clustered, and the others go to the nearest centre: balanced up to sampling.
    """
    from k_means_constrained import KMeansConstrained
    from sklearn.metrics import pairwise_distances_argmin as nearest

    rng = np.random.default_rng(seed)
    points, asked = embed(corpus, probe, embedding, size, seed)
    fitted = rng.permutation(len(points))[:FIT]
    least, most = len(fitted) // count, -(-len(fitted) // count)
    model = KMeansConstrained(count, size_min=least, size_max=most, random_state=seed, n_init=1)
    own = model.fit_predict(points[fitted])
    found = nearest(points, model.cluster_centers_)
    found[fitted] = own
    return Clusters(found, nearest(asked, model.cluster_centers_), count)


def embed(
    corpus: Sequence[str], probe: Sequence[str], embedding: str, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [N, D] and [n, D] of texts; what is learnt for it is learnt from the corpus."""
    if embedding == "tfidf":
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        counts = words.fit_transform(corpus)
        svd = TruncatedSVD(min(size, min(counts.shape) - 1), random_state=seed)
        vectors = svd.fit_transform(counts), svd.transform(words.transform(probe))
    else:
        model = _sentence_model(embedding)
        vectors = tuple(model.encode(list(t), batch_size=BATCH, show_progress_bar=True) for t in (corpus, probe))
    return _unit(vectors[0]), _unit(vectors[1])


def _sentence_model(name: str) -> Any:
    """Raises UserError for a model that is not there, or has pickled weights alone."""
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        # the modules behind the encoder, such as Dense, fall back to pickled weights whatever `use_safetensors` says
        with patch.object(torch, "load", side_effect=ValueError("a module has pickled weights alone, no safetensors")):
            return SentenceTransformer(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        expected = "expected tfidf or a sentence-transformers model with safetensors"
        raise UserError(f"embedding {name}: {expected}: {reason[0][:300]}") from e


def misalignment(found: np.ndarray, nats: np.ndarray, tokens: np.ndarray, count: int, prior: float = 1.0) -> np.ndarray:
    """M(c) in nats per token, [count], from probe records [n]: cluster, summed nats, tokens.

    A cluster with few probe records is drawn towards the mean of all, as if it had `prior` more records of the mean's
    size; one without any has the mean.
    """
    mean, size = nats.sum() / tokens.sum(), tokens.mean()
    more = size * np.where(np.bincount(found, minlength=count) > 0, prior, 1.0)  # tokens; any number has the mean alone
    sums = np.bincount(found, nats, count) + mean * more
    return np.maximum(sums / (np.bincount(found, tokens, count) + more), 0.0)


def weights(share: np.ndarray, m: np.ndarray, gamma: float, wer: np.ndarray | None, worst: float) -> np.ndarray:
    """Probability of each cluster, proportional to P(c) M(c)^gamma (SALAD), [count].

    share: P(c), the clusters' shares of the corpus. wer: [count], NaN where it is not known; of those where it is, the
    `worst` share by it get nothing, at most: never one that is no worse than one that stays. There the recogniser, and
    so the transcript, is not to be believed.
    """
    scale = m.max() if m.max() > 0 else 1.0
    raw = share * (m / scale) ** gamma
    if wer is not None and worst > 0:
        known = np.sort(wer[~np.isnan(wer)])[::-1]
        stays = int(worst * len(known))  # the first that does, of the worst first
        if stays:
            raw[np.nan_to_num(wer) > known[stays]] = 0.0
    total = raw.sum()
    return raw / total if total > 0 else share / share.sum()


def draw(found: np.ndarray, probability: np.ndarray, seconds: np.ndarray, budget: float, seed: int) -> np.ndarray:
    """Indices of texts drawn without replacement until `budget` seconds are full, in the order of the corpus.

    Every text of a cluster is as likely as the next (Efraimidis and Spirakis, 2006: the largest log(u) / w); the text
    that would pass the budget, and those behind it, are left out.
    """
    sizes = np.bincount(found, minlength=len(probability))
    weight = probability[found] / sizes[found]
    u = np.random.default_rng(seed).random(len(found))
    with np.errstate(divide="ignore"):
        keys = np.where(weight > 0, np.log(u) / weight, -np.inf)
    order = np.argsort(-keys, kind="stable")
    order = order[np.isfinite(keys[order])]
    return np.sort(order[: int(np.searchsorted(np.cumsum(seconds[order]), budget, side="right"))])


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
