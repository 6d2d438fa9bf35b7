"""A Whisper checkpoint of random weights, small, whose words are made up and whose ears tell clips apart."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

END, START, SILENT_TIME = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
TASKS = ["<|translate|>", "<|transcribe|>"]
MOST_TOKENS = 24  # of a transcript, with its prefix


def write_tiny_whisper(folder: Path, seed: int = 0) -> None:
    """Write it as a Hugging Face checkpoint."""
    words = ["Ġ" + "".join(pair) for pair in product(("ba", "ko", "mi", "lu", "ren", "sot", "vid", "gam"), repeat=2)]
    tokenizer = WhisperTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    languages = [f"<|{code}|>" for code in LANGUAGES]
    named = [END, START, *languages, *TASKS, "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", SILENT_TIME]
    tokenizer.add_special_tokens({"additional_special_tokens": named})
    tokenizer.add_tokens([AddedToken(f"<|{i / 50:.2f}|>", special=False) for i in range(1501)])  # times
    ids = dict(zip(named, tokenizer.convert_tokens_to_ids(named), strict=True))
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_target_positions=MOST_TOKENS,
        init_std=0.3,
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:  # what is heard outweighs what was said
            layer.encoder_attn.out_proj.weight *= 8
        model.proj_out.weight[len(words) :] = 0  # tied to the embeddings: a transcript is words, of any number
    model.generation_config = GenerationConfig(
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
        no_timestamps_token_id=ids[SILENT_TIME],
        lang_to_id={code: ids[code] for code in languages},
        task_to_id={task.strip("<|>"): ids[task] for task in TASKS},
        is_multilingual=True,
        max_length=MOST_TOKENS,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
