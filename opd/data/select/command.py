"""`opd data select`: which texts to have spoken, given what a student hears badly (SALAD, arXiv 2510.13632)."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from opd.data.engine import manifest
from opd.data.engine.clip_store import ClipStore
from opd.data.engine.runner import read_source
from opd.data.engine.stage import Drop, Record, audio_parts
from opd.data.select import clusters
from opd.data.stages.turns import last_question
from opd.evaluate.records import read_records
from opd.report.blocks import BLUE, Heading, Paragraph, Table, document, figure
from opd.settings import Section, UserError
from opd.storage.json_lines import write_atomic

MEASURED = "misalignment/sampled"  # of a record, by `opd eval`
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


@dataclass(frozen=True)
class Row:
    """One cluster of the page."""

    cluster: int
    texts: int
    probes: int
    misalignment: float
    wer: float | None
    probability: float
    chosen: int
    examples: list[str]


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
    asked = [_last_turn(str(r["question"])) for r in measured]
    print(f"{len(texts)} texts into {settings.clusters} clusters by {settings.embedding}: minutes if many", flush=True)
    found = clusters.cluster(texts, asked, settings.clusters, settings.embedding, settings.dimensions, settings.seed)
    nats = np.array([r[MEASURED]["nats"] for r in measured], dtype=np.float64)
    tokens = np.array([r[MEASURED]["tokens"] for r in measured], dtype=np.float64)
    m = clusters.misalignment(found.probe, nats, tokens, found.count, settings.prior)
    sizes = np.bincount(found.corpus, minlength=found.count)
    wer = _wer(found.probe, measured, found.count)
    probability = clusters.weights(sizes / sizes.sum(), m, settings.gamma, wer, settings.drop_worst)
    seconds = np.array([_seconds(r, t, settings) for r, t in zip(records, texts, strict=True)])
    chosen = clusters.draw(found.corpus, probability, seconds, 3600 * settings.hours, settings.seed)
    if len(chosen) == 0:
        raise UserError(f"hours: {settings.hours:g} h hold no text; the shortest takes {seconds.min():.1f} s")
    probed, drawn = (np.bincount(of, minlength=found.count) for of in (found.probe, found.corpus[chosen]))
    rows = []
    for c in range(found.count):
        error = None if np.isnan(wer[c]) else float(wer[c])
        examples = [texts[i] for i in np.flatnonzero(found.corpus == c)[:EXAMPLES]]
        numbers = int(sizes[c]), int(probed[c]), float(m[c]), error, float(probability[c]), int(drawn[c])
        rows.append(Row(c, *numbers, examples))
    odds = probability / (sizes / sizes.sum())  # how much likelier a text of a cluster is drawn than by chance
    of = found.corpus
    picked = [records[i] | {"cluster": str(of[i]), "odds": float(odds[of[i]])} for i in chosen]
    hours = float(seconds[chosen].sum() / 3600)
    total = {"texts": len(chosen), "of": len(records), "unusable": len(bad), "hours": hours}
    return _write(picked, rows, total, settings, source, out)


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


def _last_turn(chat: str) -> str:
    """Of a chat as `opd eval` writes a record's question, lines of `role: text`: what the user said last."""
    return f"\n{chat}".rpartition("\nuser: ")[2]


def question(record: Record) -> str:
    """What is spoken: the transcripts of the record's last user turn that has any, else its last question.

    Raises Drop for a record that asks nothing.
    """
    for message in reversed(record["messages"]):
        parts = message["content"] if isinstance(message["content"], list) else []
        if message["role"] == "user" and (said := [p["transcript"] for p in parts if p["type"] == "audio"]):
            return " ".join(said)
    return last_question(record).text


def _wer(found: np.ndarray, measured: list[Record], count: int) -> np.ndarray:
    """[count] mean word error rate of the probe's clips by cluster, NaN where no record has one."""
    known = [(c, r["numbers"]["wer"]) for c, r in zip(found, measured, strict=True) if "wer" in r.get("numbers", {})]
    at, values = np.array([c for c, _ in known], dtype=int), np.array([w for _, w in known], dtype=np.float64)
    many = np.bincount(at, minlength=count)
    return np.where(many > 0, np.bincount(at, values, count) / np.maximum(many, 1), np.nan)


def _seconds(record: Record, text: str, settings: Selection) -> float:
    found = record.get("seconds")
    return float(found) if isinstance(found, int | float) else settings.seconds_per_word * len(text.split())


def _write(
    picked: list[Record], rows: list[Row], total: dict[str, Any], settings: Selection, source: str, out: Path
) -> list[Path]:
    folder = out.with_suffix(".select")
    aside = folder / "aside"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        store = ClipStore(out.parent, aside)
        for record in picked:
            for part in audio_parts(record):
                part["path"] = store.relative(store.adopt(Path(part["path"])))
        manifest.write(picked, out, aside)
        about = {"source": source, "settings": settings.model_dump(), "total": total}
        write_atomic(folder / "select.json", json.dumps(about | {"clusters": [vars(r) for r in rows]}, indent=1) + "\n")
        write_atomic(folder / "select.html", _page(rows, total, source))
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
        sizes = [10 + 4 * r.probes for r in rows]
        xs, ys = [r.misalignment for r in rows], [r.probability for r in rows]
        ax.scatter(xs, ys, s=sizes, color=BLUE, alpha=0.6, label="a cluster; larger: more probe records")

    heads = ["cluster", "M(c)", "WER %", "texts", "probe records", "probability %", "chosen"]
    lines = []
    for r in sorted(rows, key=lambda r: -r.probability):
        name = f"{r.cluster}: {' · '.join(e.partition(': ')[2][:60] for e in r.examples)}"
        wer = "" if r.wer is None else f"{100 * r.wer:.1f}"
        chance = f"{100 * r.probability:.2f}"
        lines.append([name, f"{r.misalignment:.3f}", wer, str(r.texts), str(r.probes), chance, str(r.chosen)])
    told = f"{total['texts']} of {total['of']} texts of {source}, about {total['hours']:.2f} hours of speech."
    plot = figure("Misalignment and probability of every cluster.", draw, (7.0, 4.0))
    table = Table(heads, lines, "Likeliest first, with texts of each.")
    title = "What to speak"
    return document(title, [Heading(title, 1), Paragraph(told), plot, table])
