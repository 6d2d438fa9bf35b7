"""From scored rollouts to micro-batches: global weights, token budget, padding. Shape legend in opd/types.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd.config.schema import Config
from opd.models.base import Family
from opd.models.sharding import all_reduce
from opd.objectives.token_loss import MicroBatch
from opd.types import VIEWS, Batch, Clips, Rollout, Sample, ScoredRollout, View, audio_paths, packed, render


def view_shares(config: Config) -> dict[View, float]:
    """Share of each view in the objective: lambda for text, 1 - lambda for speech; views of share 0 are left out."""
    lam = config.objective.lambda_
    shares: dict[View, float] = {"speech": 1.0 - lam, "text": lam}
    return {v: shares[v] for v in VIEWS if shares[v] > 0}


def make_samples(scored: list[ScoredRollout], clips: Clips, family: Family) -> list[Sample]:
    """Tokenise the prompts of scored rollouts, each in its own view, for the student.

    `clips` maps audio paths to waveforms. Responses are taken as they are: never re-tokenised.
    """
    samples = []
    for s in scored:
        keys = audio_paths(s.rollout.prompt, s.rollout.view)
        messages = render(s.rollout.prompt, s.rollout.view)
        samples.append(Sample(s, family.prompt_ids(messages, [len(clips[k]) for k in keys]), keys))
    return samples


def make_batch(samples: list[Sample], clips: Clips, config: Config) -> Batch:
    """Weigh every token by the objective's one global denominator and split into micro-batches.

    average = response: a token of a response of |y| tokens weighs share(view) / (N_view * |y|); average = token:
    share(view) / tokens_view, where N_view and tokens_view count over all ranks, and a response that stands for w, or
    whose record data.weight gives w, counts w times. Every rank gets the same number of micro-batches: short ranks
    repeat a sample with weight 0.
    """
    shares = view_shares(config)
    views = list(shares)
    counts = torch.zeros(len(views) + 1, 2, dtype=torch.float64)  # by view, then without weights; responses, tokens
    for s in samples:
        r, tokens = s.scored.rollout, float(len(s.response_ids))
        counts[views.index(r.view)] += _counts(r, config) * torch.tensor([1.0, tokens], dtype=torch.float64)
        counts[-1] += torch.tensor([1.0, tokens], dtype=torch.float64)
    counts = all_reduce(counts, "sum")
    for place, s in enumerate(samples):
        r = s.scored.rollout
        responses, tokens = counts[views.index(r.view)].tolist()
        denominator = responses * len(s.response_ids) if config.objective.average == "response" else tokens
        s.weight, s.place = shares[r.view] * _counts(r, config) / denominator, place
    micro = split(samples, config.train.micro_batch_tokens)
    most = int(all_reduce(torch.tensor(float(len(micro))), "max"))
    assert micro, "a rank without samples"
    micro += [[replace(micro[0][0], weight=0.0, place=-1)] for _ in range(most - len(micro))]
    return Batch(samples, clips, micro, int(counts[-1, 1]), int(counts[-1, 0]))


def _counts(rollout: Rollout, config: Config) -> float:
    """How many times a response counts in the mean."""
    name = config.data.weight
    return rollout.stands_for * (rollout.prompt.number(name) if name else 1.0)


def split(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Pack groups of samples with the same prompt, longest row first, into micro-batches of padded tokens <= `budget`.

    A group whose row alone would pass the budget is cut; a lone sample may pass it.
    """
    groups = [[samples[i] for i in group] for group in _groups(samples)]
    rows = [row for group in groups for row in packed(group, lambda row, s: _row_length([*row, s]) <= budget)]
    rows.sort(key=_row_length, reverse=True)
    micro = packed(rows, lambda rows, row: _row_length(rows[0]) * (len(rows) + 1) <= budget)
    return [[s for row in rows for s in row] for rows in micro]


def collate(samples: list[Sample]) -> MicroBatch:
    """Pack samples that share a prompt into rows and pad on the right; [B, ...] tensors keep the samples' order."""
    ids, places, parts = [], [], []  # of each row; parts: 0 prompt, k the k-th response
    row = torch.zeros(len(samples), dtype=torch.long)
    positions: list[list[int]] = [[] for _ in samples]
    for g, group in enumerate(_groups(samples)):
        prompt = samples[group[0]].prompt_ids
        p = len(prompt)
        ids.append([*prompt])
        places.append([*range(p)])
        parts.append([0] * p)
        for k, i in enumerate(group, 1):
            response, at = samples[i].response_ids, len(ids[g])
            t = len(response)
            row[i], positions[i] = g, [p - 1, *range(at, at + t - 1)]
            ids[g] += response
            places[g] += range(p, p + t)
            parts[g] += [k] * t
    top_ids, top_logp = _top(samples)
    return MicroBatch(
        samples=samples,
        ids=_padded(ids),
        position_ids=_padded(places),
        attends=_attends(_padded(parts, -1)),
        row=row,
        positions=_padded(positions),
        targets=_padded([s.response_ids for s in samples]),
        mask=_padded([[1.0] * len(s.response_ids) for s in samples]),
        weights=_padded([[s.weight] * len(s.response_ids) for s in samples]),
        teacher_logp=_padded([_logprobs(s, s.scored.teacher_logprobs) for s in samples]),
        sampler_logp=_padded([_logprobs(s, s.scored.rollout.logprobs) for s in samples]),
        sampled=torch.tensor([s.scored.rollout.logprobs is not None for s in samples]),
        top_ids=top_ids,
        top_logp=top_logp,
    )


def _padded(values: list[Any], fill: int = 0) -> Tensor:
    return pad_sequence([torch.as_tensor(v) for v in values], batch_first=True, padding_value=fill)


def _logprobs(sample: Sample, values: np.ndarray | None) -> np.ndarray:
    """[T] float32, zeros where there are none."""
    t = len(sample.response_ids)
    found = np.zeros(t, np.float32) if values is None else np.asarray(values, np.float32)
    assert len(found) == t, f"{sample.scored.rollout.prompt.id}: {t} tokens, {len(found)} log-probs"
    return found


def _top(samples: list[Sample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Ids [B, T, K] and the teacher's log-probs there, padded with -1 and 0; none where no sample has them."""
    most = max((s.scored.top_ids.shape[1] for s in samples if s.scored.top_ids is not None), default=0)
    if most == 0:
        return None, None
    shape = len(samples), max(len(s.response_ids) for s in samples), most
    ids, logp = torch.full(shape, -1), torch.zeros(shape)
    for i, s in enumerate(samples):
        if s.scored.top_ids is not None and s.scored.top_logprobs is not None:
            t, k = s.scored.top_ids.shape
            ids[i, :t, :k] = torch.from_numpy(s.scored.top_ids.astype(np.int64))
            logp[i, :t, :k] = torch.from_numpy(s.scored.top_logprobs.astype(np.float32))
    return ids, logp


def _attends(part: Tensor) -> Tensor:
    """[R, L] parts -> [R, 1, L, L]: causal, and only the prompt or the own response. Padding sees itself alone."""
    length = part.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    return (causal & seen & (part >= 0)[:, None, :] | torch.eye(length, dtype=torch.bool))[:, None]


def _groups(samples: list[Sample]) -> list[list[int]]:
    """Places of the samples with the same prompt ids and clips, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, s in enumerate(samples):
        groups.setdefault((tuple(s.prompt_ids), tuple(s.clips)), []).append(i)
    return list(groups.values())


def _row_length(row: list[Sample]) -> int:
    return len(row[0].prompt_ids) + sum(len(s.response_ids) for s in row)
