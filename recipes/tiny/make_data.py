"""Write the manifests and clips of the tiny world.

    python recipes/tiny/make_data.py --out data/tiny

    train.jsonl, validation.jsonl, test.jsonl       spoken questions, no question in two of them
    retention_validation.jsonl, retention.jsonl     the clips of validation and test: did a man or a woman speak?
    hearing.jsonl                                   the clips of test: repeat what was said
    audio/*.wav                                     16 kHz mono PCM16

The same command twice writes the same bytes, and the second time finds nothing to do. Manifests come last, so a run
that was cut off leaves none behind.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import soundfile
import torch
from rich.progress import track
from speech import RATE, Clip, Synthesizer, speak
from world import REPEAT_TASK, SPEAKER_TASK, SPLITS, Question, Split, questions

from opd.data.stages import espeak
from opd.settings import UserError

HERE = Path(__file__).resolve().parent
STAMP = "make_data.json"
Record = dict[str, Any]


def main() -> None:
    """Write manifests and speak their clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=_count, default=2000, help="training questions (default %(default)s)")
    parser.add_argument("--validation", type=_count, default=400, help="validation questions (default %(default)s)")
    parser.add_argument("--test", type=_count, default=600, help="test questions (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which questions and voices (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # clips are short: threads would only wait for one another
    sizes: dict[Split, int] = {"train": args.train, "validation": args.validation, "test": args.test}
    try:
        made = make(args.out, sizes, args.seed)
    except UserError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f"--out {args.out}: expected a folder that can be written ({e.strerror})")
    if made:
        print(f"{args.out}: " + ", ".join(f"{name} {size}" for name, size in sizes.items()))
    else:
        print(f"{args.out}: nothing to do, it was made by this command before")


def make(out: Path, sizes: dict[Split, int], seed: int) -> bool:
    """Write the data set of `sizes` questions per split to `out`; False when exactly it is there already."""
    settings = {"sizes": sizes, "seed": seed, "made_by": _fingerprint()}
    if _is_made(out, settings):
        return False
    (out / "audio").mkdir(parents=True, exist_ok=True)
    for stale in [out / STAMP, *(out / f"{name}.jsonl" for name in _MANIFESTS)]:
        stale.unlink(missing_ok=True)
    manifests: dict[str, list[Record]] = {name: [] for name in _MANIFESTS}
    for split in SPLITS:
        for name, record in _records(split, sizes[split], seed, out):
            manifests[name].append(record)
    for name, records in manifests.items():
        _write(out / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    _write(out / STAMP, json.dumps(settings | {"manifests": {n: _digest(out / f"{n}.jsonl") for n in _MANIFESTS}}))
    return True


# A manifest beside the questions' own: the split whose clips it uses, and the instruction that follows a clip.
_TASKS = {
    "retention_validation": ("validation", SPEAKER_TASK),
    "retention": ("test", SPEAKER_TASK),
    "hearing": ("test", REPEAT_TASK),
}
_MANIFESTS = (*SPLITS, *_TASKS)


def _records(split: Split, size: int, seed: int, out: Path) -> Iterator[tuple[str, Record]]:
    """Speak a split's questions into `out`/audio; yields (manifest, record)."""
    synthesizer, rng = Synthesizer(), random.Random(f"{split}/{seed}/voices")
    progress: Iterable[Question] = track(islice(questions(split, seed), size), f"{split:<10}", total=size)
    for i, question in enumerate(progress):
        clip = speak(synthesizer, question.question, rng)
        path = f"audio/{split}-{i:06d}.wav"
        soundfile.write(out / path, clip.wave, RATE, format="WAV", subtype="PCM_16")
        yield split, _question_record(f"{split}-{i:06d}", question, path)
        for name, (source, task) in _TASKS.items():
            if source == split:
                yield name, _task_record(f"{name}-{i:06d}", task, question, clip, path)


def _question_record(name: str, question: Question, path: str) -> Record:
    return {
        "id": name,
        "messages": [{"role": "user", "content": [_audio_part(question, path)]}],
        "response": question.response,
        "answer": question.answer,
        "match": question.match,
        "group": question.skill,
    }


def _task_record(name: str, task: str, question: Question, clip: Clip, path: str) -> Record:
    said, group = (f"{clip.speaker}.", "speaker") if task == SPEAKER_TASK else (question.question, "repeat")
    return {
        "id": name,
        "messages": [{"role": "user", "content": [_audio_part(question, path), {"type": "text", "text": task}]}],
        "response": said,
        "answer": said,
        "match": "exact",
        "group": group,
    }


def _audio_part(question: Question, path: str) -> Record:
    return {"type": "audio", "path": path, "transcript": question.question}


def _is_made(out: Path, settings: Record) -> bool:
    if not (out / STAMP).is_file():
        return False
    stamp = json.loads((out / STAMP).read_text(encoding="utf-8"))
    digests = stamp.pop("manifests", {})
    if stamp != settings:
        return False
    for name in _MANIFESTS:
        manifest = out / f"{name}.jsonl"
        if not manifest.is_file() or _digest(manifest) != digests.get(name):
            return False
    clips = [out / f"audio/{split}-{i:06d}.wav" for split in SPLITS for i in range(settings["sizes"][split])]
    return all(clip.is_file() for clip in clips)


def _fingerprint() -> dict[str, str]:
    """What decides the bytes beside the arguments: these scripts and the synthesizer."""
    digests = {name: _digest(HERE / name) for name in ("world.py", "speech.py", "make_data.py")}
    digests["espeak.py"] = _digest(Path(espeak.__file__))
    return digests | {"espeakng-loader": espeak.version(), "torchaudio": importlib.metadata.version("torchaudio")}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never meets half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of questions, at least 1, found {text}")
    return value


if __name__ == "__main__":
    main()
