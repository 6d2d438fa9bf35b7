"""Speak the tiny world: manifests and audio for training, validation, test, retention and hearing.

python recipes/tiny/make_data.py --out data/tiny
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from speech import RATE, Synthesizer
from world import REPEAT, WHO, question

HERE = Path(__file__).parent
# manifest -> (split of its questions, what is typed after the clip)
MANIFESTS = {
    "train": ("train", ""),
    "validation": ("validation", ""),
    "test": ("test", ""),
    "retention_validation": ("validation", WHO),
    "retention": ("test", WHO),
    "hearing": ("test", REPEAT),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/tiny"))
    parser.add_argument("--train", type=int, default=2400, help="spoken training questions")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = {
        "train": args.train,
        "validation": args.validation,
        "test": args.test,
        "retention_validation": args.validation // 2,
        "retention": args.test // 2,
        "hearing": args.test // 2,
    }
    stamp = _stamp(sizes, args.seed)
    if (args.out / "stamp").is_file() and (args.out / "stamp").read_text() == stamp:
        print(f"{args.out}: there already")
        return 0
    aside = args.out.with_name(args.out.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "audio").mkdir(parents=True)
    torch.set_num_threads(1)  # clips are short: threads would only wait for each other
    synthesizer = Synthesizer()
    for name, size in sizes.items():
        _write(aside, name, size, args.seed, synthesizer)
    (aside / "stamp").write_text(stamp)
    shutil.rmtree(args.out, ignore_errors=True)
    aside.rename(args.out)
    print(f"wrote {sum(sizes.values())} spoken questions to {args.out}")
    return 0


def _write(folder: Path, name: str, size: int, seed: int, synthesizer: Synthesizer) -> None:
    import soundfile

    r = random.Random(f"{seed}/{name}")
    seen: set[str] = set()
    with open(folder / f"{name}.jsonl", "w") as manifest:
        for i in range(size):
            record, wave, rate = _record(name, i, r, synthesizer, seen)
            soundfile.write(folder / record["messages"][0]["content"][0]["path"], wave, rate, subtype="PCM_16")
            manifest.write(json.dumps(record) + "\n")
            if (i + 1) % 200 == 0 or i + 1 == size:
                print(f"\r{name}: {i + 1}/{size}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _record(name: str, i: int, r: random.Random, synthesizer: Synthesizer, seen: set[str]) -> tuple[Any, Any, int]:
    split, typed = MANIFESTS[name]
    q = question(r, split)
    for _ in range(50):  # a question comes once while there are fresh ones
        if q.text not in seen:
            break
        q = question(r, split)
    seen.add(q.text)
    spoken = synthesizer.say(q.text, r)
    content: list[dict[str, str]] = [{"type": "audio", "path": f"audio/{name}-{i:06d}.wav", "transcript": q.text}]
    response, answer, match = q.response, q.answer, q.match
    if typed:
        content.append({"type": "text", "text": typed})
        response = answer = spoken.speaker + "." if typed == WHO else q.text
        match = "exact"
    record = {
        "id": f"{name}-{i:06d}",
        "messages": [{"role": "user", "content": content}],
        "response": response,
        "answer": answer,
        "match": match,
        "group": q.skill,
    }
    return record, spoken.wave, RATE


def _stamp(sizes: dict[str, int], seed: int) -> str:
    """Changes whenever the data would: sizes, seed, or the code that makes it."""
    code = b"".join((HERE / name).read_bytes() for name in ("world.py", "speech.py", "make_data.py"))
    return json.dumps({"sizes": sizes, "seed": seed, "code": hashlib.sha256(code).hexdigest()})


if __name__ == "__main__":
    sys.exit(main())
