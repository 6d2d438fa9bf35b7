"""Random checkpoints of Qwen2-Audio at its true width, made where the weights are drawn fastest.

opd/models/tiny.py makes small ones of every family. Here the shape is the published one (opd/plan/shapes.yaml), the
vocabulary as large as its output layer, and the weights have the size that training starts from, so that log-probs in
bfloat16 are those of a model of this depth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "Qwen/Qwen2-Audio-7B-Instruct"
PADDED = 64  # rows of the output layer that no token owns
STD = 0.02  # of weights: the initializer_range of Qwen2's config.json


def write_student(
    folder: Path, device: str, text: dict[str, Any] | None = None, audio: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """Write a random Qwen2-Audio in bfloat16 as sharded safetensors; returns the folder.

    text, audio: what differs from the published config, such as {"num_hidden_layers": 2}. device: where the weights
    are drawn. A folder that already holds a checkpoint of this shape and seed is taken as it is.
    """
    import torch
    from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

    from opd.models.base import family_of
    from opd.models.tiny import config_and_processor
    from opd.plan.shapes import shipped

    wanted = {"text": text or {}, "audio": audio or {}, "seed": seed}
    mark = folder / "random.json"
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    known = shipped()[NAME]["config"]
    config = AutoConfig.for_model(
        known["model_type"],
        audio_config={**known["audio_config"], **wanted["audio"]},
        text_config={**known["text_config"], "tie_word_embeddings": False, **wanted["text"]},
    )
    _, processor = config_and_processor("qwen2_audio", folder)
    config.audio_token_index = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    _widen(folder / "tokenizer.json", config.text_config.vocab_size - PADDED)
    torch.manual_seed(seed)
    with torch.device(device):
        hf = Qwen2AudioForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() >= 2 and "embed_positions" not in name:
                p.normal_(0, STD)
            elif p.dim() == 1:
                p.normal_(0.0 if "bias" in name else 1.0, STD)
    hf.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    hf.generation_config.save_pretrained(folder)
    family_of(str(folder)).save(hf, {n: p.detach() for n, p in hf.named_parameters()}, folder)
    mark.write_text(json.dumps(wanted))
    return folder


def _widen(file: Path, rows: int) -> None:
    """Give a BPE tokenizer.json `rows` ids: the new ones stand for words that no merge makes."""
    about = json.loads(file.read_text())
    vocab: dict[str, int] = about["model"]["vocab"]
    taken = {*vocab.values(), *(t["id"] for t in about["added_tokens"])}
    assert max(taken) < rows, f"{len(taken)} tokens, {rows} rows"
    vocab |= {f"<unreached {i}>": i for i in range(rows) if i not in taken}
    file.write_text(json.dumps(about))
