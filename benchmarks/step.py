"""One X-OPD step by phase, beside a plain one-process transformers loop on the same pair, in the same run.

    python benchmarks/step.py

16 clips x 4 answers of up to 24 tokens, float32, speech view only. Ours: vLLM server, two ZeRO-3 learner ranks, local
teacher, weights pushed after the step, as `opd launch` runs it. Reference: one process that samples with a key-value
cache, runs the tower once per clip over vLLM's 30 s window and reuses its output for the update, teacher beside it.
Prints medians and the ratio ours / reference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLIPS, ANSWERS, TOKENS = 16, 4, 24
OVERRIDES = ["objective.lambda=0", "train.checkpoint_every=1000", "eval.test=", "eval.retention=", "eval.end=false"]


def main() -> int:
    """Time both and print the medians by phase and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/tiny/2_xopd.yaml")
    parser.add_argument("--student", default="recipes/tiny/student")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=3, help="first steps that do not count")
    parser.add_argument("--reference-only", action="store_true", help="print the reference's seconds per step")
    args = parser.parse_args()
    if args.reference_only:
        print(json.dumps(reference(args.recipe, args.student, args.steps)))
        return 0
    before = run_reference(args)[args.skip :]
    ours = run_ours(args)
    after = run_reference(args)[args.skip :]  # on both sides of ours: a machine that grows slower is no argument
    plain = (statistics.median(before) + statistics.median(after)) / 2
    print(f"{CLIPS} clips x {ANSWERS} answers of up to {TOKENS} tokens, {os.cpu_count()} cores, medians in seconds")
    for phase in ("rollout", "teacher", "learner", "sync", "rest", "step"):
        print(f"  ours {phase:8} {statistics.median(m[f'time/{phase}'] for m in ours):.3f}")
    ratio = statistics.median(m["time/step"] for m in ours) / plain
    print(f"  plain loop    {plain:.3f} ({statistics.median(before):.3f} before, {statistics.median(after):.3f} after)")
    print(f"  ratio ours / plain loop: {ratio:.2f}")
    return 0


def run_ours(args: argparse.Namespace) -> list[dict[str, float]]:
    """The metrics of every step of an X-OPD run through `opd launch`."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={folder}/run", f"train.steps={args.steps}", f"student.path={args.student}", *OVERRIDES]
        overrides += [f"train.prompts_per_step={CLIPS}", f"rollout.n={ANSWERS}", f"rollout.max_tokens={TOKENS}"]
        command = [sys.executable, "-m", "opd.cli", "launch", args.recipe, *overrides, "--plain"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][args.skip :]


def run_reference(args: argparse.Namespace) -> list[float]:
    """Seconds of every step of the plain loop, in a process of its own."""
    command = [sys.executable, __file__, "--reference-only", "--recipe", args.recipe, "--student", args.student]
    command += ["--steps", str(args.steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def reference(recipe: str, student: str, steps: int) -> list[float]:
    """Seconds of each step of the plain loop."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2AudioForConditionalGeneration

    from opd.config.load import load_config
    from opd.models.base import family_of
    from opd.prompts.clips import ClipLoader
    from opd.prompts.manifest import PromptStream, read_manifest
    from opd.types import audio_paths, render

    config = load_config(recipe, [f"student.path={student}"])
    family = family_of(student)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(config.teacher.path, dtype=torch.float32).eval()
    llm = [p for n, p in model.named_parameters() if family.part_of(n) == "llm"]
    optimizer = torch.optim.AdamW(llm, lr=config.optim.lr, betas=(0.9, 0.95), weight_decay=0.0)
    prompts, _ = read_manifest(config.data.train)
    stream = PromptStream(prompts, CLIPS, config.run.seed)
    loader = ClipLoader(config, family.sampling_rate, len(prompts))
    eos = family.eos_ids[0]
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        batch, clips = loader.load_batch(list(enumerate(stream.batch(step))), prompts)
        waves = [clips[audio_paths(p)[0]] for _, p in batch]
        heard = [family.prompt_ids(render(p, "speech"), [len(w)]) for (_, p), w in zip(batch, waves, strict=True)]
        read = [family.prompt_ids(render(p, "text"), []) for _, p in batch]
        with torch.no_grad():
            audio = full_window_audio(model, family, waves)
            ids, mask = left_pad(heard)
            embeds = model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter((ids == family.audio_id)[..., None], torch.cat(audio))
            answers, sampled = sample(model, embeds, mask, eos)
        rows = [i // ANSWERS for i in range(len(answers))]
        text_logp = response_logp(teacher, None, [read[i] for i in rows], answers, eos, None, family)
        logp = response_logp(model, audio, [heard[i] for i in rows], answers, eos, rows, family)
        alive = torch.ones_like(logp)
        for row, a in enumerate(answers):
            alive[row, len(a) :] = 0
        advantage = (text_logp - logp).detach().clamp(-5, 5)
        ratio = (logp - sampled[:, : logp.shape[1]]).exp()
        loss = -((ratio * advantage * alive).sum(1) / alive.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def left_pad(prompts):  # type: ignore[no-untyped-def]
    """Prompts of different lengths as [B, L], their ends in one column."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def full_window_audio(model, family, waves):  # type: ignore[no-untyped-def]
    """The tower over 30 s windows, as transformers runs it."""
    import torch

    extractor = family.processor.feature_extractor
    out = extractor(
        waves,
        sampling_rate=family.sampling_rate,
        return_attention_mask=True,
        padding="max_length",
        return_tensors="pt",
    )
    lengths = model.model.audio_tower._get_feat_extract_output_lengths(out["attention_mask"].sum(-1))
    positions = out["input_features"].shape[-1] // 2
    heard = torch.arange(positions)[None] < lengths[0][:, None]
    mask = torch.zeros(len(waves), 1, positions, positions)
    mask = mask.masked_fill(~heard[:, None, None], torch.finfo(torch.float32).min)
    hidden = model.model.audio_tower(out["input_features"], attention_mask=mask).last_hidden_state
    hidden = model.model.multi_modal_projector(hidden)
    return [row[: int(n)] for row, n in zip(hidden, lengths[1], strict=True)]


def sample(model, embeds, mask, eos):  # type: ignore[no-untyped-def]
    """ANSWERS samples per prompt with one prefill: token lists and log-probs [B, TOKENS]."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.model.language_model.config)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    )
    cache.batch_repeat_interleave(ANSWERS)
    hidden = out.last_hidden_state[:, -1].repeat_interleave(ANSWERS, 0)
    mask, position = mask.repeat_interleave(ANSWERS, 0), position[:, -1:].repeat_interleave(ANSWERS, 0)
    tokens, logps = [], []
    done = torch.zeros(len(hidden), dtype=torch.bool)
    for _ in range(TOKENS):
        logits = torch.log_softmax(model.lm_head(hidden), -1)
        token = torch.multinomial(logits.exp(), 1)
        tokens.append(token[:, 0])
        logps.append(logits.gather(1, token)[:, 0])
        done |= token[:, 0] == eos
        if done.all():
            break
        mask, position = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), position + 1
        hidden = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(token),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    rows = torch.stack(tokens, 1).tolist()
    return [r[: r.index(eos) + 1] if eos in r else r for r in rows], torch.stack(logps, 1)


def response_logp(model, audio, prompts, answers, eos, rows, family):  # type: ignore[no-untyped-def]
    """Log-probs [B, T] of answers; `audio` (per clip) only for the student."""
    import torch

    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    steps = max(map(len, answers))
    ids = torch.full((len(answers), longest), eos)
    mask = torch.zeros_like(ids)
    at = torch.zeros(len(answers), steps, dtype=torch.long)
    target = torch.zeros_like(at)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor([*p, *a])
        mask[i, : len(p) + len(a)] = 1
        at[i, : len(a)] = torch.arange(len(p) - 1, len(p) + len(a) - 1)
        target[i, : len(a)] = torch.tensor(a)
    embeds = model.get_input_embeddings()(ids)
    if audio is None:
        with torch.no_grad():
            hidden = model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    else:
        embeds = embeds.masked_scatter((ids == family.audio_id)[..., None], torch.cat([audio[i] for i in rows]))
        llm = model.model.language_model
        hidden = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1])))
    return torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]


if __name__ == "__main__":
    sys.exit(main())
