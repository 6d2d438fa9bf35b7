"""The student as it was before its first step, frozen: the teacher `self`, and the reference of objective.reference.

Shape legend in opd/types.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opd.config.deepspeed import inference_settings
from opd.config.needs import copies_start, shards_start
from opd.config.schema import Config
from opd.models.base import Family
from opd.models.lora import switched_off
from opd.models.sharding import DTYPES, load_sharded
from opd.models.speech_lm import SpeechLM, Task, at_responses
from opd.objectives.token_loss import Logits, MicroBatch
from opd.teachers.local import LocalTeacher, frozen
from opd.types import Prompt, render

Running = tuple[SpeechLM, Callable[..., Any]]


class ReferenceModel:
    """Reads without gradient the speech view or the text view.

    A second copy of student.path, which stays the start when a run is resumed; with teacher.shard each rank holds a
    part of it. Where adapters are all that differs from the start, the learner's own module with them switched off.
    If its parameters are sharded (ZeRO-3), every rank has to call it as often as every other.
    """

    def __init__(self, config: Config, family: Family, device: torch.device, learner: Running | None) -> None:
        """`learner`: the module in training and its call through the engine; without one it is always a copy."""
        self.device, self.call = device, None
        if learner is None or copies_start(config):
            self.model = _copy(config, family, device)
        else:
            self.model, self.call = learner
        self.sharded = any(hasattr(p, "ds_id") for p in self.model.parameters())

    @torch.no_grad()
    def __call__(self, task: Task, **inputs: Any) -> Tensor:
        """`SpeechLM.forward` of the starting student."""
        if self.call is None:
            return self.model(task, **inputs)
        with ExitStack() as stack:
            stack.callback(self.model.train, self.model.training)
            stack.enter_context(switched_off(self.model.hf))
            self.model.eval()
            return self.call(task, **inputs)

    @torch.no_grad()
    def project(self, states: Tensor) -> Tensor:
        """What `SpeechLM.states` gave -> logits [n, V]; of a sharded student those are what it gave."""
        return states if self.sharded else self.model.project(states)

    def logits(self, mb: MicroBatch, inputs: dict[str, Any]) -> Logits:
        """Logits of the micro-batch's response tokens, each in its own view.

        inputs: `Learner.inputs` of it. Trained parts of the audio path are its own.
        """
        states = self("states", whole=self.sharded, **at_responses(inputs, mb.mask))
        return lambda part: self.project(states[part])


class SelfTeacher(LocalTeacher):
    """The student at the start, reading the text view under its own chat template."""

    def __init__(self, config: Config, family: Family, start: ReferenceModel) -> None:
        self.config, self.family, self.tokenizer, self.start = config, family, family.tokenizer, start
        self.sharded, self.device = start.sharded, start.device
        self._knows(family.vocab_size, family.banned_ids, family.eos_ids, family.vocab_size)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.family.prompt_ids(render(prompt, "text"), [])

    def _states(self, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        length = ids.shape[1]
        order = torch.arange(length, device=ids.device)
        attends = (order <= order[:, None])[None, None].expand(len(ids), 1, length, length)  # padding is on the right
        positions = order.expand_as(ids)
        return self.start("states", ids=ids, position_ids=positions, attends=attends, at=at, whole=self.sharded)

    def _project(self, states: Tensor) -> Tensor:
        return self.start.project(states)

    def _write(self, **arguments: Any) -> Tensor:
        return self.start("generate", **arguments)


def _copy(config: Config, family: Family, device: torch.device) -> SpeechLM:
    dtype = config.student.dtype
    settings = inference_settings(config, dtype) if shards_start(config) else None
    load = partial(family.load, DTYPES[dtype], config.student.attention)
    hf = load_sharded(load, settings) if settings else load()
    model = SpeechLM(hf, family, list(config.student.train))  # what is trained, it is given as the learner is
    frozen(model, settings, device)
    return model
