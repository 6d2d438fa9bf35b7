"""The learner: DeepSpeed ZeRO around one speech LLM. Shape legend in opd/types.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opd.config.deepspeed import deepspeed_settings
from opd.config.needs import CLIPS_PER_CALL
from opd.config.schema import Config
from opd.models.base import Family
from opd.models.lora import Piece, adapters, pieces
from opd.models.sharding import DTYPES, all_reduce, load_sharded
from opd.models.speech_lm import SpeechLM, Task, at_responses
from opd.objectives.token_loss import MicroBatch, TokenLoss
from opd.settings import UserError
from opd.train.batch import collate
from opd.types import VIEWS, Batch, Clips, Sample, packed

if TYPE_CHECKING:
    from opd.teachers.reference import ReferenceModel

GATHERED = 1 << 25  # elements of sharded parameters that are whole at a time
Weights = Iterator[tuple[str, Tensor | None]]  # by Hugging Face name


@dataclass
class StepResult:
    """What a step found."""

    metrics: dict[str, float]  # over all ranks, the same on every rank
    advantages: list[list[float]]  # per token of each of the batch's samples; [] where the objective has none


class Learner:
    """Forward, backward and step of the student; knows nothing of servers, teachers or data."""

    reference: ReferenceModel | None = None  # with objective.reference

    def __init__(self, config: Config, family: Family, model_path: str) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        self.config, self.family = config, family
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())
        settings = deepspeed_settings(config)
        hf: Any = load_sharded(lambda: family.load(DTYPES[config.student.dtype], config.student.attention), settings)
        model = SpeechLM(hf, family, list(config.student.train), config.student.lora, config.run.seed)
        if config.train.gradient_checkpointing:
            whole = hf if hf.supports_gradient_checkpointing else hf.get_submodule(family.language_model)
            whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            raise UserError(f"student.train {config.student.train}: {model_path} has no parameter there")
        optimizer = _optimizer(config, params, settings)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model: SpeechLM = self.engine.module
        self.model.train()
        self._silent_clip = self._features([np.zeros(family.sampling_rate // 2, np.float32)])
        self._silence: list[Tensor] | None = None
        if self.model.adapter_trained and not self.model.tower_trained:
            self._silence = self.call("encode", features=self._silent_clip)

    def step(self, batch: Batch, step: int, teacher: Any = None) -> StepResult:
        """One gradient step on the batches of all ranks.

        `teacher.logits(samples)` gives its distributions to objectives that read them.
        """
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(hash((self.config.run.seed, step, self.rank)))  # dropout is the same after a resume
        audio = self.encode(batch.clips, batch.samples)
        stats = Sums(len(batch.samples))
        last = len(batch.micro_batches) - 1
        for i, samples in enumerate(batch.micro_batches):
            mb = collate(samples).to(self.device)
            loss = self._loss(mb, audio, batch.clips, stats, teacher)
            self.engine.set_gradient_accumulation_boundary(i == last)
            self.engine.backward(loss * self.world, scale_wrt_gas=False)  # ZeRO averages over ranks: we mean the sum
            self.engine.step()
        of_step = {"lr": lr, "grad_norm": float(self.engine.get_global_grad_norm() or 0.0)}
        return StepResult(stats.reduce() | of_step, stats.advantages)

    def _loss(self, mb: MicroBatch, audio: dict[str, Tensor], clips: Clips, stats: Sums, teacher: Any) -> Tensor:
        objective = self.config.objective
        inputs = self.inputs(mb, audio, clips)
        logits = reference = aligned = None
        if objective.about.other_tokenizer:
            aligned = teacher.aligned(mb.samples)
        elif objective.reads == "logits":
            logits = teacher.logits(mb.samples)
        if objective.reference > 0:
            assert self.reference is not None
            reference = self.reference.logits(mb, inputs)
        loss = TokenLoss(mb, objective, self.config.rollout.temperature, logits, reference, aligned)
        total = self.call("response_loss", **inputs, loss=loss, mask=mb.mask)
        stats.total("loss", total)
        self._count(mb, loss.found(), stats)
        return total

    def _count(self, mb: MicroBatch, found: dict[str, Tensor], stats: Sums) -> None:
        """Add the metrics [N] of a micro-batch's tokens to the step's, but for samples that only fill up."""
        real = mb.mask.bool()
        counted = (mb.weights > 0)[real]
        if (advantage := found.pop("advantage", None)) is not None:
            for s, own in zip(mb.samples, advantage.split(real.sum(1).tolist()), strict=True):
                if s.weight > 0:
                    stats.advantages[s.place] = own.tolist()
        if (kl := found.pop("reverse_kl", None)) is not None:
            for view in VIEWS:
                of_view = torch.tensor([s.scored.rollout.view == view for s in mb.samples], device=real.device)
                stats.add(f"reverse_kl/{view}", kl, counted & of_view[:, None].expand_as(real)[real])
        for name, values in found.items():
            stats.add(name, values, counted & ~values.isnan())

    def encode(self, clips: Clips, samples: list[Sample]) -> dict[str, Tensor]:
        """Run what is frozen of the audio path once per clip; the same number of calls on every rank."""
        if self.model.tower_trained:
            return {}
        keys = sorted({k for s in samples for k in s.clips}, key=lambda k: len(clips[k]))
        chunks = [keys[i : i + CLIPS_PER_CALL] for i in range(0, len(keys), CLIPS_PER_CALL)]
        calls = int(all_reduce(torch.tensor(float(len(chunks))), "max"))
        audio: dict[str, Tensor] = {}
        for chunk in chunks:
            outputs = self.call("encode", features=self._features([clips[k] for k in chunk]))
            audio.update(zip(chunk, outputs, strict=True))
        for _ in range(calls - len(chunks)):
            self.call("encode", features=self._silent_clip)
        return audio

    def inputs(self, mb: MicroBatch, audio: dict[str, Tensor], clips: Clips) -> dict[str, Any]:
        """What `SpeechLM` takes of a micro-batch; `audio`: what `encode` gave for its clips.

        Without clips a silent one, where something of the audio path is trained.
        """
        keys = mb.clips
        if self.model.tower_trained:
            return mb.inputs | {"features": self._features([clips[k] for k in keys]) if keys else self._silent_clip}
        if keys:
            return mb.inputs | {"audio": [audio[k] for k in keys]}
        return mb.inputs if self._silence is None else mb.inputs | {"audio": self._silence}

    def eval_logits(self, samples: list[Sample], clips: Clips) -> tuple[MicroBatch, Tensor]:
        """One micro-batch and its logits [B, T, V] without gradient; every rank calls it as often as every other."""
        return self._evaluated("response_logits", samples, clips, lambda inputs, mask: inputs)

    def eval_states(self, samples: list[Sample], clips: Clips) -> tuple[MicroBatch, Tensor]:
        """As `eval_logits`, the hidden states [N, H] of the response tokens alone, one response after another."""
        return self._evaluated("states", samples, clips, at_responses)

    @torch.no_grad()
    def _evaluated(self, task: Task, samples: list[Sample], clips: Clips, given: Any) -> tuple[MicroBatch, Tensor]:
        self.model.eval()
        mb = collate(samples).to(self.device)
        found = self.call(task, **given(self.inputs(mb, self.encode(clips, samples), clips), mb.mask))
        self.model.train()
        return mb, found

    @torch.no_grad()
    def at_output_layer(self, run: Callable[[], Tensor]) -> Tensor:
        """`run()`, in which `model.project` makes logits of states; every rank calls it as often as every other."""
        return self.call("at_output_layer", run=run)

    def call(self, task: Task, **inputs: Any) -> Any:
        """`SpeechLM.forward` through DeepSpeed's engine."""
        return self.engine(task, **inputs)

    def _features(self, waves: list[np.ndarray]) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in self.family.features(waves).items()}

    def gathered(self, trainable_only: bool = True, device: torch.device | str = "cpu") -> Weights:
        """(Hugging Face name, full tensor on rank 0's `device`, None on other ranks), few parameters at a time.

        With student.lora as of the plain model: adapters merged into what they adapt. `trainable_only`: what training
        changes, and what vLLM has to be given beside it (opd.models.lora.pieces). A collective: every rank must
        exhaust it.
        """
        yield from self._whole(list(pieces(self.model.hf, trainable_only)), device)

    def gathered_adapters(self) -> Weights:
        """As `gathered`, the adapters of student.lora themselves, by their names in memory."""
        yield from self._whole(adapters(self.model.hf), "cpu")

    def _whole(self, found: list[Piece], device: torch.device | str) -> Weights:
        import deepspeed

        for group in _groups(found):
            with deepspeed.zero.GatheredParameters([p for piece in group for p in piece.parameters]):
                values = [piece.value(device) if self.rank == 0 else None for piece in group]
            yield from zip((piece.name for piece in group), values, strict=True)


def _groups(found: list[Piece]) -> list[list[Piece]]:
    """Runs of at most GATHERED elements together: one collective for many small parameters."""

    def elements(pieces: list[Piece]) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for piece in pieces for p in piece.parameters)

    return packed(found, lambda group, piece: elements([*group, piece]) <= GATHERED)


class Sums:
    """Token-weighted means of a step, summed over micro-batches and then over ranks; advantages by sample."""

    def __init__(self, samples: int = 0) -> None:
        self.advantages: list[list[float]] = [[] for _ in range(samples)]
        self.sums: dict[str, list[float]] = {}
        self.totals: dict[str, float] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Count `values` [N] where `mask` [N] is true towards the mean called `name`."""
        pair = self.sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(values.detach()[mask].double().sum())
        pair[1] += float(mask.sum())

    def total(self, name: str, value: Tensor) -> None:
        """Add a scalar to the sum called `name`."""
        self.totals[name] = self.totals.get(name, 0.0) + float(value.detach())

    def reduce(self) -> dict[str, float]:
        """Means and totals over all ranks; a name that nothing was counted for is left out."""
        names = list(self.sums)
        flat = [x for n in names for x in self.sums[n]] + list(self.totals.values())
        out = all_reduce(torch.tensor(flat, dtype=torch.float64), "sum").tolist()
        means = {n: out[2 * i] / out[2 * i + 1] for i, n in enumerate(names) if out[2 * i + 1] > 0}
        return means | dict(zip(self.totals, out[2 * len(names) :], strict=True))


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then constant, linear or cosine down to final_lr_share."""
    o = config.optim
    warm = min(1.0, (step + 1) / o.warmup_steps) if o.warmup_steps else 1.0
    progress = step / max(1, config.train.steps - 1)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - (1.0 - o.final_lr_share) * progress,
        "cosine": o.final_lr_share + (1.0 - o.final_lr_share) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[o.schedule]
    return o.lr * warm * decay


def _optimizer(config: Config, params: list[Any], settings: dict[str, Any]) -> Any:
    o = config.optim
    options: dict[str, Any] = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    offload = (settings.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, **options)
    return torch.optim.AdamW(params, **options)
