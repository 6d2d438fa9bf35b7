"""The pages of `opd data card`: card.html, which loads nothing from anywhere, and the README.md of a data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from opd.data.card.sheet import SHOWN, Sheet
from opd.report.html import COLOURS, document, figure, table, table_row

BINS = 40
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
Split = dict[str, Any]  # of card.json
Cell = Callable[[Split], str]


def _spread(of: dict[str, float] | None, digits: int, scale: float = 1.0) -> str:
    """Median, and the range that holds nine tenths."""
    if of is None:
        return "–"
    low, half, high = (f"{scale * of[k]:.{digits}f}" for k in ("p5", "median", "p95"))
    return f"{half} ({low} to {high})"


def _mean(of: dict[str, float] | None, digits: int, scale: float = 1.0) -> str:
    return "–" if of is None else f"{scale * of['mean']:.{digits}f}"


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
    "WER, mean %": lambda s: _mean(s["wer"], 1, 100),
}
TROUBLES: dict[str, Cell] = {
    "questions asked again": lambda s: _again(s["duplicates"]["same_question"]),
    "nearly the same": lambda s: str(len(s["duplicates"]["near"])),
    "clips used again": lambda s: _again(s["duplicates"]["same_clip"]),
    "records not usable": lambda s: str(len(s["bad"])),
    "clips not readable": lambda s: str(len(s["clips"]["unreadable"])),
}
ABOUT = "Median, and in brackets the range that holds nine tenths. WER as the records have it."
ABOUT_TROUBLES = (
    "Asked again: the same words, in any case and punctuation. Nearly the same: Jaccard similarity of 3-word shingles "
    "of 0.8 or more to an earlier question of the split. Used again: the same bytes."
)


def _again(groups: list[list[str]]) -> str:
    return str(sum(len(names) - 1 for names in groups))


# ---- card.html --------------------------------------------------------------------------------------------------


def page(content: dict[str, Any], sheets: Sequence[Sheet]) -> str:
    """One HTML document from the content of card.json and the lengths in the sheets."""
    splits: dict[str, Split] = content["splits"]
    body = [
        f"<h1>{escape(content['title'])}</h1>",
        *(f'<p class="warn">{escape(line)}</p>' for line in _warnings(content)),
        _table(splits, COLUMNS, ABOUT),
        "<h2>Lengths</h2>",
        _histogram("seconds", "Lengths of clips.", "seconds", {s.name: s.seconds for s in sheets}),
        _histogram("words", "Lengths of questions.", "words", {s.name: s.words for s in sheets}),
    ]
    if any(s.wer for s in sheets):
        caption = "Word error rate of a recogniser, against the transcripts."
        body.append(_histogram("wer", caption, "WER, %", {s.name: [100 * w for w in s.wer] for s in sheets}))
    for what, title in (("groups", "Groups"), ("speakers", "Speakers")):
        if any(split[what] for split in splits.values()):
            body += [f"<h2>{title}</h2>", _counts(splits, what)]
    body += [
        "<h2>Vocabulary</h2>",
        _counts({s.name: {"words": dict(s.vocabulary)} for s in sheets}, "words"),
        "<h2>Fields</h2>",
        _counts(splits, "fields"),
        "<h2>Duplicates and bad records</h2>",
        _table(splits, TROUBLES, ABOUT_TROUBLES),
        *(_details(name, split) for name, split in splits.items()),
        "<h2>How it was made</h2>",
        *(_made(name, split) for name, split in splits.items()),
    ]
    return document(content["title"], "".join(body))


def _warnings(content: dict[str, Any]) -> list[str]:
    shared, speakers = content["leaks"], content["shared_speakers"]
    found = []
    if speakers:
        names = [f"{name} ({', '.join(splits)})" for name, splits in list(speakers.items())[:SHOWN]]
        more = f" and {len(speakers) - SHOWN} more in card.json" if len(speakers) > SHOWN else ""
        found.append(f"Note: speakers or voices in more than one split ({len(speakers)}): {', '.join(names)}{more}.")
    if not shared:
        return found
    lines = [f"{s['what']}: {' = '.join(s['records'])}" for s in shared[:SHOWN]]
    more = f" and {len(shared) - SHOWN} more in card.json" if len(shared) > SHOWN else ""
    return [f"Splits leak into one another, in {len(shared)} questions or clips: {'; '.join(lines)}{more}.", *found]


def _table(splits: dict[str, Split], columns: dict[str, Cell], about: str) -> str:
    rows = [table_row(name, [show(split) for show in columns.values()]) for name, split in splits.items()]
    return table(["split", *columns], rows, about)


def _counts(splits: dict[str, Split], what: str) -> str:
    """A row for each of what there is most of, a column for each split."""
    total: dict[str, float] = {}
    for split in splits.values():
        for name, found in split[what].items():
            total[name] = total.get(name, 0) + _records(found)
    names = sorted(total, key=lambda n: -total[n])
    rows = [table_row(n, [_count(split[what].get(n)) for split in splits.values()]) for n in names[:SHOWN]]
    more = f" {len(names) - SHOWN} more are in card.json." if len(names) > SHOWN and what != "words" else ""
    unit = {"words": "Occurrences of the most frequent words.", "speakers": "Records, and hours in brackets."}
    return table([what.removesuffix("s"), *splits], rows, unit.get(what, "Records.") + more)


def _records(found: Any) -> float:
    return found["records"] if isinstance(found, dict) else found


def _count(found: Any) -> str:
    if found is None:
        return "–"
    return f"{found['records']} ({found['hours']:.2f})" if isinstance(found, dict) else str(found)


def _histogram(key: str, caption: str, label: str, values: dict[str, Sequence[float]]) -> str:
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
            edges = np.histogram_bin_edges(everything, BINS)
        for k, (name, of) in enumerate(values.items()):
            if of:
                shares = np.histogram(of, edges)[0] / len(of)
                colour = COLOURS[k % len(COLOURS)]
                ax.plot((edges[:-1] + edges[1:]) / 2, shares, drawstyle="steps-mid", color=colour, label=name)

    return figure(key, caption, draw, (8.0, 2.8), label)


def _details(name: str, split: Split) -> str:
    again = split["duplicates"]
    lists = {
        "questions asked again": [" = ".join(names) for names in again["same_question"]],
        "nearly the same as an earlier one": again["near"],
        "clips used again": [" = ".join(names) for names in again["same_clip"]],
        "records not usable": split["bad"],
        "clips not readable": split["clips"]["unreadable"],
    }
    parts = []
    for title, lines in lists.items():
        more = [f"… {len(lines) - SHOWN} more in card.json"] if len(lines) > SHOWN else []
        if lines:
            text = escape("\n".join([*lines[:SHOWN], *more]))
            parts.append(f"<details><summary>{escape(name)}: {title}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _made(name: str, split: Split) -> str:
    steps = "".join(f"<pre>{escape(json.dumps(step, indent=1, ensure_ascii=False))}</pre>" for step in split["made"])
    told = " from ".join(step["stage"] for step in split["made"]) or "not by stages of opd data"
    return f"<details><summary>{escape(name)}: {escape(told)}</summary>{steps}</details>"


# ---- README.md --------------------------------------------------------------------------------------------------


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
    parts = [
        f"---\n{front.to_yaml().strip()}\n---\n\n# {_text(content['title'])}",
        f"{total} prompts with {hours:.2f} hours of speech. A record is one prompt: a chat in `messages`, whose audio "
        "parts carry `path`, relative to the manifest, and `transcript`.",
        *(f"**{_text(line)}**" for line in _warnings(content)),
        "## Splits",
        _markdown(splits, COLUMNS),
        ABOUT,
        "## Fields",
        "\n".join(_field(name, splits) for name in dict.fromkeys(f for s in splits.values() for f in s["fields"])),
        "## Duplicates and bad records",
        _markdown(splits, TROUBLES),
        ABOUT_TROUBLES,
        "## How it was made",
        "\n".join(_steps(name, split) for name, split in splits.items()),
        "Settings and counts of every step are in card.json, charts in card.html.",
        "## Licence",
        content.get("license", "Not stated: those of the texts, the voices and the recordings apply."),
    ]
    return "\n\n".join(parts) + "\n"


def _field(name: str, splits: dict[str, Split]) -> str:
    counts = (f"{s['fields'].get(name, 0)} of {s['records']} in {split}" for split, s in splits.items())
    return f"- {_text(name)}: {', '.join(counts)}"


def _from(out: Path, manifest: Path) -> str:
    """How a card in `out` names a manifest; by its name alone where it does not lie below."""
    below = manifest.resolve()
    return below.relative_to(out.resolve()).as_posix() if below.is_relative_to(out.resolve()) else manifest.name


def _markdown(splits: dict[str, Split], columns: dict[str, Cell]) -> str:
    rows = [[name, *(show(split) for show in columns.values())] for name, split in splits.items()]
    head = ["split", *columns]
    lines = [head, ["---"] + ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _steps(name: str, split: Split) -> str:
    steps = split["made"]
    if not steps:
        return f"- {name}: not by stages of `opd data`"
    told = " from ".join(f"`{s['stage']}` ({s['written']} of {s['read']} records)" for s in steps)
    return f"- {name}: {told} from {_text(steps[-1]['source'])}"


def _text(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("\n", " ")
