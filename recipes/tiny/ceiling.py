"""How far training can bring a student's spoken answers while its tower stays frozen.

    python recipes/tiny/ceiling.py recipes/tiny/student_hears_badly

Trains adapter and language model on full spoken answers alone, longer and on more clips than the recipes do, whatever
it may forget, and prints the accuracy on fresh spoken questions of the `test` split. An estimate of what the frozen
tower lets through, not a bound that is proven. Writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

# Hugging Face reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from build import CLIPS, SPOKEN_CHECKED
from build_hearing import POSITIONS, hear, set_window, synthesize
from build_student import build_student
from build_tokenizer import build_tokenizer
from chat import Chat
from measure import accuracy
from transformers import Qwen2AudioForConditionalGeneration

STEPS = 1000


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="checkpoint folder that build.py wrote")
    parser.add_argument("--seed", type=int, default=0, help="of data and order (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    args = parser.parse_args()
    if not (args.student / "model.safetensors").is_file():
        parser.error(f"{args.student}: expected a checkpoint folder that build.py wrote, found no model.safetensors")
    torch.set_num_threads(args.threads)
    chat = Chat(build_tokenizer())
    student = Qwen2AudioForConditionalGeneration.from_pretrained(args.student, dtype=torch.float32).eval()
    set_window(student, POSITIONS)
    trained, asked = synthesize("train", CLIPS, args.seed), synthesize("test", SPOKEN_CHECKED, args.seed + 1)
    full_answers = {"steps": STEPS, "jobs": {"spoken": 1.0}, "terse_share": 0.0}
    build_student(chat, student, trained, hear(student, trained), args.seed, print, **full_answers)
    print(json.dumps(accuracy(student, chat, asked.questions, asked, hear(student, asked)), indent=2))


if __name__ == "__main__":
    main()
