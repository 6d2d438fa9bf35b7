"""Rebuild the tiny worlds' teacher and students from nothing but these scripts and fixed seeds.

    python recipes/tiny/build.py --out recipes/tiny                         # OUT/teacher, OUT/student, OUT/BUILD.json
    python recipes/tiny/build.py --out recipes/tiny --world hears_badly     # reads OUT/teacher, writes
                                                    # OUT/student_hears_badly and OUT/BUILD_hears_badly.json

Teacher and students are ordinary Hugging Face checkpoints; the JSON files say what was measured on held-out questions.
About ten minutes each on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

# Hugging Face reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from build_hearing import MEL_BINS, POSITIONS, SHIPPED_POSITIONS, build_hearing, hear, set_window, synthesize
from build_student import build_student
from build_teacher import build_teacher
from build_tokenizer import AUDIO, AUDIO_BEGIN, AUDIO_END, build_tokenizer
from chat import Chat
from measure import accuracy, divergences, speaker_accuracy, word_errors
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2ForCausalLM,
    WhisperFeatureExtractor,
)
from world import SPLITS, Split, questions

CLIPS = 6000  # spoken questions that a base student is trained on
TYPED_CHECKED, SPOKEN_CHECKED = 2000, 1000  # questions per split that the report is measured on


@dataclass(frozen=True)
class World:
    """One student of the teacher that all worlds share."""

    student: str  # folder of the checkpoint
    report: str  # file of what was measured
    hearing_clips: int  # spoken questions that its tower is trained on


WORLDS = {
    "hears_well": World("student", "BUILD.json", CLIPS),
    "hears_badly": World("student_hears_badly", "BUILD_hears_badly.json", 8),
}


def main() -> None:
    """Build tokenizer, teacher, tower and student in a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that gets the checkpoints and what was measured"
    )
    parser.add_argument("--world", choices=WORLDS, default="hears_well", help="which student (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data, initialisation and order (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    args = parser.parse_args()
    if args.world != "hears_well" and not (args.out / "teacher/model.safetensors").is_file():
        parser.error(
            f"--world {args.world}: expected a teacher in {args.out / 'teacher'}; build hears_well there first"
        )
    torch.set_num_threads(args.threads)
    report = build(args.out, args.world, args.seed)
    print(json.dumps(report["measured"], indent=2))


def build(out: Path, name: str, seed: int) -> dict[str, Any]:
    """Make the student of a world, save it under `out`, measure what was saved; returns what the report says.

    `hears_well` makes the teacher too; the other worlds read the one that is in `out`.
    """
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)

    world, chat = WORLDS[name], Chat(build_tokenizer())
    if name == "hears_well":
        teacher = build_teacher(chat, seed, say)
        save_teacher(teacher, chat, out / "teacher")
    else:
        teacher = Qwen2ForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32).eval()
    say(f"speaking {CLIPS} questions")
    data = synthesize("train", CLIPS, seed)
    student = build_hearing(chat, teacher, data.first(world.hearing_clips), seed, say)
    build_student(chat, student, data, hear(student, data), seed, say)
    set_window(student, SHIPPED_POSITIONS)
    save_student(student, chat, out / world.student)
    say("measuring")
    measured = {split: measure(out, world.student, chat, split, seed) for split in SPLITS if split != "train"}
    option = "" if name == "hears_well" else f" --world {name}"
    report = {
        "command": f"python recipes/tiny/build.py --out recipes/tiny{option} --seed {seed}",
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "espeakng-loader")},
        "parameters": {"teacher": teacher.num_parameters(), "student": student.num_parameters()},
        "measured": measured,
    }
    (out / world.report).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say("done")
    return report


def measure(out: Path, name: str, chat: Chat, split: Split, seed: int) -> dict[str, Any]:
    """Measure the saved teacher and the student saved as `name` on fresh questions of a held-out split.

    None of these questions was any part trained on.
    """
    teacher = Qwen2ForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32).eval()
    student = Qwen2AudioForConditionalGeneration.from_pretrained(out / name, dtype=torch.float32).eval()
    set_window(student, POSITIONS)  # ten times faster than the shipped window, and the same to the clips in it
    torch.manual_seed(seed)
    typed = list(islice(questions(split, seed + 1), TYPED_CHECKED))
    data = synthesize(split, SPOKEN_CHECKED, seed + 1)
    heard = hear(student, data)
    return {
        "teacher, typed questions": accuracy(teacher, chat, typed),
        "student, typed questions": accuracy(student, chat, typed),
        "student, spoken questions": accuracy(student, chat, data.questions, data, heard),
        "student, man or woman": speaker_accuracy(student, chat, data, heard),
        "student, word error rate of repeating": word_errors(student, chat, data, heard),
        "divergences": divergences(student, teacher, chat, data, heard),
    }


def save_teacher(teacher: Qwen2ForCausalLM, chat: Chat, folder: Path) -> None:
    """Write an ordinary text checkpoint."""
    _save(teacher, chat, folder)
    chat.tokenizer.save_pretrained(folder)


def save_student(student: Qwen2AudioForConditionalGeneration, chat: Chat, folder: Path) -> None:
    """Write an ordinary Qwen2-Audio checkpoint with its processor."""
    _save(student, chat, folder)
    # A model made from a config is saved with its language model's prefix doubled, which vLLM does not know.
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("language_model.model.model.", "language_model.model."): w for name, w in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=30),
        chat.tokenizer,
        chat_template=chat.tokenizer.chat_template,
        audio_token=AUDIO,
        audio_bos_token=AUDIO_BEGIN,
        audio_eos_token=AUDIO_END,
    )
    processor.save_pretrained(folder)
    loaded = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for (name, saved), ours in zip(loaded.state_dict().items(), student.state_dict().values(), strict=True):
        assert torch.equal(saved, ours), f"{name} did not survive saving"


def _save(model: PreTrainedModel, chat: Chat, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=chat.end, pad_token_id=chat.pad)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
