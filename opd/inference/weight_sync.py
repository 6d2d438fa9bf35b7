"""New weights into live vLLM servers: names, versions, cache resets, and servers that sleep meanwhile."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from opd.config.schema import Config
from opd.inference.client import Server, on_each
from opd.inference.transports import TRANSPORTS, WeightTransport
from opd.models.base import Family


class WeightSync:
    """Pushes what was trained; every rank calls every method, rank 0 talks.

    Where the servers share the learner's device (rollout.sleep) they sleep from `sleep` to the next `push`.
    """

    def __init__(self, servers: list[Server], family: Family, config: Config, rank: int) -> None:
        self.servers, self.family, self.rank = servers, family, rank
        self.audio_trained = bool({"tower", "adapter"} & set(config.student.train))
        self.sleeps, self.asleep = bool(config.rollout.sleep), False
        self.version: int | None = None  # of the last push
        make = TRANSPORTS[config.rollout.transport or "file"]
        self.transport: WeightTransport | None = make(config.rollout) if rank == 0 else None

    def push(self, learner: Any, version: int) -> None:
        """Send the learner's trainable weights to every server as `version`, then reset what they made stale.

        The prefix cache holds keys and values of the old weights: always. The encoder cache holds audio embeddings:
        when the tower or the adapter was trained. A server that was restarted since the last push, and so lost what
        receives weights, gets it again. Returns on all ranks when the servers are ready.
        Raises ServerError that names the server.
        """
        if self.asleep:
            self._wake("weights")
        if self.transport is None:
            deque(learner.gathered(), maxlen=0)
        else:
            if self.version is None or not self._hold(self.version):
                self.transport.connect(self.servers)
            gathered = learner.gathered(device=self.transport.device)
            published = (named for name, tensor in gathered for named in self.family.published(name, tensor))
            self.transport.send(published, self.servers, version)
        if self.asleep:  # keys and values get their memory only now: the weights on their way needed some, too
            self._wake("kv_cache")
        if self.rank == 0:
            on_each(self.servers, self._reset)
        self.version, self.asleep = version, False
        _barrier()

    def sleep(self) -> None:
        """Have the servers give their device to the learner, once every rank has its answers; wakes at `push`.

        Level 1: weights move to the host's memory, frozen ones too, keys and values are dropped; vLLM empties its
        prefix and encoder caches with them. Nothing happens without rollout.sleep.
        """
        if not self.sleeps or self.asleep:
            return
        _barrier()
        if self.rank == 0:
            on_each(self.servers, lambda server: server.post("/sleep?level=1"))
        _barrier()
        self.asleep = True

    def close(self) -> None:
        """Leave nothing of the transport behind."""
        if self.transport is not None:
            self.transport.close()

    def _hold(self, version: int) -> bool:
        """Whether every server has the weights that it was last sent."""
        return set(on_each(self.servers, lambda s: s.get("/weight_info")["weight_version"])) == {str(version)}

    def _reset(self, server: Server) -> None:
        server.post("/reset_prefix_cache")
        if self.audio_trained:
            server.post("/reset_encoder_cache")

    def _wake(self, tag: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the learner holds but does not use
        _barrier()
        if self.rank == 0:
            on_each(self.servers, lambda server: server.post(f"/wake_up?tags={tag}"))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
