"""A student on our side beside its live vLLM server: the same log-probs? also after new weights were pushed?

`opd doctor` asks this of a model in one process, `opd families --check` of a learner under ZeRO-3.
Shape legend in opd/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd.config.schema import Config
from opd.inference.weight_sync import WeightSync
from opd.models.base import Family
from opd.models.lora import pieces
from opd.models.sharding import DTYPES
from opd.models.speech_lm import SpeechLM
from opd.objectives.micro_batch import MicroBatch
from opd.rollout.sampler import VllmSampler
from opd.train.batch import collate, make_samples, split
from opd.types import VIEWS, Prompt, Rollout, ScoredRollout, View

NOISE = 0.2  # of a parameter's root mean square


@dataclass(frozen=True)
class Mismatch:
    """|ours - vLLM| log-prob over the tokens of some responses."""

    mean: float
    greatest: float

    def __str__(self) -> str:
        return f"mean {self.mean:.1e}, greatest {self.greatest:.1e}"


class Probe(ABC):
    """What both have in common."""

    def __init__(self, config: Config, family: Family, prompts: list[Prompt], clips: dict[str, np.ndarray]) -> None:
        """clips: waveforms of the prompts by path."""
        self.config, self.family, self.prompts, self.clips = config, family, prompts, clips
        self.sampler = VllmSampler(config, family, config.rollout.urls)
        self.parts: list[str] = list(config.student.train)  # that are perturbed and pushed

    def sample(self) -> list[Rollout]:
        """Two answers of the server to each prompt in each view. Raises ServerError when it reads other prompt ids."""
        jobs: list[tuple[Prompt, View, str]] = [(p, v, p.id) for v in VIEWS for p in self.prompts]
        return self.sampler.sample(jobs, self.clips, 2, 1.0, check=False)

    @abstractmethod
    def mismatch(self, rollouts: list[Rollout]) -> Mismatch:
        """How far our log-probs of the responses are from the server's."""

    @abstractmethod
    def perturb(self) -> None:
        """Add noise to the weights of `parts`."""

    @abstractmethod
    def gathered(
        self, trainable_only: bool = True, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | None]]:
        """(Hugging Face name, tensor) of what `WeightSync.push` has to send: the trained weights of `parts`."""

    def push(self, sync: WeightSync, version: int) -> None:
        """Give the servers our weights and remember their version."""
        sync.push(self, version)
        self.sampler.version = version

    def perturbed_and_pushed(self, sync: WeightSync, version: int) -> tuple[Mismatch, Mismatch]:
        """Mismatch under perturbed weights: while the push is left out, and after it."""
        self.perturb()
        stale = self.mismatch(self.sample())
        self.push(sync, version)
        return stale, self.mismatch(self.sample())


class PlainStudent(Probe):
    """The student in this process, without DeepSpeed; with student.lora its adapters are what is perturbed."""

    def __init__(self, config: Config, family: Family, prompts: list[Prompt], clips: dict[str, np.ndarray]) -> None:
        super().__init__(config, family, prompts, clips)
        s = config.student
        hf = family.load(DTYPES[s.dtype], s.attention)
        self.model = SpeechLM(hf, family, list(s.train), s.lora, config.run.seed).eval()
        self.device = torch.device("cpu")
        self.generator = torch.Generator().manual_seed(7)

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.model.to(device)
        self.device = device

    def gathered(
        self, trainable_only: bool = True, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor | None]]:
        for piece in pieces(self.model.hf, trainable_only):
            if self.family.part_of(piece.name) in self.parts:
                yield piece.name, piece.value(device)

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """(name in memory, weights) of what is trained of `parts`."""
        for name, p in self.model.hf.named_parameters():
            if p.requires_grad and self.family.part_of(name) in self.parts:
                yield name, p.data

    def perturb(self) -> None:
        """By NOISE times each parameter's root mean square; what is all zero (LoRA's B) by the square of NOISE."""
        for _, p in self.trained():
            noise = torch.randn(p.shape, generator=self.generator).to(p)
            p.add_(noise * NOISE * (float(p.float().square().mean().sqrt()) or NOISE))

    def originals(self) -> dict[str, Tensor]:
        """Copies of the weights that `perturb` changes."""
        return {name: p.cpu().clone() for name, p in self.trained()}

    def restore(self, originals: dict[str, Tensor]) -> None:
        """Take back what `perturb` did."""
        for name, p in self.trained():
            p.copy_(originals[name])

    def mismatch(self, rollouts: list[Rollout]) -> Mismatch:
        pairs = zip(self.logprobs(rollouts), rollouts, strict=True)
        away = np.concatenate([np.abs(ours - r.logprobs) for ours, r in pairs])
        return Mismatch(float(away.mean()), float(away.max()))

    def logprobs(self, rollouts: list[Rollout]) -> list[np.ndarray]:
        """Our log-probs [T] of each response's own tokens."""
        samples = make_samples([ScoredRollout(r, None) for r in rollouts], self.clips, self.family)
        found: dict[int, np.ndarray] = {}
        for part in split(samples, self.config.train.micro_batch_tokens):
            mb = collate(part).to(self.device)
            logp = torch.log_softmax(self.logits(mb), -1).gather(-1, mb.targets[..., None])[..., 0].cpu().numpy()
            found |= {id(s): row[: len(s.response_ids)] for s, row in zip(part, logp, strict=True)}
        return [found[id(s)] for s in samples]

    @torch.no_grad()
    def logits(self, mb: MicroBatch) -> Tensor:
        """Logits [B, T, V] of a micro-batch's response tokens."""
        heard = [self.clips[k] for k in mb.clips] or [np.zeros(self.family.sampling_rate // 2, np.float32)]
        features = {k: v.to(self.device) for k, v in self.family.features(heard).items()}
        inputs = mb.inputs
        if self.model.tower_trained:
            inputs["features"] = features
        elif mb.clips or self.model.adapter_trained:
            inputs["audio"] = self.model.encode(features)
        return self.model.response_logits(**inputs)
