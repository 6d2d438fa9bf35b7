"""Small random checkpoints of every family's true architecture: to try out a family, and a set-up, without its weights.

python -m opd.models.tiny FAMILY FOLDER      # FOLDER/student and FOLDER/teacher
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from opd.models.tiny_builders import BUILDERS, LLM


def build(name: str, folder: Path, seed: int = 0) -> None:
    """Write `folder/student`, a random student of a family, and `folder/teacher`, a random text LLM beside it."""
    from opd.models.files import buffers, write_model
    from opd.models.load import family_of

    student, teacher = folder / "student", folder / "teacher"
    student.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config, hf, processor = BUILDERS[name](student)
    config.architectures = config.architectures or [type(hf).__name__]
    config.save_pretrained(student)
    processor.save_pretrained(student)
    _randomise(hf)
    hf.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    hf.generation_config.save_pretrained(student)
    state = {n: p.detach() for n, p in hf.named_parameters()} | buffers(hf)
    write_model(family_of(str(student)), hf, state, student)
    _teacher(hf.config.get_text_config(), processor.tokenizer, student, teacher)


def _randomise(hf: Any) -> None:
    """Weights large enough that answers differ from prompt to prompt."""
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if "embed_positions" in name:
                p.copy_(_sinusoids(*p.shape))
            elif p.dim() >= 2:
                p.normal_(0, 0.08)
            elif "bias" in name:
                p.normal_(0, 0.05)
            else:
                p.copy_(1 + 0.1 * torch.randn_like(p))


def _sinusoids(length: int, channels: int) -> torch.Tensor:
    """Positions of a Whisper encoder [length, channels] (arXiv 2212.04356)."""
    scale = math.log(10000) / (channels // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-scale * torch.arange(channels // 2))[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


def _teacher(text: Any, tokenizer: Any, student: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = {**LLM, "vocab_size": text.vocab_size, "head_dim": 32, "bos_token_id": None, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    _randomise(model)
    model.save_pretrained(folder)
    if (student / "tekken.json").is_file():
        (folder / "tekken.json").write_bytes((student / "tekken.json").read_bytes())
        return
    tokenizer.chat_template = (student / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder)


def main() -> int:
    """`python -m opd.models.tiny FAMILY FOLDER`."""
    parser = argparse.ArgumentParser(description="Write a small random checkpoint of a family, and a text teacher.")
    parser.add_argument("family", choices=sorted(BUILDERS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    build(args.family, args.folder)
    print(f"wrote {args.folder}/student and {args.folder}/teacher")
    return 0


if __name__ == "__main__":
    sys.exit(main())
