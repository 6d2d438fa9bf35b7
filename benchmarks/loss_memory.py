"""Memory and time of each objective's loss, one forward and backward pass, beside whole logits and chunked peers.

    python benchmarks/loss_memory.py

From hidden states [N, H] and output layers [V, H] of student and teacher to the gradients of the student's. Peers:
TRL's chunked divergence and log-probs, and Liger's chunked JSD where liger_kernel is importable (it is no dependency).
`plain` is the same formula over whole logits, with autograd.

Bytes are the peak of all that lives at once beyond the inputs: on a GPU the allocator's, on a CPU the storages that
operations make and free, counted at `--tokens` under torch's FakeTensorMode, where nothing is allocated and sizes are
the same. What one operation needs inside, such as a matrix product's workspace, is not in the latter. Seconds are
medians of alternated repeats at `--timed-tokens`, at which plain fits into memory; losses and gradients are compared
first.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.nn import functional

from opd.config.objective import OBJECTIVES, ObjectiveConfig
from opd.objectives.losses import EXCLUDED, LOSSES, Tokens
from opd.objectives.token_loss import MicroBatch, TokenLoss, chunks, summed_loss

RESPONSE = 512  # tokens
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def mb_of(a: argparse.Namespace, tokens: int) -> MicroBatch:
    """Responses of RESPONSE tokens, the last one shorter."""
    b, t = -(-tokens // RESPONSE), min(tokens, RESPONSE)
    mask = (torch.arange(b * t) < tokens).view(b, t).float()
    none, targets = torch.zeros(0), torch.randint(0, a.vocab // 2, (b, t))
    logp = -5.0 - torch.rand(b, t)
    ids = torch.randint(0, a.vocab // 2, (b, t, a.top_k))
    many = (targets, mask, mask / tokens, logp, logp.clone(), torch.ones(b).bool(), ids, torch.full(ids.shape, -6.0))
    values: list[Any] = [[], none, none, none, none, none, *many]
    return MicroBatch(**{f.name: value for f, value in zip(fields(MicroBatch), values, strict=True)})


@dataclass
class Inputs:
    """Of one micro-batch."""

    hidden: Tensor  # [N, H]
    head: nn.Linear
    theirs: Tensor  # [N, H], the teacher's hidden states
    teacher: nn.Linear
    banned: Tensor  # [V]
    mb: MicroBatch
    ready: list[TokenLoss] = field(default_factory=list)

    @property
    def fake(self) -> bool:
        """Whether only shapes are there."""
        return isinstance(self.hidden, FakeTensor)

    @classmethod
    def make(cls, a: argparse.Namespace, tokens: int, device: str, mb: MicroBatch) -> Inputs:
        dtype = getattr(torch, a.dtype)
        torch.manual_seed(0)
        with torch.device(device):
            head, teacher = (nn.Linear(a.hidden, a.vocab, bias=False, dtype=dtype) for _ in range(2))
            hidden, theirs = (torch.randn(tokens, a.hidden, dtype=dtype) * 2.0 for _ in range(2))
        banned = torch.arange(a.vocab, device=device) >= a.vocab - 200
        teacher.requires_grad_(False)
        return cls(hidden.requires_grad_(), head, theirs, teacher, banned, mb)

    def finished(self, logits: Tensor) -> Tensor:
        """As SpeechLM.finished."""
        return logits.float().masked_fill(self.banned, EXCLUDED)

    @torch.no_grad()
    def rows(self, part: slice) -> Tensor:
        """As LocalTeacher.rows."""
        return self.finished(functional.linear(self.theirs[part], self.teacher.weight))

    def loss(self, o: ObjectiveConfig) -> TokenLoss:
        """The micro-batch's, or what `imitate` made of it."""
        return self.ready[0] if self.ready else TokenLoss(self.mb, o, 1.0, self.rows if o.reads == "logits" else None)

    def imitate(self, o: ObjectiveConfig, mode: FakeTensorMode) -> Inputs:
        """Without values, which making a TokenLoss and the preview of `cord` read; the preview needs less than the
        rest."""

        def shape_of(x: Any) -> Any:
            return mode.from_tensor(x) if isinstance(x, Tensor) else x

        loss = self.loss(o)
        if loss.previews:
            loss.tokens["importance"] = torch.ones(self.mb.mask.bool().sum())
        for name, value in vars(loss).items():
            setattr(loss, name, shape_of(value))
        loss.tokens = {name: shape_of(value) for name, value in loss.tokens.items()}
        self.ready = [loss]
        return self


def ours(x: Inputs, o: ObjectiveConfig) -> Tensor:
    """As SpeechLM.response_loss."""
    loss, parts = x.loss(o), chunks(len(x.hidden), len(x.banned))
    if loss.previews and not x.fake:
        with torch.no_grad():
            loss.preview(lambda p: x.finished(functional.linear(x.hidden[p], x.head.weight)), parts)
    return summed_loss(x.hidden, x.head, lambda raw, part: loss(x.finished(raw), part), parts)


def plain(x: Inputs, o: ObjectiveConfig) -> Tensor:
    """Whole logits and autograd, without the metrics that ours computes beside."""
    loss, every = x.loss(o), slice(None)
    tokens = Tokens(logits=x.finished(x.head(x.hidden)), temperature=1.0, **loss.tokens | {"sampled": None})
    tokens.teacher_logits = x.rows(every) if o.reads == "logits" else None
    if o.name == "cord":
        tokens.importance = torch.ones(len(x.hidden), device=x.hidden.device)
    return (LOSSES[o.name](tokens, o).loss * loss.weights).sum()


def trl_divergence(x: Inputs, o: ObjectiveConfig) -> Tensor:
    """Of all ids: it knows of none that is banned."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    args = (x.hidden, x.head.weight, None, x.theirs, x.teacher.weight, None, BETAS[o.name])
    kl, _ = ChunkedDivergenceFunction.apply(*args)
    return (kl * x.loss(o).weights).sum()


def trl_logprob(x: Inputs, o: ObjectiveConfig) -> Tensor:
    """Log-probabilities and entropy of the targets in chunks, and what `sft` and `xopd` do with them."""
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    loss = x.loss(o)
    args = (x.hidden, x.head.weight, None, loss.tokens["targets"], 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ("entropy",))
    logp = ChunkedLogProbFunction.apply(*args)[0]
    if o.name == "sft":
        return -(logp * loss.weights).sum()
    ratio = (logp - loss.tokens["sampler_logp"]).detach().exp().clamp(max=o.ratio_max)
    score = 1.0 + logp - logp.detach()
    return -(ratio * (loss.tokens["teacher_logp"] - logp).detach() * score * loss.weights).sum()


def liger_jsd(x: Inputs, o: ObjectiveConfig) -> Tensor:
    """Its mean over tokens, without the hard loss; compiled on a GPU, as its default is."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    gpu = x.hidden.is_cuda
    mean = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[o.name], compiled=gpu)
    return mean(x.hidden, x.head.weight, x.theirs, x.teacher.weight, x.loss(o).targets)


Loss = Callable[[Inputs, ObjectiveConfig], Tensor]


def peers(name: str, top: bool) -> dict[str, Loss]:
    """What else computes an objective."""
    if name in BETAS and not top:
        return {"TRL": trl_divergence, "Liger": liger_jsd}
    return {"TRL": trl_logprob} if name in ("sft", "xopd") else {}


def passed(x: Inputs, o: ObjectiveConfig, of: Loss) -> Tensor:
    """Forward and backward; the loss."""
    x.hidden.grad = x.head.weight.grad = None
    loss = of(x, o)
    loss.backward()
    return loss.detach()


def peak(a: argparse.Namespace, o: ObjectiveConfig, of: Loss) -> int:
    """Bytes at --tokens."""
    if a.device == "cuda":
        x = Inputs.make(a, a.tokens, "cuda", mb_of(a, a.tokens).to(torch.device("cuda")))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        passed(x, o, of)
        return torch.cuda.max_memory_allocated() - before
    sys.path.append(str(Path(__file__).parents[1] / "tests/unit"))
    from live_memory import LiveMemory

    mb = mb_of(a, a.tokens)
    with FakeTensorMode() as mode:
        x = Inputs.make(a, a.tokens, "cpu", mb)
    x.imitate(o, mode)
    with mode, LiveMemory() as live, suppress(DataDependentOutputException):
        passed(x, o, of)  # Liger's backward ends in asking whether the loss's own gradient is 1: all was made before
    return int(live.peak)


def seconds(a: argparse.Namespace, o: ObjectiveConfig, found: dict[str, Loss]) -> dict[str, float]:
    """Medians at --timed-tokens, after a look at whether all compute the same."""
    x = Inputs.make(a, a.timed_tokens, a.device, mb_of(a, a.timed_tokens).to(torch.device(a.device)))
    exact = a.dtype == "float32"
    if "TRL" in found:
        x.banned = torch.zeros_like(x.banned)  # peers know of no banned ids
    want: Any = None
    for name, of in found.items():
        if o.name == "cord" and name == "plain":
            continue  # whose weights are all 1
        loss, g = passed(x, o, of), x.hidden.grad
        assert g is not None
        if want is None:
            want = loss, g.clone()
            continue
        off = float((g - want[1]).abs().max() / want[1].abs().max())
        assert abs(float(loss - want[0])) < 1e-3 * abs(float(loss)) + 1e-4 and (not exact or off < 1e-3), (name, off)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(a.repeats):
        for name, of in found.items():
            gc.collect()
            start = time.perf_counter()
            passed(x, o, of)
            if a.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="of the bytes")
    parser.add_argument("--timed-tokens", type=int, default=1024, help="of the seconds; 0: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    # that of other tokenizers is TRL's own, of whole responses
    whole = [name for name, about in OBJECTIVES.items() if not about.other_tokenizer]
    known = [*whole, *(f"{name},top_k" for name in BETAS)]
    parser.add_argument("--objectives", nargs="+", default=[*whole, "reverse_kl,top_k"], choices=known, metavar="NAME")
    a = parser.parse_args()
    try:
        import liger_kernel

        liger = True
        print(f"Liger is here: {Path(liger_kernel.__file__).parent}")
    except ImportError:
        liger = False
        print("liger_kernel is not importable: left out")
    print(f"V = {a.vocab}, H = {a.hidden}, {a.dtype}; bytes at N = {a.tokens}, seconds at N = {a.timed_tokens}")
    print(f"{'objective':18} {'':6} {'GiB':>7} {'/plain':>7} {'s':>8} {'/plain':>7} {'/best peer':>10}")
    for spec in a.objectives:
        name, _, top = spec.partition(",")
        o = ObjectiveConfig(name=name, top_k=a.top_k if top else None)
        found: dict[str, Loss] = {"ours": ours, "plain": plain, **peers(name, bool(top))}
        if not liger:
            found.pop("Liger", None)
        size = {n: peak(a, o, of) for n, of in found.items()}
        took = seconds(a, o, found) if a.timed_tokens else dict.fromkeys(found, float("nan"))
        best = min((t for n, t in took.items() if n not in ("ours", "plain")), default=float("nan"))
        for n in found:
            ratios = (
                f"{size[n] / size['plain']:7.3f} {took[n]:8.2f} {took[n] / took['plain']:7.2f} {took[n] / best:10.2f}"
            )
            print(f"{spec if n == 'ours' else '':18} {n:6} {size[n] / 2**30:7.2f} {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
