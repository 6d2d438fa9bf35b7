"""Does `opd data select` lower misalignment where it is highest, more than a uniform choice of as many hours?

    python recipes/tiny/select_study.py --jobs 2

Two worlds, that of recipes/tiny twice:

    natural   the base student, and its training questions as they are
    rare      a student warm-started on all skills but arithmetic, and other questions, a tenth of them arithmetic

In each: the corpus, a probe (`opd eval` of the student on the validation split), a choice of texts for every seed and
exponent (`opd data select`), and `opd study recipes/tiny/select_study.yaml`, which trains on what was chosen. All of it
lies in data/tiny_select and runs/select; what is there is not made again. Ends with a table by skill, in
runs/select/select.md and select.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STUDY = HERE / "select_study.yaml"
DATA, RUNS = Path("data/tiny_select"), Path("runs/select")
TRAIN, FIRST = 6000, 2000  # questions spoken; those before FIRST are the natural corpus, and the warm start's of `rare`
RARE, SHARE = "arithmetic", 0.1
HOURS = 0.05  # of speech to choose: 180 s
WARM_STEPS, PROMPTS, RATE = 40, 64, 4e-4  # KD as docs/results/study.md has it
MIXED = "as in the corpus"
Record = dict[str, Any]


def main() -> None:
    """Make what is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default %(default)s)")
    parser.add_argument("--world", action="append", help="one world only; may be repeated (default: all)")
    parser.add_argument("--report-only", action="store_true", help="only the table, of what is there")
    args = parser.parse_args()
    from opd.settings import UserError
    from opd.study.spec import read_study

    try:
        spec = read_study(STUDY)
        worlds = args.world or list(spec.worlds)
        if unknown := set(worlds) - set(spec.worlds):
            parser.error(f"--world: expected one of {', '.join(spec.worlds)}, found {min(unknown)}")
        if not args.report_only:
            make_corpora()
            for world in worlds:
                choose(spec, world)
            patterns = [part for world in worlds for part in ("--only", f"{world}/*")]
            run("study", str(STUDY), "--jobs", str(args.jobs), *patterns)
        report(spec, worlds)
    except UserError as e:
        parser.error(str(e))
    except subprocess.CalledProcessError as e:
        sys.exit(e.returncode)


def run(*argv: str) -> None:
    """A command of `opd`, which is shown. Raises CalledProcessError when it fails."""
    print("opd", shlex.join(argv), flush=True)
    subprocess.run([sys.executable, "-m", "opd.cli", *argv], check=True)


# ---- what is chosen from ------------------------------------------------------------------------------------------


def corpus_of(world: str) -> Path:
    """The manifest that is chosen from."""
    return DATA / f"corpus_{world}.jsonl"


def make_corpora() -> None:
    """Speak the questions, then write a corpus for each world and the warm start's manifest."""
    import soundfile
    from make_data import make

    make(DATA, {"train": TRAIN, "validation": 400, "test": 600}, 0)
    train = read(DATA / "train.jsonl")
    for record in train:
        record["seconds"] = soundfile.info(DATA / record["messages"][0]["content"][0]["path"]).duration
    first, later = train[:FIRST], train[FIRST:]
    write(corpus_of("natural"), first)
    write(corpus_of("rare"), thinned(later, RARE, SHARE))
    write(DATA / "warmstart.jsonl", [r for r in first if r["group"] != RARE])


def thinned(records: list[Record], skill: str, share: float) -> list[Record]:
    """The records, of `skill` only the first, so many that they are `share` of what is left."""
    others = sum(r["group"] != skill for r in records)
    room, kept = round(others * share / (1 - share)), list[Record]()
    for record in records:
        if record["group"] == skill:
            room -= 1
        if record["group"] != skill or room >= 0:
            kept.append(record)
    return kept


def read(path: Path) -> list[Record]:
    """A manifest."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: Iterable[Record]) -> None:
    """A manifest, which is left alone when it is the same already: its time tells what is newer."""
    text = "".join(json.dumps(r) + "\n" for r in records)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


# ---- what is chosen -----------------------------------------------------------------------------------------------


def probe_of(world: str) -> Path:
    """The folder of the student's evaluation."""
    return RUNS / world / "probe"


def choose(spec: Any, world: str) -> None:
    """Warm-start the student where the world asks for it, probe it, and choose texts for every seed and exponent."""
    student = spec.worlds[world]["student.path"]
    threads = [f"{key}=1" for key in ("launch.processes", "launch.threads", "rollout.server.threads")]
    if student.startswith(str(RUNS)):
        settings = {"train.steps": WARM_STEPS, "train.prompts_per_step": PROMPTS, "optim.lr": RATE, "run.dir": student}
        settings |= {
            "data.train": DATA / "warmstart.jsonl",
            "eval.start": "null",
            "eval.test": DATA / "validation.jsonl",
        }
        settings |= {"eval.retention": DATA / "retention_validation.jsonl"}
        run("launch", str(HERE / "1_warmstart.yaml"), *threads, *(f"{k}={v}" for k, v in settings.items()), "--plain")
    sources = [corpus_of(world), probe_of(world) / "records.jsonl"]
    if not sources[1].is_file():
        asked = [f"student.path={student}", f"eval.test={DATA / 'validation.jsonl'}", "eval.retention=null"]
        asked += ["eval.kl_limit=400", *threads]
        run("eval", str(HERE / "2_xopd.yaml"), *asked, "--out", str(probe_of(world)))
    for method in spec.methods:
        for seed in (*spec.selection.seeds, *spec.report.seeds):
            out, wanted = chosen(spec, world, method, seed), {"hours": HOURS, "gamma": exponent(method), "seed": seed}
            if is_made(out, wanted, sources):
                continue
            out.parent.mkdir(parents=True, exist_ok=True)
            how = [f"{key}={value:g}" for key, value in wanted.items()]
            run("data", "select", str(sources[0]), "--probe", str(probe_of(world)), "--out", str(out), *how)


def is_made(out: Path, wanted: dict[str, float], sources: list[Path]) -> bool:
    """Whether the texts were chosen with these settings, after all of the sources were written."""
    about = out.with_suffix(".select") / "select.json"
    if not out.is_file() or not about.is_file() or any(about.stat().st_mtime < s.stat().st_mtime for s in sources):
        return False
    return wanted.items() <= json.loads(about.read_text(encoding="utf-8"))["settings"].items()


def exponent(method: str) -> float:
    """The gamma of a method's name."""
    return float(method.removeprefix("gamma-"))


def chosen(spec: Any, world: str, method: str, seed: int) -> Path:
    """The manifest that a run trains on."""
    return Path(spec.methods[method].set["data.train"].format(world=world, seed=seed))


# ---- what came of it ----------------------------------------------------------------------------------------------


def report(spec: Any, worlds: list[str]) -> None:
    """Write and print the table of the worlds. Raises UserError where a row of the study is not complete."""
    from opd.settings import UserError

    path = Path(spec.out) / "study.json"
    if not path.is_file():
        raise UserError(f"{path}: expected the study's numbers, found no file; run without --report-only")
    study = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for world in (w for w in study["worlds"] if w["name"] in worlds):
        if open_ := [r for r in world["rows"] if not r["complete"]]:
            raise UserError(f"{path}: {world['name']}/{open_[0]['name']} is not complete: {open_[0]['state']}")
        found.append(summary(spec, world))
    text = "\n\n".join(map(table, found)) + "\n"
    for name, content in (("select.json", json.dumps(found, indent=1) + "\n"), ("select.md", text)):
        (RUNS / name).write_text(content, encoding="utf-8")
    print(f"{text}wrote {RUNS / 'select.json'}\nwrote {RUNS / 'select.md'}")


def summary(spec: Any, world: Record) -> Record:
    """What was chosen and what came of it, by skill; shares are of seconds.

    `all` is all records of the test split, MIXED the skills in the corpus's proportions.
    """
    name, rows = world["name"], {r["name"]: r for r in world["rows"]}
    corpus, probe, seeds = read(corpus_of(name)), by_skill(probe_of(name)), spec.report.seeds
    told = {row: measured(rows[row], corpus) for row in ("base", *spec.methods)}
    methods = {}
    for method in spec.methods:
        draws = [read(chosen(spec, name, method, seed)) for seed in seeds]
        methods[method] = {
            "rate": rows[method]["rate"],
            "texts": [len(d) for d in draws],
            "chosen": {skill: sum(shares(d).get(skill, 0.0) for d in draws) / len(draws) for skill in probe},
            **intervals(told[method]),
            "difference": intervals(told[method], told[spec.reference]),
        }
    return {
        "world": name,
        "weak": max(probe, key=lambda skill: probe[skill]),
        "probe": probe,
        "corpus": {"texts": len(corpus), "hours": sum(r["seconds"] for r in corpus) / 3600, "shares": shares(corpus)},
        "purity": purity(corpus),
        "before": intervals(told["base"]),
        "methods": methods,
    }


def measured(row: Record, corpus: list[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """A row of the study: M and spoken accuracy by skill and seed, and of all skills."""
    words: dict[str, int] = defaultdict(int)
    for r in corpus:
        words[r["group"]] += len(r["response"].split())
    found = {}
    for name, metric, weights in (
        ("M", "misalignment", words),
        ("spoken", "accuracy/speech", Counter(r["group"] for r in corpus)),
    ):
        of: dict[str, dict[int, float]] = defaultdict(dict)
        for seed, groups in row["groups_by_seed"].items():
            values = groups[metric.rpartition("/")[2]]
            whole = sum(weights.values())
            mixed = sum(n * values[skill] for skill, n in weights.items()) / whole
            for skill, value in (values | {"all": row["by_seed"][seed][metric], MIXED: mixed}).items():
                of[skill][int(seed)] = value
        found[name] = dict(of)
    return found


def intervals(told: Record, other: Record | None = None) -> Record:
    """Means over seeds with their intervals; against another row, of the differences paired by seed."""
    from pandas import DataFrame

    from opd.study.results import interval, paired

    found: Record = {}
    for name, of in told.items():
        values = DataFrame(of)
        found[name] = paired(values, DataFrame(other[name])) if other else {s: interval(values[s]) for s in values}
    return found


def by_skill(folder: Path) -> dict[str, float]:
    """M of each skill in nats per token, from the probe's records."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in read(folder / "records.jsonl"):
        if found := record.get("misalignment/sampled", record.get("misalignment")):
            total = sums[record["fields"]["group"]]
            total[0], total[1] = total[0] + found["nats"], total[1] + found["tokens"]
    return {skill: nats / tokens for skill, (nats, tokens) in sorted(sums.items())}


def shares(records: list[Record]) -> dict[str, float]:
    """Each skill's share of the seconds."""
    seconds: dict[str, float] = defaultdict(float)
    for r in records:
        seconds[r["group"]] += r["seconds"]
    return {skill: s / sum(seconds.values()) for skill, s in sorted(seconds.items())}


def purity(corpus: list[Record]) -> float:
    """Share of the corpus whose skill is the commonest of its cluster, in the clusters of the first seed."""
    import numpy as np

    from opd.data.select import Selection, cluster, question

    s = Selection(hours=HOURS)
    texts = [question(r) for r in corpus]
    found = cluster(texts, texts[:1], s.clusters, s.embedding, s.dimensions, s.seed).corpus
    skills = np.array([r["group"] for r in corpus])
    return float(sum(np.unique(skills[found == c], return_counts=True)[1].max() for c in set(found)) / len(corpus))


def table(found: Record) -> str:
    """Markdown of a world: a line a skill, the weak one in bold."""
    methods, corpus, before = found["methods"], found["corpus"], found["before"]
    rates = ", ".join(f"{m} {of['rate']:g}" for m, of in methods.items())
    told = (
        f"{found['world']}: {corpus['texts']} texts of {corpus['hours']:.2f} h, {HOURS} h of them chosen; the probe "
        f"finds {found['weak']} the weakest; {100 * found['purity']:.1f} % of the corpus has its cluster's commonest "
        f"skill; rates {rates}. ± half of the 95 % interval over "
        f"seeds; differences to {next(iter(methods))}, paired by seed."
    )
    others = list(methods)[1:]
    heads = ["skill", "% of corpus", *(f"% chosen, {m}" for m in methods), "M, probe"]
    for name in ("M", "spoken %"):
        heads += [f"{name}, before", *(f"{name}, {m}" for m in methods), *(f"{name}, {m}: difference" for m in others)]
    lines = [heads, ["---"] * len(heads)]
    for skill in before["M"]:
        one = skill in found["probe"]
        kept = [of.get(skill, 0.0) for of in (corpus["shares"], *(m["chosen"] for m in methods.values()))]
        cells = [f"**{skill}**" if skill == found["weak"] else skill]
        cells += [f"{100 * share:.0f}" if one else "" for share in kept]
        cells.append(f"{found['probe'][skill]:.2f}" if one else "")
        for name, scale, digits in (("M", 1, 3), ("spoken", 100, 1)):
            cells.append(f"{scale * before[name][skill]['mean']:.{digits}f}")
            cells += [spread(m[name][skill], scale, digits) for m in methods.values()]
            cells += [spread(methods[m]["difference"][name][skill], scale, digits, "+") for m in others]
        lines.append(cells)
    return "\n".join([told, "", *(f"| {' | '.join(line)} |" for line in lines)])


def spread(interval: Record, scale: float, digits: int, sign: str = "") -> str:
    """Mean ± half of the interval."""
    return f"{scale * interval['mean']:{sign}.{digits}f} ± {scale * (interval['half'] or 0.0):.{digits}f}"


if __name__ == "__main__":
    main()
