"""Prints the largest log-prob difference between transformers and a fresh vLLM engine on one checkpoint folder."""

from __future__ import annotations

import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def main(folder: str) -> None:
    import numpy as np
    import torch
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
    from vllm import LLM, SamplingParams

    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "audio", "path": "x"}, {"type": "text", "text": "\nrepeat"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wave = np.random.default_rng(0).normal(0, 0.1, 40000).astype(np.float32)
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, logprobs_mode="processed_logprobs")
    settings = SamplingParams(temperature=1.0, max_tokens=16, n=4, logprobs=0, ignore_eos=True)
    prompt = {"prompt": text, "multi_modal_data": {"audio": (wave, 16000)}}
    (answer,) = llm.generate([prompt], settings, use_tqdm=False)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processor(text=text, audio=[wave], sampling_rate=16000, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == list(answer.prompt_token_ids)
    audio = {k: inputs[k] for k in ("input_features", "feature_attention_mask")}
    worst = 0.0
    for output in answer.outputs:
        response = torch.tensor([list(output.token_ids)])
        ids = torch.cat([inputs["input_ids"], response], 1)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits
        ours = torch.log_softmax(logits[0, -response.shape[1] - 1 : -1], -1).gather(1, response[0][:, None])[:, 0]
        theirs = torch.tensor([next(iter(step.values())).logprob for step in output.logprobs])
        worst = max(worst, float((ours - theirs).abs().max()))
    print(worst)


if __name__ == "__main__":
    main(sys.argv[1])
