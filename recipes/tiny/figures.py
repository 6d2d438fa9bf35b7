"""The figures of the README: learning rates on the validation split, then three seeds on the test split.

    python recipes/tiny/figures.py sweep     # seed 0, every stage at several learning rates, validation split
    python recipes/tiny/figures.py seeds     # the recipes as they are, seeds 0 to 2, test split

Each run is an ordinary run folder below --out; what is finished is not run again. Prints a Markdown table and writes it
with its numbers to --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from opd.metrics import mean_stderr

HERE = Path(__file__).parent
STUDENT = f"student.path={HERE / 'student'}"
VALIDATION = ["data.train=data/tiny/train.jsonl", "eval.test=data/tiny/validation.jsonl"]
VALIDATION += ["eval.retention=data/tiny/retention_validation.jsonl", "eval.kl_limit=100"]
RATES = {"warmstart": ("2e-5", "5e-5", "1e-4", "2e-4"), "xopd": ("5e-5", "1e-4", "2e-4", "4e-4")}
CROSS = {"warmstart": "5e-5", "xopd": "2e-4"}  # every rate of one stage beside this one of the other
COLUMNS = ("accuracy/speech", "accuracy/text", "retention", "reverse_kl/speech", "misalignment", "forgetting")
SHARES = ("accuracy/speech", "accuracy/text", "retention")  # shown in percent

Evaluation = dict[str, Any]


def main() -> int:
    """`figures.py sweep` or `figures.py seeds`: run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "seeds"))
    parser.add_argument("--out", type=Path, default=Path("runs/figures"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows, table = sweep(args.out) if args.what == "sweep" else seeds(args.out, args.seeds)
    for name, text in ((f"{args.what}.json", json.dumps(rows, indent=2)), (f"{args.what}.md", table)):
        (args.out / name).write_text(text + "\n")
        print(f"wrote {args.out / name}")
    print(table)
    return 0


def sweep(out: Path) -> tuple[Any, str]:
    """Seed 0 on the validation split; a row per stage and learning rate, errors over questions."""
    rows: dict[str, Evaluation] = {}
    for rate in RATES["warmstart"]:
        start = "base" if not rows else ""
        found = launch("1_warmstart.yaml", out / f"sweep/warmstart_{rate}", [f"optim.lr={rate}", *VALIDATION], start)
        if start:
            rows["base"] = found["base"]
        rows[f"warm start, lr {rate}"] = found["warmstart"]
    pairs = [(CROSS["warmstart"], rate) for rate in RATES["xopd"]]
    pairs += [(rate, CROSS["xopd"]) for rate in RATES["warmstart"] if rate != CROSS["warmstart"]]
    for first, second in pairs:
        options = [f"optim.lr={second}", f"student.path={out / f'sweep/warmstart_{first}'}", *VALIDATION]
        found = launch("2_xopd.yaml", out / f"sweep/both_{first}_{second}", options)
        rows[f"warm start, lr {first}, then X-OPD, lr {second}"] = found["xopd"]
    for rate in RATES["xopd"]:
        options = [f"optim.lr={rate}", STUDENT, *VALIDATION]
        rows[f"X-OPD alone, lr {rate}"] = launch("2_xopd.yaml", out / f"sweep/alone_{rate}", options)["xopd"]
    return rows, markdown({name: [e] for name, e in rows.items()})


def seeds(out: Path, count: int) -> tuple[Any, str]:
    """The recipes as they are on the test split; a row per stage, means and standard errors over seeds."""
    rows: dict[str, list[Evaluation]] = {}
    for seed in range(count):
        here, given = out / f"seed_{seed}", [f"run.seed={seed}"]
        found = launch("1_warmstart.yaml", here / "warmstart", given, "base")
        found |= launch("2_xopd.yaml", here / "xopd", [*given, f"student.path={here / 'warmstart'}"])
        found |= {"xopd alone": launch("2_xopd.yaml", here / "xopd_alone", [*given, STUDENT])["xopd"]}
        for stage, evaluation in found.items():
            rows.setdefault(stage, []).append(evaluation)
    for stage in ("warmstart", "xopd", "xopd alone"):
        rows[f"{stage} - base"] = [difference(a, b) for a, b in zip(rows[stage], rows["base"], strict=True)]
    return rows, markdown(rows)


def launch(recipe: str, folder: Path, overrides: list[str], start: str = "") -> dict[str, Evaluation]:
    """Run a recipe into `folder` unless it is finished; its evaluations by stage. `start` evaluates first."""
    command = [sys.executable, "-m", "opd.cli", "launch", str(HERE / recipe), f"run.dir={folder}"]
    command += [*overrides, f"eval.start={start}", "--plain"]
    print(" ".join(command), flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    lines = map(json.loads, (folder / "eval.jsonl").read_text().splitlines())
    return {line["stage"]: line for line in lines}


def difference(a: Evaluation, b: Evaluation) -> Evaluation:
    """Of one seed: a - b, by column."""
    return {c: {"mean": a[c]["mean"] - b[c]["mean"], "stderr": None} for c in COLUMNS}


def markdown(rows: dict[str, list[Evaluation]]) -> str:
    """A table: one evaluation with its own errors, several by mean and standard error over them."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, evaluations in rows.items():
        cells = []
        for column in COLUMNS:
            found = [e[column] for e in evaluations]
            one = found[0] if len(found) == 1 else mean_stderr([f["mean"] for f in found])
            scale, digits = (100, 1) if column in SHARES else (1, 2)
            cells.append(f"{scale * one['mean']:.{digits}f} ± {scale * (one['stderr'] or 0.0):.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
