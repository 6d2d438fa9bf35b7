"""From scored rollouts to micro-batches: global weights, token budget, padding. Shape legend in opd/types.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd.config import Config
from opd.models.base import Family
from opd.types import VIEWS, Batch, Sample, ScoredRollout
from opd.views import audio_paths, render


@dataclass
class MicroBatch:
    """Padded tensors of a few samples, all [B, T] but ids and attention_mask, which are [B, L]."""

    samples: list[Sample]
    ids: Tensor
    attention_mask: Tensor
    positions: Tensor  # where the logits of each response token are read
    targets: Tensor  # response ids
    mask: Tensor  # 1 at response tokens
    weights: Tensor  # of each token in the loss, 0 at padding
    teacher_logp: Tensor  # 0 where the objective reads rows instead
    sampler_logp: Tensor  # 0 where no student sampled


def view_shares(config: Config) -> dict[str, float]:
    """Share of each view in the objective: lambda for text, 1 - lambda for speech; views of share 0 are left out."""
    lam = config.objective.lambda_
    shares = {"speech": 1.0 - lam, "text": lam}
    return {v: shares[v] for v in VIEWS if shares[v] > 0}


def make_samples(scored: list[ScoredRollout], clips: dict[str, np.ndarray], family: Family) -> list[Sample]:
    """Tokenise the prompts of scored rollouts, each in its own view, for the student.

    `clips` maps audio paths to waveforms. Responses are taken as they are: never re-tokenised.
    """
    samples = []
    for s in scored:
        keys = audio_paths(s.rollout.prompt) if s.rollout.view == "speech" else []
        messages = render(s.rollout.prompt, s.rollout.view)
        samples.append(Sample(s, family.prompt_ids(messages, [len(clips[k]) for k in keys]), keys))
    return samples


def make_batch(samples: list[Sample], clips: dict[str, np.ndarray], config: Config) -> Batch:
    """Weigh every token by the objective's one global denominator and split into micro-batches.

    average = response: a token of a response of |y| tokens weighs share(view) / (N_view * |y|); average = token:
    share(view) / tokens_view, where N_view and tokens_view count over all ranks. Every rank gets the same number of
    micro-batches: short ranks repeat a sample with weight 0.
    """
    shares = view_shares(config)
    views = list(shares)
    counts = torch.tensor(
        [float(sum(s.scored.rollout.view == v for s in samples)) for v in shares]
        + [float(sum(len(s.response_ids) for s in samples if s.scored.rollout.view == v)) for v in shares],
        dtype=torch.float64,
    )
    counts = all_reduce(counts, "sum")
    responses, tokens = counts[: len(shares)], counts[len(shares) :]
    for s in samples:
        v = views.index(s.scored.rollout.view)
        per_response = responses[v] * len(s.response_ids)
        denominator = per_response if config.objective.average == "response" else tokens[v]
        s.weight = shares[s.scored.rollout.view] / float(denominator)
    micro = split(samples, config.train.micro_batch_tokens)
    most = int(all_reduce(torch.tensor(float(len(micro))), "max"))
    assert micro, "a rank without samples"
    micro += [[_dummy(micro[0][0])] for _ in range(most - len(micro))]
    return Batch(samples, clips, micro, int(tokens.sum()), int(responses.sum()))


def split(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Pack samples, longest first, so that no micro-batch pads to more than `budget` tokens (a lone one may)."""
    micro: list[list[Sample]] = []
    for s in sorted(samples, key=lambda s: -s.length):
        if micro and micro[-1][0].length * (len(micro[-1]) + 1) <= budget:
            micro[-1].append(s)
        else:
            micro.append([s])
    return micro


def collate(samples: list[Sample], pad_id: int = 0) -> MicroBatch:
    """Right-pad samples into tensors."""
    n, longest = len(samples), max(s.length for s in samples)
    steps = max(len(s.response_ids) for s in samples)
    ids = torch.full((n, longest), pad_id, dtype=torch.long)
    attention = torch.zeros(n, longest, dtype=torch.long)
    positions, targets = torch.zeros(n, steps, dtype=torch.long), torch.zeros(n, steps, dtype=torch.long)
    mask, teacher, sampler = (torch.zeros(n, steps) for _ in range(3))
    for i, s in enumerate(samples):
        p, t = len(s.prompt_ids), len(s.response_ids)
        ids[i, : p + t] = torch.tensor([*s.prompt_ids, *s.response_ids])
        attention[i, : p + t] = 1
        positions[i, :t] = torch.arange(p - 1, p + t - 1)
        targets[i, :t] = torch.tensor(s.response_ids)
        mask[i, :t] = 1
        for row, values in ((teacher, s.scored.teacher_logprobs), (sampler, s.scored.rollout.logprobs)):
            if values is not None:
                assert len(values) == t, f"{s.scored.rollout.prompt.id}: {t} tokens, {len(values)} log-probs"
                row[i, :t] = torch.from_numpy(np.asarray(values, np.float32))
    weights = mask * torch.tensor([s.weight for s in samples])[:, None]
    return MicroBatch(samples, ids, attention, positions, targets, mask, weights, teacher, sampler)


def _dummy(sample: Sample) -> Sample:
    return Sample(sample.scored, sample.prompt_ids, sample.clips, weight=0.0)


def all_reduce(x: Tensor, op: str) -> Tensor:
    """Sum or maximum of `x` over all ranks, on the device where `x` was; `x` itself without a process group."""
    if dist.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
        y = x.to(device)
        dist.all_reduce(y, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        return y.to(x.device)
    return x
