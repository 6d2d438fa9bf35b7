"""A student on our side beside its live vLLM server: the same log-probs? also after new weights were pushed?

`opd doctor` asks this of a model in one process, `opd families --check` of a learner under ZeRO-3.
Shape legend in opd/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd.config.schema import Config
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family
from opd.models.lora import pieces
from opd.models.sharding import DTYPES, all_reduce
from opd.models.speech_lm import SpeechLM
from opd.objectives.token_loss import MicroBatch
from opd.rollout.sampler import VllmSampler
from opd.train.batch import collate, make_samples
from opd.train.learner import Weights
from opd.types import VIEWS, Prompt, Rollout, Sample, ScoredRollout, View

NOISE = 0.2  # of a parameter's root mean square


@dataclass(frozen=True)
class Mismatch:
    """|ours - vLLM| log-prob over the tokens of some responses."""

    mean: float
    greatest: float

    def __str__(self) -> str:
        return f"mean {self.mean:.1e}, greatest {self.greatest:.1e}"


def chosen(mb: MicroBatch, logits: Tensor) -> Tensor:
    """Log-probs [B, T] of a micro-batch's own response tokens, of logits [B, T, V]."""
    return torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])[..., 0]


class Probe(ABC):
    """What is asked of our side, and how it is held against the server's; subclasses say how our side computes."""

    model: SpeechLM
    rank, world = 0, 1  # of the processes that share our side; every one calls every method

    def __init__(self, config: Config, family: Family, prompts: list[Prompt], clips: dict[str, np.ndarray]) -> None:
        """clips: waveforms of the prompts by path."""
        self.config, self.family, self.prompts, self.clips = config, family, prompts, clips
        self.sampler = VllmSampler(config, family, config.rollout.urls)
        self.parts: list[str] = list(config.student.train)  # that are perturbed and pushed
        self.generator = torch.Generator().manual_seed(7)

    @abstractmethod
    def eval_logits(self, samples: list[Sample]) -> tuple[MicroBatch, Tensor]:
        """A micro-batch of samples and its logits [B, T, V], without gradient."""

    @abstractmethod
    def all_gathered(self, trainable_only: bool, device: torch.device | str) -> Weights:
        """(Hugging Face name, tensor) of what `WeightSync.push` has to send, of whatever part."""

    def whole(self, parameter: Tensor) -> AbstractContextManager[Any]:
        """In which a parameter is whole and may be changed."""
        return nullcontext()

    def noise(self, weights: Tensor) -> float:
        """Standard deviation of what perturbs these weights; what is all zero (LoRA's B) gets the square of NOISE."""
        return NOISE * (float(weights.float().square().mean().sqrt()) or NOISE)

    def gathered(self, trainable_only: bool = True, device: torch.device | str = "cpu") -> Weights:
        """What `WeightSync.push` has to send: the trained weights of `parts`."""
        for name, value in self.all_gathered(trainable_only, device):
            if self.family.part_of(name) in self.parts:
                yield name, value

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """(name in memory, whole weights) of what is trained of `parts`; the weights may be changed at once."""
        for name, p in self.model.hf.named_parameters():
            if p.requires_grad and self.family.part_of(name) in self.parts:
                with self.whole(p):
                    yield name, p.data

    def perturb(self) -> None:
        """Add noise to the weights of `parts`."""
        for _, weights in self.trained():
            noise = torch.randn(weights.shape, generator=self.generator).to(weights)
            weights.add_(noise * self.noise(weights))

    def push(self, sync: WeightSync, version: int) -> None:
        """Give the servers our weights and remember their version."""
        sync.push(self, version)
        self.sampler.version = version

    def push_and_restore(self, sync: WeightSync, version: int) -> tuple[Mismatch, Mismatch, Mismatch]:
        """Push perturbed weights, then the originals as version 0, which stay whatever happens.

        Mismatch under perturbed weights while the push is left out, and after it; of the originals afterwards.
        """
        originals = {name: weights.cpu().clone() for name, weights in self.trained()}
        done = False
        try:
            self.perturb()
            stale = self.mismatch(self.sample())
            self.push(sync, version)
            fresh = self.mismatch(self.sample())
            done = True
        finally:
            if done or self.world == 1:  # ranks of which one has failed would wait for each other
                for name, weights in self.trained():
                    weights.copy_(originals[name])
                self.push(sync, 0)
        return stale, fresh, self.mismatch(self.sample())

    def sample(self) -> list[Rollout]:
        """Two answers of the server to each prompt in each view. Raises ServerError when it has other prompt ids."""
        jobs: list[tuple[Prompt, View, str]] = [(p, v, p.id) for v in VIEWS for p in self.prompts]
        box = [self.sampler.sample(jobs, self.clips, 2, 1.0, check=False) if self.rank == 0 else []]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def mismatch(self, rollouts: list[Rollout]) -> Mismatch:
        """How far our log-probs of the responses are from the server's; each rank looks at some of them."""
        mine = rollouts[self.rank :: self.world]
        pairs = zip(self.logprobs(mine), mine, strict=True)
        away = torch.from_numpy(np.concatenate([np.abs(ours - r.logprobs) for ours, r in pairs])).double()
        total, count = all_reduce(torch.tensor([away.sum(), len(away)], dtype=torch.float64), "sum").tolist()
        return Mismatch(total / count, float(all_reduce(away.max(), "max")))

    def logprobs(self, rollouts: list[Rollout]) -> list[np.ndarray]:
        """Our log-probs [T] of each response's own tokens. Neighbours with the same prompt go through together."""
        samples = make_samples([ScoredRollout(r, None) for r in rollouts], self.clips, self.family)
        found: list[np.ndarray] = []
        for _, same in groupby(samples, key=lambda s: s.prompt_ids):
            part = list(same)
            logp = chosen(*self.eval_logits(part)).cpu().numpy()
            found += [row[: len(s.response_ids)] for s, row in zip(part, logp, strict=True)]
        return found


class PlainStudent(Probe):
    """The student in this process, without DeepSpeed; with student.lora its adapters are what is perturbed."""

    def __init__(self, config: Config, family: Family, prompts: list[Prompt], clips: dict[str, np.ndarray]) -> None:
        super().__init__(config, family, prompts, clips)
        s = config.student
        hf = family.load(DTYPES[s.dtype], s.attention)
        self.model = SpeechLM(hf, family, list(s.train), s.lora, config.run.seed).eval()
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.model.to(device)
        self.device = device

    def all_gathered(self, trainable_only: bool, device: torch.device | str) -> Weights:
        for piece in pieces(self.model.hf, trainable_only):
            yield piece.name, piece.value(device)

    @torch.no_grad()
    def eval_logits(self, samples: list[Sample]) -> tuple[MicroBatch, Tensor]:
        mb = collate(samples).to(self.device)
        clips = [self.clips[k] for k in mb.clips] or [np.zeros(self.family.sampling_rate // 2, np.float32)]
        features = {k: v.to(self.device) for k, v in self.family.features(clips).items()}
        inputs = mb.inputs
        if self.model.tower_trained:
            inputs["features"] = features
        elif mb.clips or self.model.adapter_trained:
            inputs["audio"] = self.model.encode(features)
        return mb, self.model.response_logits(**inputs)
