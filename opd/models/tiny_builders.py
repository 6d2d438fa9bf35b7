"""The configs of opd/models/tiny.py's checkpoints: one function for each family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.models.registry import FAMILIES

SENTENCES = ["what is three plus four? the answer is seven.", "set a timer for ten minutes", "who wrote this?"] * 5
LLM = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TOWER = {
    "num_mel_bins": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "max_source_positions": 1500,
}
LLAMA_TOWER = {
    "num_mel_bins": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
PADDED = 8  # rows of the output layer that no token owns


def _tokenizer(special: list[str], eos: str, named: dict[str, str] | None = None) -> Any:
    """Byte-level BPE with a family's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=eos, pad_token=special[0], extra_special_tokens=named or {}
    )


def _template(turn: str, end: str, audio: str, reply: str) -> str:
    """A chat template: `turn` opens a turn (ROLE stands for who speaks), `end` closes it, `audio` stands for a clip."""
    opened = "{{ " + json.dumps(turn) + "|replace('ROLE', m['role']) }}"
    part = f"{{% if p['type'] == 'text' %}}{{{{ p['text'] }}}}{{% else %}}{{{{ {json.dumps(audio)} }}}}{{% endif %}}"
    parts = f"{{% for p in m['content'] %}}{part}{{% endfor %}}"
    content = f"{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}{parts}{{% endif %}}"
    turns = f"{{% for m in messages %}}{opened}{content}{{{{ {json.dumps(end)} }}}}{{% endfor %}}"
    return turns + f"{{% if add_generation_prompt %}}{{{{ {json.dumps(reply)} }}}}{{% endif %}}"


def _chatml(audio: str) -> str:
    return _template("<|im_start|>ROLE\n", "<|im_end|>\n", audio, "<|im_start|>assistant\n")


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _whisper(**more: Any) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, **more)


def qwen2_audio(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    tokenizer = _tokenizer([*CHATML, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], "<|im_end|>")
    template = _chatml("<|audio_bos|><|AUDIO|><|audio_eos|>")
    processor = Qwen2AudioProcessor(feature_extractor=_whisper(), tokenizer=tokenizer, chat_template=template)
    config = Qwen2AudioConfig(
        audio_config={**TOWER},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer) + PADDED, **LLM},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return config, Qwen2AudioForConditionalGeneration(config), processor


VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128}


def _omni(processor_class: Any, names: list[str], patch: int) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    keys = ("audio", "image", "video", "audio_bos", "audio_eos", "vision_bos", "vision_eos")
    named = {f"{key}_token": name for key, name in zip(keys, names, strict=True)}
    tokenizer = _tokenizer([*CHATML, *names], "<|im_end|>", named)
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(patch_size=patch),
        video_processor=Qwen2VLVideoProcessor(patch_size=patch),
        feature_extractor=_whisper(return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=_chatml(f"{names[3]}{names[0]}{names[4]}"),
    )
    return tokenizer, processor


def qwen2_5_omni(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    names = ["AUDIO", "IMAGE", "VIDEO", "audio_bos", "audio_eos", "vision_bos", "vision_eos"]
    tokenizer, processor = _omni(Qwen2_5OmniProcessor, [f"<|{n}|>" for n in names], 14)
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids([f"<|{n}|>" for n in names]), strict=True))
    thinker = {
        "audio_config": {**TOWER, "n_window": 100, "output_dim": 128},
        "vision_config": {**VISION, "fullatt_block_indexes": [1]},
        "text_config": {
            "vocab_size": len(tokenizer) + PADDED,
            "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]},
            **LLM,
        },
        "audio_token_index": ids["AUDIO"],
        "image_token_index": ids["IMAGE"],
        "video_token_index": ids["VIDEO"],
        "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"],
        "vision_start_token_id": ids["vision_bos"],
        "vision_end_token_id": ids["vision_eos"],
    }
    config = Qwen2_5OmniConfig(thinker_config=thinker, enable_talker=False)
    config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    return config, Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config), processor


def qwen3_omni_moe(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeProcessor, Qwen3OmniMoeThinkerForConditionalGeneration

    names = ["audio_pad", "image_pad", "video_pad", "audio_start", "audio_end", "vision_start", "vision_end"]
    tokenizer, processor = _omni(Qwen3OmniMoeProcessor, [f"<|{n}|>" for n in names], 16)
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids([f"<|{n}|>" for n in names]), strict=True))
    windows = {"n_window": 50, "n_window_infer": 800, "output_dim": 128, "downsample_hidden_size": 32}
    rope = {**ROPE, "mrope_section": [4, 6, 6], "interleaved": True, "mrope_interleaved": True}
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    thinker = {
        "audio_config": {**TOWER, **windows},
        "vision_config": {
            **VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "image_size": 128,
            "apply_vit_abs_pos_embed": True,
        },
        "text_config": {"vocab_size": len(tokenizer) + PADDED, "rope_parameters": rope, **experts, **LLM},
        "audio_token_id": ids["audio_pad"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "audio_start_token_id": ids["audio_start"],
        "audio_end_token_id": ids["audio_end"],
        "vision_start_token_id": ids["vision_start"],
    }
    config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    return config, Qwen3OmniMoeThinkerForConditionalGeneration(config.thinker_config), processor


def voxtral(folder: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor
    from transformers.tokenization_mistral_common import MistralCommonBackend

    rows = _tekken(folder / "tekken.json")
    processor = VoxtralProcessor(feature_extractor=_whisper(), tokenizer=MistralCommonBackend.from_pretrained(folder))
    text = {"model_type": "llama", "vocab_size": rows, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_parameters": ROPE}
    config = VoxtralConfig(
        audio_config={**LLAMA_TOWER, "max_source_positions": 1500},
        text_config={**text, **LLM},
        audio_token_id=24,
        projector_hidden_act="gelu",
    )
    mel = {"sampling_rate": 16000, "num_mel_bins": 128, "hop_length": 160, "window_size": 400}
    encoder = {
        "audio_encoding_args": mel,
        "dim": 64,
        "n_layers": 2,
        "head_dim": 16,
        "hidden_dim": 256,
        "n_heads": 4,
        "vocab_size": rows,
        "max_source_positions": 1500,
    }
    params = {
        "dim": 128,
        "n_layers": 2,
        "head_dim": 32,
        "hidden_dim": 256,
        "n_heads": 4,
        "n_kv_heads": 2,
        "use_biases": False,
        "causal": True,
        "rope_theta": 1e6,
        "norm_eps": 1e-5,
        "vocab_size": rows,
        "max_position_embeddings": 4096,
        "tied_embeddings": False,
        "multimodal": {"whisper_model_args": {"encoder_args": encoder, "downsample_args": {"downsample_factor": 4}}},
    }
    (folder / "params.json").write_text(json.dumps(params))
    return config, VoxtralForConditionalGeneration(config), processor


def _tekken(path: Path) -> int:
    """Mistral's tokenizer file, with bytes and a few words; returns the number of its ids."""
    import base64

    from mistral_common.tokens.tokenizers.base import SpecialTokens

    names: tuple[str, ...] = (
        "unk",
        "bos",
        "eos",
        "begin_inst",
        "end_inst",
        "begin_tools",
        "end_tools",
        "begin_tool_results",
    )
    names += ("end_tool_results", "tool_calls", "img", "pad", "img_break", "img_end", "prefix", "middle", "suffix")
    names += ("begin_system", "end_system", "begin_tool_content")
    special = [str(SpecialTokens[n].value) for n in names]
    special += [f"<SPECIAL_{i}>" for i in range(len(special), 40)]
    special[24], special[25], special[34] = "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]"
    words = [bytes([i]) for i in range(256)] + [w.encode() for w in ("th", "the", " t", " the", "an", "er", "in", "is")]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(w).decode(), "token_str": w.decode(errors="ignore") or None}
        for i, w in enumerate(words)
    ]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(special) + len(words),
        "default_num_special_tokens": len(special),
        "version": "v7",
    }
    audio = {
        "sampling_rate": 16000,
        "frame_rate": 12.5,
        "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
        "chunk_length_s": 30.0,
    }
    control = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(special)]
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": control, "audio": audio}))
    return len(special) + len(words)


def audioflamingo3(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor

    tokenizer = _tokenizer([*CHATML, "<sound>"], "<|im_end|>")
    processor = AudioFlamingo3Processor(
        feature_extractor=_whisper(return_attention_mask=True), tokenizer=tokenizer, chat_template=_chatml("<sound>")
    )
    config = AudioFlamingo3Config(
        audio_config={**LLAMA_TOWER, "intermediate_size": 128, "max_source_positions": 1500},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer) + PADDED, **LLM},
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )
    return config, AudioFlamingo3ForConditionalGeneration(config), processor


def glmasr(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration, GlmAsrProcessor

    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
    special += ["<|begin_of_audio|>", "<|end_of_audio|>", "<|pad|>"]
    tokenizer = _tokenizer(special, "<|user|>")
    template = _template("<|ROLE|>\n", "", "<|begin_of_audio|><|pad|><|end_of_audio|>", "<|assistant|>\n")
    processor = GlmAsrProcessor(
        feature_extractor=_whisper(return_attention_mask=True), tokenizer=tokenizer, chat_template=template
    )
    text = {"model_type": "llama", "vocab_size": len(tokenizer) + PADDED, "head_dim": 32, "eos_token_id": 1, **LLM}
    config = GlmAsrConfig(
        audio_config={**LLAMA_TOWER, "max_position_embeddings": 1500},
        text_config=text,
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
        tie_word_embeddings=False,
    )
    return config, GlmAsrForConditionalGeneration(config), processor


def granite_speech(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import (
        GraniteSpeechConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    special = ["<|endoftext|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>"]
    tokenizer = _tokenizer(special, "<|endoftext|>")
    opened = "<|start_of_role|>ROLE<|end_of_role|>"
    template = _template(opened, "<|endoftext|>\n", "<|audio|>", opened.replace("ROLE", "assistant"))
    processor = GraniteSpeechProcessor(
        audio_processor=GraniteSpeechFeatureExtractor(), tokenizer=tokenizer, chat_template=template
    )
    conformer = {"input_dim": 160, "num_layers": 2, "hidden_dim": 64, "num_heads": 4, "output_dim": 42}
    qformer = {
        "model_type": "blip_2_qformer",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "encoder_hidden_size": 64,
    }
    text = {"model_type": "granite", "vocab_size": len(tokenizer) + PADDED, "logits_scaling": 2.0, **LLM}
    text |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "embedding_multiplier": 3.0}
    config = GraniteSpeechConfig(
        encoder_config={**conformer, "context_size": 200, "dropout": 0.0},
        projector_config={**qformer, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        text_config=text,
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )
    return config, GraniteSpeechForConditionalGeneration(config), processor


def qwen3_asr(_: Path) -> tuple[Any, Any, Any]:
    """Config, model and processor."""
    from transformers import (
        Qwen3ASRConfig,
        Qwen3ASRFeatureExtractor,
        Qwen3ASRForConditionalGeneration,
        Qwen3ASRProcessor,
    )

    named = {"audio": "<|audio_pad|>", "audio_bos": "<|audio_start|>", "audio_eos": "<|audio_end|>"}
    tokenizer = _tokenizer([*CHATML, *named.values()], "<|im_end|>", {f"{k}_token": v for k, v in named.items()})
    processor = Qwen3ASRProcessor(
        feature_extractor=Qwen3ASRFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=_chatml("<|audio_start|><|audio_pad|><|audio_end|>"),
    )
    tower = {k: v for k, v in TOWER.items() if k != "max_source_positions"}
    windows = {"n_window": 50, "n_window_infer": 800, "output_dim": 128, "downsample_hidden_size": 32}
    config = Qwen3ASRConfig(
        audio_config={**tower, **windows},
        text_config={
            "model_type": "qwen3",
            "vocab_size": len(tokenizer) + PADDED,
            "head_dim": 32,
            "rope_parameters": ROPE,
            **LLM,
            "tie_word_embeddings": True,
        },
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
        pad_token_id=0,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tie_word_embeddings=True,
        timestamp_token_id=0,
    )
    return config, Qwen3ASRForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[Path], tuple[Any, Any, Any]]] = {
    "qwen2_audio": qwen2_audio,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen3_omni_moe": qwen3_omni_moe,
    "voxtral": voxtral,
    "audioflamingo3": audioflamingo3,
    "glmasr": glmasr,
    "granite_speech": granite_speech,
    "qwen3_asr": qwen3_asr,
}
assert BUILDERS.keys() == FAMILIES.keys()
