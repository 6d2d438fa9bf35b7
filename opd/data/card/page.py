"""`opd data card`: what is in manifests, in numbers: card.json, card.html and README.md, a dataset card of the Hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opd.data.card.sheet import SHOWN, Asked, Sheet, in_several, leaks, sheet_of
from opd.report.blocks import (
    COLOURS,
    Block,
    Bullets,
    Details,
    Figure,
    Heading,
    Paragraph,
    Table,
    document,
    figure,
    markdown,
)
from opd.settings import UserError
from opd.storage.json_lines import write_atomic

NAMED = 5  # records in a message
BINS = 40
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
Split = dict[str, Any]  # of card.json
Cell = Callable[[Split], str]


def _spread(of: dict[str, float] | None, digits: int) -> str:
    """Median, and the range that holds nine tenths."""
    if of is None:
        return "–"
    low, half, high = (f"{of[k]:.{digits}f}" for k in ("p5", "median", "p95"))
    return f"{half} ({low} to {high})"


def _number(found: Callable[[Split], list[Any]], split: Split) -> str:
    return str(sum(len(one) - 1 if isinstance(one, list) else 1 for one in found(split)))


COLUMNS: dict[str, Cell] = {
    "records": lambda s: str(s["records"]),
    "hours": lambda s: f"{s['clips']['hours']:.2f}",
    "clips": lambda s: str(s["clips"]["count"]),
    "seconds a clip": lambda s: _spread(s["clips"]["seconds"], 1),
    "words a question": lambda s: _spread(s["words"], 0),
    "word types": lambda s: str(s["vocabulary"]["types"]),
    "word tokens": lambda s: str(s["vocabulary"]["tokens"]),
    "speakers": lambda s: str(len(s["speakers"]) or "–"),
    "groups": lambda s: str(len(s["groups"]) or "–"),
    "WER, mean %": lambda s: "–" if s["wer"] is None else f"{100 * s['wer']['mean']:.1f}",
}
LISTED: dict[str, Callable[[Split], list[Any]]] = {  # a list in a list: records that are alike
    "questions asked again": lambda s: s["duplicates"]["same_question"],
    "nearly the same": lambda s: s["duplicates"]["near"],
    "clips used again": lambda s: s["duplicates"]["same_clip"],
    "records not usable": lambda s: s["bad"],
    "records with control tokens": lambda s: s["control_tokens"],
    "clips not readable": lambda s: s["clips"]["unreadable"],
}
LONGER = {"nearly the same": " as an earlier one", "records with control tokens": ", which training refuses"}
TROUBLES: dict[str, Cell] = {name: partial(_number, found) for name, found in LISTED.items()}
ABOUT = "Median, and in brackets the range that holds nine tenths. WER as the records have it."
ABOUT_TROUBLES = (
    "Asked again: the same words and signs, in any case and punctuation. Nearly the same: Jaccard similarity of 3-word "
    "shingles of 0.8 or more to an earlier question of the split. Used again: the same bytes."
)


def write_card(
    manifests: Sequence[Path], out: Path, allow_leaks: bool = False, about: dict[str, str] | None = None
) -> list[Path]:
    """Write card.json, card.html and README.md of manifests to the folder `out`; returns their paths.

    `about`: title, license, language, where known. Raises UserError for a manifest without a usable record, and, unless
    allow_leaks, for two manifests that share a question, nearly the same one, or a clip.
    """
    names = split_names(manifests)
    asked = Asked()
    sheets = [sheet_of(path, name, asked) for path, name in zip(manifests, names, strict=True)]
    shared = leaks(sheets)
    if shared and not allow_leaks:
        examples = "; ".join(f"the {s['what']} of {' = '.join(s['records'])}" for s in shared[:NAMED])
        kinds = Counter(s["what"] for s in shared)
        counts = " and ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in kinds.items())
        told = f"splits leak into one another: they share {counts}: {examples}{'; …' if len(shared) > NAMED else ''}"
        raise UserError(f"{told}; take them out of one manifest, or pass --allow-leaks")
    content: dict[str, Any] = {
        **({"title": out.resolve().name} | (about or {})),
        "splits": {s.name: s.summary() for s in sheets},
        "leaks": shared,
        # and the splits that have them; many data sets mean it so: it is no leak
        "shared_speakers": in_several([dict.fromkeys(s.speakers, s.name) for s in sheets]),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = {
            "card.json": json.dumps(content, indent=1, ensure_ascii=False),
            "card.html": document(content["title"], _blocks(content, sheets)),
            "README.md": readme(content, out),
        }
        for name, text in files.items():
            write_atomic(out / name, text)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror or e}") from e
    return [out / name for name in files]


def split_names(manifests: Sequence[Path]) -> list[str]:
    """A name for each manifest that the Hub takes for a split. Raises UserError for a manifest that is there twice."""
    files = [path.resolve() for path in manifests]
    names: list[str] = []
    for path in manifests:
        if path.resolve() in files[: len(names)]:
            raise UserError(f"{path}: is there twice")
        name = re.sub(r"\W+", "_", path.stem).strip("_") or "data"
        while name in names:
            name += "_"
        names.append(name)
    return names


def _blocks(content: dict[str, Any], sheets: Sequence[Sheet]) -> Iterator[Block]:
    """card.html, which loads nothing from anywhere, from the content of card.json and the lengths in the sheets."""
    splits: dict[str, Split] = content["splits"]
    yield Heading(content["title"], 1)
    yield from _warnings(content)
    yield _table(splits, COLUMNS, ABOUT)
    yield Heading("Lengths")
    yield _histogram("Lengths of clips.", "seconds", {s.name: s.seconds for s in sheets})
    yield _histogram("Lengths of questions.", "words", {s.name: s.words for s in sheets})
    if any(s.wer for s in sheets):
        caption = "Word error rate of a recogniser, against the transcripts."
        yield _histogram(caption, "WER, %", {s.name: [100 * w for w in s.wer] for s in sheets})
    for what, title in (("groups", "Groups"), ("speakers", "Speakers")):
        if any(split[what] for split in splits.values()):
            yield Heading(title)
            yield _counts(splits, what)
    yield Heading("Vocabulary")
    yield _counts({s.name: {"words": dict(s.vocabulary)} for s in sheets}, "words")
    yield Heading("Fields")
    yield _counts(splits, "fields")
    yield Heading("Duplicates and bad records")
    yield _table(splits, TROUBLES, ABOUT_TROUBLES)
    for name, split in splits.items():
        yield from _details(name, split)
    yield Heading("How it was made")
    for name, split in splits.items():
        told = " from ".join(step["stage"] for step in split["made"]) or "not by stages of opd data"
        steps = [json.dumps(step, indent=1, ensure_ascii=False) for step in split["made"]]
        yield Details(f"{name}: {told}", steps)


def _warnings(content: dict[str, Any]) -> list[Paragraph]:
    shared = [f"{s['what']}: {' = '.join(s['records'])}" for s in content["leaks"]]
    speakers = [f"{name} ({', '.join(splits)})" for name, splits in content["shared_speakers"].items()]
    found = []
    if shared:
        found.append(f"Splits leak into one another, in {len(shared)} questions or clips: {_some(shared, '; ')}.")
    if speakers:
        some = _some(speakers, ", ")
        found.append(f"Note: speakers or voices in more than one split ({len(speakers)}): {some}.")
    return [Paragraph(text, "warn") for text in found]


def _some(names: list[str], between: str) -> str:
    more = f" and {len(names) - SHOWN} more in card.json" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more


def _table(splits: dict[str, Split], columns: dict[str, Cell], about: str) -> Table:
    rows = [[name, *(show(split) for show in columns.values())] for name, split in splits.items()]
    return Table(["split", *columns], rows, about)


def _counts(splits: dict[str, Split], what: str) -> Table:
    """A row for each of what there is most of, a column for each split."""
    total: Counter[str] = Counter()
    for split in splits.values():
        total.update({n: f["records"] if isinstance(f, dict) else f for n, f in split[what].items()})
    rows = [[n, *(_count(split[what].get(n)) for split in splits.values())] for n, _ in total.most_common(SHOWN)]
    more = f" {len(total) - SHOWN} more are in card.json." if len(total) > SHOWN and what != "words" else ""
    unit = {"words": "Occurrences of the most frequent words.", "speakers": "Records, and hours in brackets."}
    return Table([what.removesuffix("s"), *splits], rows, unit.get(what, "Records.") + more)


def _count(found: Any) -> str:
    if found is None:
        return "–"
    return f"{found['records']} ({found['hours']:.2f})" if isinstance(found, dict) else str(found)


def _histogram(caption: str, label: str, values: dict[str, Sequence[float]]) -> Figure:
    import numpy as np

    everything = [v for of in values.values() for v in of]

    def draw(fig: Any) -> None:
        if not everything:
            return
        ax = fig.subplots()
        ax.grid(True, axis="y")
        ax.set(xlabel=label, ylabel="share")
        low, high = min(everything), max(everything)
        if all(isinstance(v, int) for v in everything) and high - low < BINS:
            edges = np.arange(low - 0.5, high + 1)  # a bin for each number
        else:
            edges = np.linspace(low, high if high - low > 1e-6 else low + 1, BINS + 1)
        for k, (name, of) in enumerate(values.items()):
            if of:
                shares = np.histogram(of, edges)[0] / len(of)
                colour = COLOURS[k % len(COLOURS)]
                ax.plot((edges[:-1] + edges[1:]) / 2, shares, drawstyle="steps-mid", color=colour, label=name)

    return figure(caption, draw, (8.0, 2.8), label)


def _details(name: str, split: Split) -> Iterator[Details]:
    for title, found in LISTED.items():
        lines = [" = ".join(one) if isinstance(one, list) else one for one in found(split)]
        more = [f"… {len(lines) - SHOWN} more in card.json"] if len(lines) > SHOWN else []
        if lines:
            yield Details(f"{name}: {title}{LONGER.get(title, '')}", ["\n".join([*lines[:SHOWN], *more])])


def readme(content: dict[str, Any], out: Path) -> str:
    """A dataset card: front matter that the Hub reads, then the numbers."""
    from huggingface_hub import DatasetCardData

    splits: dict[str, Split] = content["splits"]
    total = sum(s["records"] for s in splits.values())
    files = [{"split": name, "path": _from(out, Path(s["manifest"]))} for name, s in splits.items()]
    front = DatasetCardData(
        language=content.get("language"),
        license=content.get("license"),
        task_categories=["audio-text-to-text"],
        size_categories=next((name for most, name in SIZES if total < most), "n>10M"),
        pretty_name=content["title"],
        tags=["speech", "spoken-prompts"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    hours = sum(s["clips"]["hours"] for s in splits.values())
    fields = {
        f: ", ".join(f"{s['fields'].get(f, 0)} of {s['records']} in {name}" for name, s in splits.items())
        for f in dict.fromkeys(f for s in splits.values() for f in s["fields"])
    }
    about = (
        f"{total} prompts with {hours:.2f} hours of speech. A record is one prompt: a chat in `messages`, whose audio "
        "parts carry `path`, relative to the manifest, and `transcript`."
    )
    blocks: list[Block] = [
        Heading(content["title"], 1),
        Paragraph(about),
        *_warnings(content),
        Heading("Splits"),
        _table(splits, COLUMNS, ABOUT),
        Heading("Fields"),
        Bullets([Paragraph(f"{name}: {counts}") for name, counts in fields.items()]),
        Heading("Duplicates and bad records"),
        _table(splits, TROUBLES, ABOUT_TROUBLES),
        Heading("How it was made"),
        Bullets([_steps(name, split) for name, split in splits.items()]),
        Paragraph("Settings and counts of every step are in card.json, charts in card.html."),
        Heading("Licence"),
        Paragraph(content.get("license", "Not stated: those of the texts, the voices and the recordings apply.")),
    ]
    return f"---\n{front.to_yaml()}\n---\n\n{markdown(blocks)}"


def _steps(name: str, split: Split) -> Paragraph:
    told = " from ".join(f"`{s['stage']}` ({s['written']} of {s['read']} records)" for s in split["made"])
    source = f" from {split['made'][-1]['source']}" if split["made"] else "not by stages of `opd data`"
    return Paragraph(f"{name}: {told}{source}")


def _from(out: Path, manifest: Path) -> str:
    """How a card in `out` names a manifest; by its name alone where it does not lie below."""
    below = manifest.resolve()
    return below.relative_to(out.resolve()).as_posix() if below.is_relative_to(out.resolve()) else manifest.name
