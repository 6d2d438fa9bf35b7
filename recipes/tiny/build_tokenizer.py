"""The tokenizer that teacher and student share: byte-level BPE whose merges are the words of the world."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from world import WORDS

END, PAD, AUDIO = "<|im_end|>", "<|endoftext|>", "<|AUDIO|>"
AUDIO_BEGIN, AUDIO_END = "<|audio_bos|>", "<|audio_eos|>"
SPECIAL = [PAD, "<|im_start|>", END, AUDIO, AUDIO_BEGIN, AUDIO_END]
TASK_WORDS = ("man", "woman", "or", "repeat", "user", "assistant")

# Qwen2-Audio's chat format without its system prompt.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer; every word of the world is one token, with a space before it and without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than there are merges to learn
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = WORDS + TASK_WORDS
    tokenizer.train_from_iterator(["".join(f" {w}" for w in words), "\n".join(words)] * 2, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[t for t in SPECIAL if t not in (END, PAD)],
        chat_template=CHAT_TEMPLATE,
    )
    for word in words:
        for text in (word, f" {word}"):
            assert len(wrapped(text).input_ids) == 1, f"{text!r} is more than one token"
    return wrapped
