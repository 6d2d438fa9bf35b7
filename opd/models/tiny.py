"""Small random checkpoints of every family's true architecture: to try out a family, and a set-up, without its weights.

What each one holds is in opd/models/tiny.yaml.

python -m opd.models.tiny FAMILY FOLDER      # FOLDER/student and FOLDER/teacher
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.whisper.modeling_whisper import sinusoids
from transformers.tokenization_mistral_common import MistralCommonBackend

from opd.models.base import family_of
from opd.models.registry import FAMILIES

SPECS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
CHAT = Template(SPECS["template"])
PADDED = 8  # rows of the output layer that no token owns
SENTENCES = ["what is three plus four? the answer is seven.", "set a timer for ten minutes", "who wrote this?"] * 5


def build(name: str, folder: Path, seed: int = 0) -> None:
    """Write `folder/student`, a random student of a family, and `folder/teacher`, a random text LLM beside it."""
    student = folder / "student"
    config, processor = config_and_processor(name, student)
    config.save_pretrained(student)
    processor.save_pretrained(student)
    family = family_of(str(student))
    torch.manual_seed(seed)
    hf = getattr(transformers, family.model_class)(family.config)
    _randomise(hf)
    hf.generation_config.eos_token_id = family.tokenizer.eos_token_id
    family.save(hf, {n: p.detach() for n, p in hf.named_parameters()}, student)
    _teacher(family.vocab_size, processor.tokenizer, student, folder / "teacher")


def config_and_processor(name: str, folder: Path) -> tuple[Any, Any]:
    """Config and processor of a family's checkpoint; Mistral's own files are written to `folder`."""
    spec = SPECS["families"][name]
    folder.mkdir(parents=True, exist_ok=True)
    more: dict[str, Any] = {}
    if "tekken" in spec:
        known = {"ROWS": _write_tekken(spec["tekken"], folder / "tekken.json")}
        (folder / "params.json").write_text(json.dumps(_filled(spec["params"], known)))
        tokenizer = MistralCommonBackend.from_pretrained(folder)
    else:
        tokenizer = _bpe([*spec["special"], *spec.get("names", {}).values()], spec["eos"], spec.get("names", {}))
        known = {"ROWS": len(tokenizer) + PADDED, **tokenizer.get_added_vocab()}
        more["chat_template"] = CHAT.substitute({piece: json.dumps(text) for piece, text in spec["chat"].items()})
    config = transformers.AutoConfig.for_model(name, **_filled(spec["config"], known))
    kind = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{kind}ForConditionalGeneration"]
    for part, arguments in spec["processor"].items():
        given = {k: v for k, v in arguments.items() if k != "class"}
        more[part] = getattr(transformers, arguments["class"])(**given)
    return config, getattr(transformers, f"{kind}Processor")(tokenizer=tokenizer, **more)


def _filled(value: Any, known: dict[str, int]) -> Any:
    """A part of a spec with numbers where it says ROWS or a special token."""
    if isinstance(value, dict):
        return {k: _filled(v, known) for k, v in value.items()}
    return known.get(value, value) if isinstance(value, str) else value


def _bpe(special: list[str], eos: str, names: dict[str, str]) -> Any:
    """A byte-level BPE tokenizer with special tokens, some of them by a name."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=600, special_tokens=special, **options))
    tokens: dict[str, Any] = {"eos_token": eos, "pad_token": special[0], "extra_special_tokens": names}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)


def _write_tekken(spec: dict[str, Any], path: Path) -> int:
    """Write Mistral's tokenizer file, with bytes and a few words; returns the number of its ids."""
    names = [name or f"<SPECIAL_{i}>" for i, name in enumerate(spec["special"])]
    words = [bytes([i]) for i in range(256)] + [word.encode() for word in spec["words"]]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(w).decode(), "token_str": w.decode(errors="ignore") or None}
        for i, w in enumerate(words)
    ]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    config = spec["config"] | {"num_vocab_tokens": len(words), "default_num_special_tokens": len(special)}
    config["default_vocab_size"] = len(special) + len(words)
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special, "audio": spec["audio"]}))
    return len(special) + len(words)


def _randomise(hf: Any) -> None:
    """Weights large enough that answers differ from prompt to prompt."""
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if "embed_positions" in name:
                p.copy_(sinusoids(*p.shape))  # as in a Whisper encoder (arXiv 2212.04356)
            elif p.dim() >= 2:
                p.normal_(0, 0.08)
            elif "bias" in name:
                p.normal_(0, 0.05)
            else:
                p.copy_(1 + 0.1 * torch.randn_like(p))


def _teacher(vocab_size: int, tokenizer: Any, student: Path, folder: Path) -> None:
    settings = SPECS["shared"]["llm"] | {"vocab_size": vocab_size, "head_dim": 32}
    config = transformers.LlamaConfig(**settings, bos_token_id=None, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config)
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
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    build(args.family, args.folder)
    print(f"wrote {args.folder}/student and {args.folder}/teacher")
    return 0


if __name__ == "__main__":
    sys.exit(main())
