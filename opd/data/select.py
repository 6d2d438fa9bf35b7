"""`opd data select`: which texts to have spoken, given what a student hears badly.

Active selection of SALAD (arXiv 2510.13632): texts are clustered, misalignment is measured on a few spoken ones of each
cluster, and texts are drawn with weight P(c) M(c)^gamma.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from opd.data.engine.runner import read_source, write_manifest
from opd.data.engine.stage import ClipStore, Drop, Record, audio_parts, last_question
from opd.evaluate.records import read_records
from opd.report.blocks import BLUE, Heading, Paragraph, Table, document, figure
from opd.scoring.words import normal, word_count
from opd.settings import Section, UserError, first_line
from opd.storage.json_lines import write_atomic

MEASURED = "misalignment/sampled"  # of a record, by `opd eval`
FIT = 20000  # texts that the clusters are fitted to: the balanced assignment is a flow problem, slow beyond
BATCH = 256
Texts = Sequence[str]
Row = dict[str, Any]  # a cluster of select.json
EXAMPLES = 3  # texts of a cluster that the page shows


class Selection(Section):
    """Settings of `opd data select`."""

    hours: PositiveFloat = Field(description="of speech to choose")
    seconds_per_word: PositiveFloat = Field(0.4, description="of a text without a field `seconds`")
    clusters: PositiveInt = Field(100, description="of the corpus, alike in size")
    embedding: str = Field("tfidf", description="tfidf, or a sentence-transformers model")
    dimensions: PositiveInt = Field(64, description="that TF-IDF is reduced to by an SVD")
    gamma: NonNegativeFloat = Field(5.0, description="a cluster's weight is P(c) M(c)^gamma; 0 chooses uniformly")
    drop_worst: float = Field(0.15, ge=0, lt=1, description="share of clusters left out, those with the worst `wer`")
    prior: NonNegativeFloat = Field(1.0, description="probe records of mean misalignment that a cluster begins with")
    seed: NonNegativeInt = Field(0, description="of the clusters and of the draw")


def select(source: str, probes: list[Path], out: Path, settings: Selection) -> list[Path]:
    """Choose records of the manifest `source` and write them to `out`, with `cluster` and `odds` in each.

    probes: folders of `opd eval`, whose records have misalignment, of a student on a few spoken texts. Returns what was
    written: the manifest, and select.json and select.html in `<out without suffix>.select/`. Raises UserError for a
    manifest or folders without such records, and a budget that no text fits in.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {out}: expected a file name that ends in .jsonl or .parquet")
    print(f"reading {source}", flush=True)
    records, texts, bad = _usable(source)
    told = f"{len(bad)} of {len(records) + len(bad)} records cannot be used, the first: {bad[0]}" if bad else ""
    if len(records) < settings.clusters:
        few = f"{len(records)} usable records make no {settings.clusters} clusters; set clusters="
        raise UserError(f"{source}: {few}" + f" ({told})" * bool(bad))
    if bad:
        print(f"{source}: {told}", file=sys.stderr)
    measured = [r for folder in probes for r in read_records(folder) if r.get(MEASURED)]
    if not measured:
        names = ", ".join(map(str, probes))
        raise UserError(f"{names}: expected records with a misalignment, found none; measure them with `opd eval`")
    # of lines of `role: text`, as `opd eval` writes a chat: what the user said last
    asked = [f"\n{r['question']}".rpartition("\nuser: ")[2] for r in measured]
    print(f"{len(texts)} texts into {settings.clusters} clusters by {settings.embedding}: minutes if many", flush=True)
    found = cluster(texts, asked, settings.clusters, settings.embedding, settings.dimensions, settings.seed)
    count = settings.clusters
    nats = np.array([r[MEASURED]["nats"] for r in measured], dtype=np.float64)
    tokens = np.array([r[MEASURED]["tokens"] for r in measured], dtype=np.float64)
    m = misalignment(found.probe, nats, tokens, count, settings.prior)
    sizes = np.bincount(found.corpus, minlength=count)
    wer = _wer(found.probe, measured, count)
    probability = weights(sizes / sizes.sum(), m, settings.gamma, wer, settings.drop_worst)
    seconds = np.array([_seconds(r, t, settings) for r, t in zip(records, texts, strict=True)])
    chosen = draw(found.corpus, probability, seconds, 3600 * settings.hours, settings.seed)
    if len(chosen) == 0:
        raise UserError(f"hours: {settings.hours:g} h hold no text; the shortest takes {seconds.min():.1f} s")
    probed, drawn = (np.bincount(of, minlength=count) for of in (found.probe, found.corpus[chosen]))
    rows: list[Row] = []
    for c in range(count):
        row: Row = {"cluster": c, "texts": int(sizes[c]), "probes": int(probed[c]), "misalignment": float(m[c])}
        row |= {"wer": None if np.isnan(wer[c]) else float(wer[c]), "probability": float(probability[c])}
        examples = [texts[i] for i in np.flatnonzero(found.corpus == c)[:EXAMPLES]]
        rows.append(row | {"chosen": int(drawn[c]), "examples": examples})
    odds = probability / (sizes / sizes.sum())  # how much likelier a text of a cluster is drawn than by chance
    of = found.corpus
    picked = [records[i] | {"cluster": str(of[i]), "odds": float(odds[of[i]])} for i in chosen]
    hours = float(seconds[chosen].sum() / 3600)
    total = {"texts": len(chosen), "of": len(records), "unusable": len(bad), "hours": hours}
    about = {"source": source, "settings": settings.model_dump(), "total": total}
    return _write(picked, rows, about, out)


def _usable(source: str) -> tuple[list[Record], list[str], list[str]]:
    """Records that ask something, what each asks, and the others with their reasons."""
    records, texts, bad = [], [], []
    for place, record in read_source(source):
        try:
            if isinstance(record, ValueError):
                raise record
            texts.append(question(record))
            records.append(record)
        except (ValueError, Drop) as e:
            bad.append(f"{place}: {e}")
    return records, texts, bad


def question(record: Record) -> str:
    """What is spoken: the transcripts of the record's last user turn that has any, else its last question.

    Raises Drop for a record that asks nothing.
    """
    for message in reversed(record["messages"]):
        parts = message["content"] if isinstance(message["content"], list) else []
        if message["role"] == "user" and (said := [p["transcript"] for p in parts if p["type"] == "audio"]):
            return " ".join(said)
    return last_question(record)[1]


def _wer(found: np.ndarray, measured: list[Record], count: int) -> np.ndarray:
    """[count] mean word error rate of the probe's clips by cluster, NaN where no record has one."""
    known = [(c, r["numbers"]["wer"]) for c, r in zip(found, measured, strict=True) if "wer" in r.get("numbers", {})]
    at, values = np.array([c for c, _ in known], dtype=int), np.array([w for _, w in known], dtype=np.float64)
    many = np.bincount(at, minlength=count)
    return np.where(many > 0, np.bincount(at, values, count) / np.maximum(many, 1), np.nan)


def _seconds(record: Record, text: str, settings: Selection) -> float:
    found = record.get("seconds")
    return float(found) if isinstance(found, int | float) else settings.seconds_per_word * word_count(text)


def _write(picked: list[Record], rows: list[Row], about: dict[str, Any], out: Path) -> list[Path]:
    folder = out.with_suffix(".select")
    aside = folder / "aside"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        store = ClipStore(out.parent, aside)
        for record in picked:
            for part in audio_parts(record):
                part["path"] = store.adopt(part["path"])
        write_manifest(picked, out, aside)
        write_atomic(folder / "select.json", json.dumps(about | {"clusters": rows}, indent=1) + "\n")
        write_atomic(folder / "select.html", _page(rows, about["total"], about["source"]))
    except OSError as e:
        raise UserError(f"{e.filename or out.parent}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [out, folder / "select.json", folder / "select.html"]


def _page(rows: list[Row], total: dict[str, Any], source: str) -> str:
    def draw(fig: Any) -> None:
        ax = fig.subplots()
        ax.grid(True)
        ax.set(xlabel="misalignment M(c), nats per token", ylabel="probability of the cluster")
        sizes = [10 + 4 * r["probes"] for r in rows]
        xs, ys = [r["misalignment"] for r in rows], [r["probability"] for r in rows]
        ax.scatter(xs, ys, s=sizes, color=BLUE, alpha=0.6, label="a cluster; larger: more probe records")

    heads = ["cluster", "M(c)", "WER %", "texts", "probe records", "probability %", "chosen"]
    lines = []
    for r in sorted(rows, key=lambda r: -r["probability"]):
        name = f"{r['cluster']}: {' · '.join(e.partition(': ')[2][:60] for e in r['examples'])}"
        wer = "" if r["wer"] is None else f"{100 * r['wer']:.1f}"
        m, chance = f"{r['misalignment']:.3f}", f"{100 * r['probability']:.2f}"
        lines.append([name, m, wer, str(r["texts"]), str(r["probes"]), chance, str(r["chosen"])])
    told = f"{total['texts']} of {total['of']} texts of {source}, about {total['hours']:.2f} hours of speech."
    plot = figure("Misalignment and probability of every cluster.", draw, (7.0, 4.0))
    table = Table(heads, lines, "Likeliest first, with texts of each.")
    title = "What to speak"
    return document(title, [Heading(title, 1), Paragraph(told), plot, table])


class Clusters(NamedTuple):
    """A partition of texts."""

    corpus: np.ndarray  # [N] cluster of each text of the corpus
    probe: np.ndarray  # [n] cluster of each probe text


def cluster(corpus: Texts, probe: Texts, count: int, embedding: str, size: int, seed: int) -> Clusters:
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
    return Clusters(found, nearest(asked, model.cluster_centers_))


def embed(corpus: Texts, probe: Texts, embedding: str, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [N, D] and [n, D] of texts; what is learnt for it is learnt from the corpus."""
    from sklearn.preprocessing import normalize

    if embedding == "tfidf":
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(sublinear_tf=True, analyzer=lambda text: normal(text).split())
        counts = words.fit_transform(corpus)
        svd = TruncatedSVD(min(size, min(counts.shape) - 1), random_state=seed)
        vectors = svd.fit_transform(counts), svd.transform(words.transform(probe))
    else:
        model = _sentence_model(embedding)
        vectors = tuple(model.encode(list(t), batch_size=BATCH, show_progress_bar=True) for t in (corpus, probe))
    return normalize(vectors[0].astype(np.float64)), normalize(vectors[1].astype(np.float64))


def _sentence_model(name: str) -> Any:
    """Raises UserError for a model that is not there, or has pickled weights alone."""
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        # the modules behind the encoder, such as Dense, fall back to pickled weights whatever `use_safetensors` says
        with patch.object(torch, "load", side_effect=ValueError("a module has pickled weights alone, no safetensors")):
            return SentenceTransformer(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        expected = "expected tfidf or a sentence-transformers model with safetensors"
        raise UserError(f"embedding {name}: {expected}: {first_line(e)[:300]}") from e


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
