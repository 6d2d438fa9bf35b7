"""The teacher reads the text view and scores the student's tokens: a local model, or a vLLM server.

No audio ever reaches it: prompts are rendered in the text view here and nowhere else. Shape legend in opd/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.config.deepspeed import inference_settings
from opd.config.schema import Config
from opd.models.base import Family
from opd.models.sharding import DTYPES, all_reduce, load_sharded
from opd.objectives.losses import EXCLUDED
from opd.objectives.token_loss import Logits, chunks
from opd.settings import UserError, first_line
from opd.teachers.base import Reply, TextReader, asked_ids, reply_of
from opd.types import Prompt, Rollout, Sample, ScoredRollout, packed


class LocalTeacher(TextReader):
    """A Hugging Face model in the learner process; also gives full-vocabulary logits.

    With teacher.shard each rank holds a part of it (ZeRO-3). Every forward pass then takes all ranks: each of them
    calls a method as often as the others, if only with nothing to read, and idle passes make up for unequal work.
    """

    gives_logits = True

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        super().__init__(config, family)
        t, safe = config.teacher, {"trust_remote_code": False, "use_safetensors": True}
        self.sharded, self.device = t.shard, device
        settings = inference_settings(config, t.dtype) if t.shard else None
        load = partial(AutoModelForCausalLM.from_pretrained, t.path, dtype=DTYPES[t.dtype], **safe)
        try:
            self.model = load_sharded(load, settings) if settings else load()
        except (OSError, ValueError) as e:
            raise UserError(f"teacher.path {t.path}: not loadable: {first_line(e)}") from e
        self.model.generation_config = GenerationConfig()  # the checkpoint's own would bend what is greedy
        frozen(self.model, settings, device)
        self._knows(family.vocab_size, family.banned_ids, family.eos_ids, self.model.config.vocab_size)

    def _knows(self, vocab: int, banned: list[int], eos: list[int], outputs: int) -> None:
        """Ids: how many there are, which are banned, which end a response; `outputs` of the output layer."""
        self.banned = torch.zeros(vocab, dtype=torch.bool, device=self.device)
        self.banned[banned] = True
        self.eos_ids, self.suppressed = eos, [i for i in banned if i < outputs]

    def _idle(self, calls: int) -> int:
        """How many more calls of a sharded model some other rank makes than this one."""
        return int(all_reduce(torch.tensor(float(calls)), "max")) - calls if self.sharded else 0

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        pairs = [(self.prompt_ids(r.prompt), r.token_ids) for r in rollouts]
        out: list[ScoredRollout | None] = [None] * len(rollouts)
        for chunk, states in self._passes(pairs):
            lengths = [len(rollouts[i].token_ids) for i in chunk]
            parts = chunks(sum(lengths), len(self.banned))
            found = [self._scored([rollouts[i] for i in chunk], states, p) for p in parts]
            columns = [torch.cat(c).cpu().split(lengths) for c in zip(*found, strict=True)]
            for i, logp, *top in zip(chunk, *columns, strict=True):
                out[i] = ScoredRollout(rollouts[i], logp.numpy(), *(x.numpy() for x in top))
        return [s for s in out if s is not None]

    def _scored(self, rollouts: list[Rollout], states: Tensor, part: slice) -> tuple[Tensor, ...]:
        """Of the tokens `part`: log-probs [n], with objective.top_k also ids [n, K] and log-probs [n, K]."""
        logp = torch.log_softmax(self._project(states[part]), -1)
        targets = torch.tensor([y for r in rollouts for y in r.token_ids][part], device=logp.device)
        of_targets = logp.gather(-1, targets[:, None])[:, 0]
        o = self.config.objective
        if o.top_of is None:
            return (of_targets,)
        if o.top_of == "teacher":
            best = logp.topk(min(o.top_k or 1, logp.shape[-1]))
            return of_targets, best.indices, best.values
        ids = torch.from_numpy(np.concatenate([asked_ids(r) for r in rollouts])[part]).to(logp.device)
        return of_targets, ids, logp.gather(-1, ids.clamp(min=0))

    def logits(self, samples: list[Sample]) -> Logits:
        """Logits of the samples' response tokens, one response after another, banned ids and ids it lacks at EXCLUDED.

        Reads them at once; makes the logits of a chunk when they are asked for. A sharded teacher, of whose output
        layer no rank has the whole, makes all of them first.
        """
        rollouts = [s.scored.rollout for s in samples]
        states = self._read([(self.prompt_ids(r.prompt), r.token_ids) for r in rollouts])
        return lambda part: self._project(states[part])

    def _read(self, pairs: list[tuple[list[int], tuple[int, ...]]]) -> Tensor:
        """What `_project` takes of all response tokens of (prompt ids, response ids), one response after another."""
        lengths = [len(y) for _, y in pairs]
        starts = np.cumsum([0, *lengths])
        flat: Tensor | None = None
        for chunk, states in self._passes(pairs):
            if flat is None:
                flat = states.new_empty(sum(lengths), states.shape[-1])
            for i, piece in zip(chunk, states.split([lengths[i] for i in chunk]), strict=True):
                flat[starts[i] : starts[i + 1]] = piece
        return torch.empty(0, len(self.banned), device=self.device) if flat is None else flat

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[Reply]:
        ids = [self.prompt_ids(p) for p in prompts]
        per_call = max(1, self.config.teacher.batch_tokens // (max(map(len, ids)) + max_tokens)) if ids else 1
        calls = [ids[i : i + per_call] for i in range(0, len(ids), per_call)]
        idle = self._idle(len(calls))
        replies = [reply for chunk in calls for reply in self._generate(chunk, max_tokens)]
        for _ in range(idle):
            self._generate([[0]], 1)  # goes on until every rank is done
        return replies

    @torch.no_grad()
    def _generate(self, ids: list[list[int]], max_tokens: int) -> list[Reply]:
        from transformers import GenerationConfig

        longest = max(map(len, ids))
        tokens = torch.tensor([[0] * (longest - len(i)) + i for i in ids], device=self.device)
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=self.device)
        ends: dict[str, Any] = {"eos_token_id": self.eos_ids, "pad_token_id": self.eos_ids[0]}
        banned = self.suppressed or None
        greedy = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, suppress_tokens=banned, **ends)
        out = self._write(input_ids=tokens, attention_mask=mask, generation_config=greedy, synced_gpus=self.sharded)
        return [reply_of(row, self.eos_ids) for row in out[:, longest:].tolist()]

    def _write(self, **arguments: Any) -> Tensor:
        return self.model.generate(**arguments)

    @torch.no_grad()
    def _passes(self, pairs: list[tuple[list[int], tuple[int, ...]]]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, what `_project` takes of their response tokens [n, ...]), batch_tokens padded tokens at a time."""
        found = _chunks([len(p) + len(y) for p, y in pairs], self.config.teacher.batch_tokens)
        idle = self._idle(len(found))
        for chunk in found:
            longest = sum(map(len, pairs[chunk[0]]))
            ids = torch.zeros(len(chunk), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            at: list[tuple[int, int]] = []
            for j, i in enumerate(chunk):
                p, y = pairs[i]
                ids[j, : len(p) + len(y)] = torch.tensor([*p, *y])
                mask[j, : len(p) + len(y)] = 1
                at += [(j, t) for t in range(len(p) - 1, len(p) + len(y) - 1)]
            yield chunk, self._states(ids.to(self.device), mask.to(self.device), torch.tensor(at, device=self.device))
        for _ in range(idle):
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
            self._states(ids, torch.ones_like(ids), ids[:, :2])

    def _states(self, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Read `ids` [B, L] -> what `_project` takes at the places `at` [n, 2]: hidden states, of a sharded teacher
        its logits."""
        kept: list[Tensor] = []

        def gather(layer: Any, args: tuple[Tensor]) -> Tensor:
            hidden = args[0][at[:, 0], at[:, 1]]
            kept.append(hidden)
            return (hidden if self.sharded else hidden[:1])[None]  # [B, L, V] would be large

        def keep(decoder: Any, args: Any, output: Any) -> None:
            self._output = output

        decoder = self.model.base_model
        with decoder.register_forward_hook(keep), self.model.get_output_embeddings().register_forward_pre_hook(gather):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not kept or logits.shape[1] != (len(at) if self.sharded else 1):
            raise UserError(
                f"teacher.path {self.config.teacher.path}: {type(self.model).__name__} makes its logits without its "
                "output layer; have vLLM serve it: teacher.kind=server"
            )
        return self._masked(logits[0]) if self.sharded else kept[0]

    @torch.no_grad()
    def _project(self, states: Tensor) -> Tensor:
        """The model's own logits [n, V], whatever it does to them, in float32; ids banned or missing at EXCLUDED."""
        if self.sharded:
            return states

        def ready(*args: Any, **kwargs: Any) -> Any:
            return type(self._output)(**{**self._output, "last_hidden_state": states[None]})

        decoder, ids = self.model.base_model, torch.zeros(1, len(states), dtype=torch.long, device=self.device)
        decoder.forward = ready  # of the instance: the class's own is back when it is deleted
        try:
            return self._masked(self.model(input_ids=ids, use_cache=False).logits[0])
        finally:
            del decoder.forward

    def _masked(self, logits: Tensor) -> Tensor:
        out = torch.full((len(logits), len(self.banned)), EXCLUDED, device=logits.device)  # float32
        shared = min(logits.shape[-1], len(self.banned))
        out[:, :shared] = logits[:, :shared]
        return out.masked_fill_(self.banned, EXCLUDED)


def frozen(model: Any, settings: dict[str, Any] | None, device: torch.device) -> None:
    """Make a model one that only reads: on `device`, or with `settings` of DeepSpeed in parts on all ranks."""
    model.eval().requires_grad_(False)
    if settings is None:
        model.to(device)
    else:
        import deepspeed

        deepspeed.initialize(model=model, config=settings)  # its hooks gather and release


def _chunks(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences, longest first, in chunks of at most `budget` padded tokens; a longer one is alone."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)[::-1]
    return packed(order, lambda chunk, _: (len(chunk) + 1) * lengths[chunk[0]] <= budget)
