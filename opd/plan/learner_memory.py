"""Bytes of a learner rank, by formula. Imports no torch.

N ranks; Psi parameters of the student, Psi_t of them trained; d bytes of student.dtype (2 or 4). Sources: ZeRO
(arXiv 1910.02054, section 3: what each stage divides by N), activations (arXiv 2205.05198, section 4: sums of what
backward needs, per layer), LoRA (arXiv 2106.09685, section 4.2: only the adapters have gradients and optimizer
states), and for the rest what DeepSpeed and opd/train/learner.py do; tests hold the states to a real engine's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from opd.config import needs
from opd.config.needs import asks_teacher_servers, copies_start, shards_start
from opd.config.placement import of_routes
from opd.config.schema import Config
from opd.plan.shapes import Decoder, ModelShape, Weight, teacher_shape
from opd.settings import UserError

SIZES = {"float32": 4, "bfloat16": 2}
Bytes = dict[str, int]


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts and responses that a figure is for."""

    speech: int  # prompt of the speech view, audio embeddings in it
    text: int  # prompt of the text view
    response: int
    audio: float  # seconds of a clip


@dataclass
class LearnerMemory:
    """Bytes of one rank: what stays on its device, what comes and goes in each phase of a step, what is on the host."""

    device: Bytes = field(default_factory=dict)
    phases: dict[str, Bytes] = field(default_factory=dict)
    host: Bytes = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Bytes on the device between two phases."""
        return sum(self.device.values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at worst, as torch.cuda.max_memory_allocated counts: no CUDA context, no loss of the allocator."""
        return self.resident + sum(self.phases[self.worst].values())


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides memory, with DeepSpeed's defaults (deepspeed/runtime/zero/config.py)."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    persistence: int
    bucket: int
    prefetch: int
    reuse: int
    sub_group: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Self:
        """From the settings that DeepSpeed gets. Raises UserError for an offload that no formula here covers."""
        z = settings.get("zero_optimization") or {}
        stage = int(z.get("stage", 0))
        places = [(z.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")]
        if bad := {*places} - {"none", "cpu"}:
            told = f"found {bad.pop()}, which is not planned for"
            raise UserError(f"train.deepspeed: expected offload to cpu or none, {told}")
        bucket = int(z.get("reduce_bucket_size", 5e8)) if z.get("contiguous_gradients", True) else 0
        return cls(
            stage,
            stage > 0 and places[0] == "cpu",
            stage == 3 and places[1] == "cpu",
            int(z.get("stage3_param_persistence_threshold", 1e5)),
            bucket * (2 if stage in (1, 2) and z.get("overlap_comm", False) else 1),
            int(z.get("stage3_prefetch_bucket_size", 5e7)),
            int(z.get("stage3_max_reuse_distance", 1e9)),
            int(z.get("sub_group_size", 1e9)),
        )


def trained(config: Config, shape: ModelShape) -> list[int]:
    """Elements of every tensor of student.train, the LLM's or its adapters'. Raises UserError when there is none."""
    parts = {*config.student.train} - ({"llm"} if config.student.lora else set())
    own = [w.numel for w in shape.weights if w.part in parts and "embed_positions" not in w.name]
    if not (found := own + adapters(config, shape)):
        raise UserError(f"student.train {config.student.train}: {shape.path} has no parameter there")
    return found


def adapters(config: Config, shape: ModelShape) -> list[int]:
    """Elements of LoRA's matrices [r, in] and [out, r] of every adapted layer; none without student.lora."""
    lora = config.student.lora
    return [lora.r * side for w in adapted(config, shape) for side in w.shape] if lora else []


def adapted(config: Config, shape: ModelShape) -> list[Weight]:
    """Weights [out, in] that LoRA adapts; fused experts are not linear. Raises UserError for an unknown target."""
    lora = config.student.lora
    if lora is None:
        return []
    linear = [w for w in shape.weights if w.part == "llm" and w.linear]
    names = {w.name.split(".")[-2] for w in linear}
    if unknown := [t for t in lora.targets if t not in names]:
        raise UserError(f"student.lora.targets: no linear layer {unknown[0]} in {shape.path}; it has {sorted(names)}")
    return [w for w in linear if not lora.targets or w.name.split(".")[-2] in lora.targets]


def states(zero: Zero, weights: list[int], trained: list[int], d: int, ranks: int) -> LearnerMemory:
    """Parameters, gradients and optimizer states of one rank (arXiv 1910.02054, figure 1), as DeepSpeed holds them.

    `weights`: elements of every tensor of the model, adapters included; `trained`: of those with a gradient.
    Stage 3 cuts each tensor into N parts of ceil(n / N); tensors up to stage3_param_persistence_threshold are whole
    beside that. Torch's AdamW works on a float32 copy (4 bytes, in float32 training too) and two moments (8 bytes):
    of all that is trained at stage 0, of a part in N from stage 1 on. Gradients have the dtype of the parameters and
    are whole up to stage 1. In the optimizer's step a float32 gradient (4) and AdamW's square root (4) join, one
    sub-group at a time at stage 3: 2 + 2 + 4 + 4 + 8 = 20 bytes a parameter, where DeepSpeed's own estimators say 18.
    Stage 0 trains float32 without a copy. What is offloaded has its float32 gradients on the host all the time.
    """
    out = LearnerMemory()
    mine = sum(-(-n // (ranks if zero.stage else 1)) for n in trained)
    if zero.stage == 3:
        (out.host if zero.offload_param else out.device)["parameters"] = sum(-(-n // ranks) for n in weights) * d
        out.device["small parameters, whole"] = sum(n for n in weights if n <= zero.persistence) * d
        out.device["gradient bucket"] = zero.bucket * d
    else:
        out.device["parameters"] = sum(weights) * d
    place = out.host if zero.offload_optimizer else out.device
    if zero.stage >= 2:
        place["gradients"] = mine * d
    else:
        out.device["gradients"] = sum(trained) * d
    if zero.stage or d == 2:
        place["float32 copy"] = mine * 4
    place["AdamW's moments"] = mine * 8
    if zero.offload_optimizer:
        place["float32 gradients"] = mine * 4
        if zero.stage < 3:
            place["updated parameters"] = mine * d
        out.phases["optimizer step"] = {}
        return out
    group = min(mine, zero.sub_group) if zero.stage == 3 else mine
    joins = {"float32 gradients": group * 4} if zero.stage or d == 2 else {}
    out.phases["optimizer step"] = {**joins, "AdamW's square root": group * 4}
    return out


def gathered(zero: Zero, weights: list[int], d: int, ranks: int) -> int:
    """Bytes of parameters that stage 3 holds whole at a time.

    DeepSpeed keeps a parameter that is used again within stage3_max_reuse_distance elements: at the turn from forward
    to backward that is the last half of them. With them comes what is prefetched, and the module at work. A lone rank
    uses its part, which is all, where it lies, unless that is on the host.
    """
    if zero.stage < 3 or (ranks == 1 and not zero.offload_param):
        return 0
    sharded = [n for n in weights if n > zero.persistence]
    return d * min(sum(sharded), zero.reuse // 2 + zero.prefetch + max(sharded, default=0))


@dataclass(frozen=True)
class MicroBatch:
    """The largest of one view that opd/train/batch.py makes: R rows of L tokens, of each a prompt and k responses."""

    rows: int
    length: int
    responses: int  # in a row
    positions: int  # response tokens, padded [B, T]


def micro_batch(prompt: int, response: int, n: int, budget: int) -> MicroBatch:
    """As train/batch.py packs n responses to each prompt: a row is cut at the budget, a lone sample may pass it."""
    k = max(1, min(n, (budget - prompt) // response))
    length = prompt + k * response
    rows = max(1, budget // length)
    return MicroBatch(rows, length, k, rows * k * response)


def layer_bytes(shape: ModelShape, d: int, length: int, attention: str) -> int:
    """Bytes that one decoder layer keeps for backward, per token (counted as in arXiv 2205.05198, section 4.1).

    h hidden, a heads * head_dim, i intermediate, all without dropout: two RMS norms computed in float32 keep their
    input and its normalised copy, 2 (4h + dh); inputs of q, k, v and of gate, up: 2dh; q, k, v (repeated to all
    heads), attention output and its copy for o: 5da; gate, SiLU, up and their product: 4di. A mixture adds its
    permuted tokens: 3dh per expert. Eager attention keeps scores, softmax in float32 and its cast: heads * L * (2d+4).
    """
    m = shape.decoder
    h, a, i = m.hidden, m.heads * m.head_dim, m.intermediate
    out = 2 * (4 * h + d * h) + 2 * d * h + 5 * d * a + 4 * d * i
    if m.experts > 1:
        out += 3 * d * h * m.experts_per_token
    if attention == "eager":
        out += m.heads * length * (2 * d + 4)
    return out


def activations(shape: ModelShape, config: Config, mb: MicroBatch) -> tuple[int, int]:
    """(bytes kept from forward to backward, bytes that the backward pass of one layer adds).

    With gradient checkpointing each layer keeps its input (dh a token), and its activations come again one layer at a
    time; without, every layer keeps all (arXiv 2205.05198, section 5). Kept beside: the attention bias [R, 1, L, L] (d)
    and the mask that it was made of (1). Backward adds the gradients of a layer's widest tensors, d (2h + 2i).
    """
    d, m = SIZES[config.student.dtype], shape.decoder
    per_layer = layer_bytes(shape, d, mb.length, config.student.attention)
    again = config.train.gradient_checkpointing
    kept = (m.layers + 1) * d * m.hidden if again else m.layers * per_layer
    adds = d * (2 * m.hidden + 2 * m.intermediate) + (per_layer if again else 0)
    tokens = mb.rows * mb.length
    return tokens * (kept + mb.length * (d + 1)), tokens * adds


def tower_bytes(shape: ModelShape, d: int, seconds: float, clips: int, kept: bool) -> int:
    """Bytes of the tower's activations over `clips` clips: of one layer, or of all when they are `kept` for backward.

    w width, f intermediate: per position d (9w + 2f), as `layer_bytes`, with a GELU instead of the gate and norms in d.
    """
    t = shape.tower
    if t is None:
        return 0
    positions = clips * round(seconds * t.positions_per_second)
    return positions * d * (9 * t.width + 2 * t.intermediate) * (t.layers if kept else 1)


def chunk_tensors(config: Config) -> int:
    """Tensors [n, V] of a chunk alive at once, of which one, the raw logits, in student.dtype, the others in float32.

    Without the teacher's logits: raw logits, banned ids masked, log-softmax, and two gradients on the way back. A
    divergence joins its two sides, exponentials and differences; a test counts them all. `uld` sorts both sides, too.
    """
    o, about = config.objective, config.objective.about
    found = 5
    if o.reads == "logits":
        found = about.tensors + (about.mixture if 0.0 < o.beta < 1.0 else 0)
    elif config.rollout.temperature != 1.0:
        found += about.tempered
    return found + (3 if o.reference > 0 else 0)


def chunk_tokens(vocab: int, tokens: int) -> int:
    """Response tokens whose logits exist at a time (opd.objectives.token_loss.chunks)."""
    return min(tokens, max(1, needs.ELEMENTS // vocab))


def loss_bytes(shape: ModelShape, config: Config, mb: MicroBatch) -> Bytes:
    """Bytes while the loss is computed, chunk by chunk (opd/objectives/token_loss.py).

    `chunk_tensors` of a chunk's [n, V], or, of a trained output layer in bfloat16, what a chunk adds to its gradient,
    Vhd, beside the chunk's own; that gradient, float32, 4Vh; hidden states [N, h] of the responses, and their gradient.
    """
    d, m = SIZES[config.student.dtype], shape.decoder
    whole = config.objective.about.other_tokenizer  # responses instead of chunks
    n = mb.positions // mb.rows // mb.responses if whole else chunk_tokens(m.vocab, mb.positions)
    out = {"logits and loss": n * m.vocab * (4 * (chunk_tensors(config) - 1) + d)}
    if "llm" in config.student.train and config.student.lora is None:
        out["output layer's gradient"] = 4 * m.vocab * m.hidden
        if d == 2:
            out["logits and loss"] = max(out["logits and loss"], d * m.vocab * (m.hidden + n))
    return out | {"hidden states of responses": 2 * d * mb.positions * m.hidden}


def teacher_bytes(teacher: ModelShape, vocab: int, config: Config, lengths: Lengths, samples: int) -> Bytes:
    """Bytes while a local teacher scores: one layer's activations, hidden states, two float32 rows of a chunk's tokens.

    A pass has at most teacher.batch_tokens padded tokens, each sample in a row of its own. A sharded teacher
    makes the logits of a whole pass at once, in its own dtype and in float32.
    """
    d = SIZES[config.teacher.dtype]
    length = lengths.text + lengths.response
    batch = max(1, min(samples, config.teacher.batch_tokens // length))
    tokens = batch * lengths.response
    part = chunk_tokens(vocab, tokens)
    whole = max((d + 4) * tokens, 4 * (tokens + part)) * vocab
    return {
        "teacher's activations": batch * length * layer_bytes(teacher, d, length, "sdpa"),
        "teacher's hidden states": d * tokens * teacher.decoder.hidden,
        "teacher's logits": whole if config.teacher.shard else 8 * part * vocab,
    }


def read_bytes(teacher: ModelShape, vocab: int, config: Config, lengths: Lengths, mb: MicroBatch) -> tuple[int, Bytes]:
    """(bytes of what a micro-batch keeps of a local teacher, bytes while the teacher reads it) for its rows.

    Hidden states, of which the loss makes the rows of a chunk; of a sharded teacher the logits, float32.
    """
    reads = teacher_bytes(teacher, vocab, config, lengths, mb.rows * mb.responses)
    wide = 4 * vocab if config.teacher.shard else SIZES[config.teacher.dtype] * teacher.decoder.hidden
    kept = mb.positions * wide
    if not config.teacher.shard:
        del reads["teacher's logits"]
    return kept, reads | {"teacher's, of the micro-batch": kept}


def kv_token_bytes(m: Decoder, d: int, tensor_parallel: int = 1) -> int:
    """Bytes of a token's keys and values on one GPU: heads are divided among GPUs, replicated where those are more."""
    return 2 * m.layers * max(1, m.kv_heads // tensor_parallel) * m.head_dim * d


def frozen(config: Config, student: ModelShape, teacher: ModelShape | None) -> dict[str, tuple[int, bool]]:
    """Bytes of the weights that a rank holds beside the student's, by name, and whether the ranks share them.

    `teacher`: what `teacher_shape` gave, None without one; the shapes of several local ones are looked up.
    """
    found = {}
    for route, one in of_routes(config).items():
        if one.teacher.about.weights == "own" and teacher is not None:
            shape = teacher_shape(one) if route else teacher
            found[f"local teacher {route}".strip()] = shape.count() * SIZES[one.teacher.dtype], one.teacher.shard
    if copies_start(config):
        found["student at the start"] = student.count() * SIZES[config.student.dtype], shards_start(config)
    return found


def learner_memory(
    config: Config, zero: Zero, student: ModelShape, teacher: ModelShape | None, lengths: Lengths, ranks: int
) -> LearnerMemory:
    """All of one rank, at lengths that it must survive. `teacher`: None where nothing asks one."""
    d = SIZES[config.student.dtype]
    with_gradient = trained(config, student)
    weights = [w.numel for w in student.weights] + adapters(config, student)
    out = states(zero, weights, with_gradient, d, ranks)
    live = gathered(zero, weights, d, ranks)
    n = config.rollout.n if config.rollout.student_writes else 1
    prompts = -(-config.train.prompts_per_step // ranks)
    vocab, largest = student.decoder.vocab, max(with_gradient) * d
    local = teacher if any(t.about.weights for t in config.teacher.each.values()) else None
    gather = {}
    if local and any(t.shard and t.about.weights == "own" for t in config.teacher.each.values()):
        shared = gathered(replace(zero, stage=3), [w.numel for w in local.weights], SIZES[config.teacher.dtype], ranks)
        gather = {"teacher's gathered parameters": shared}
    for name, (size, cut) in frozen(config, student, teacher).items():
        where = out.host if cut and zero.offload_param else out.device
        where[name] = -(-size // ranks) if cut else size
    hears, tower_trained = config.objective.lambda_ < 1, "tower" in config.student.train
    if hears and not tower_trained:
        out.device["encoded clips"] = prompts * student.audio_tokens(lengths.audio) * student.decoder.hidden * d
        tower = tower_bytes(student, d, lengths.audio, needs.CLIPS_PER_CALL, kept=False)
        out.phases["tower"] = {"tower's activations": tower}

    def passes(prompt: int, clips_per_row: int) -> dict[str, Bytes]:
        mb = micro_batch(prompt, lengths.response, n, config.train.micro_batch_tokens)
        kept, adds = activations(student, config, mb)
        always = {"activations kept": kept}
        if live:
            always["gathered parameters"] = live
        if zero.stage in (1, 2):
            always["gradient bucket"] = zero.bucket * d
        if tower_trained and clips_per_row:
            clips = mb.rows * clips_per_row
            always["tower's activations"] = tower_bytes(student, d, lengths.audio, clips, kept=True)
        loss = always | loss_bytes(student, config, mb)
        found = {"loss": loss, "backward": always | {"largest gradient": largest, "a layer's backward": adds}}
        if local and config.objective.reads == "logits":
            loss["teacher's, of the micro-batch"], reads = read_bytes(local, vocab, config, lengths, mb)
            found["teacher reads"] = reads | gather
        return found

    views = [passes(lengths.speech, 1)] if hears else []
    views += [passes(lengths.text, 0)] if config.objective.lambda_ > 0 else []
    for phase in views[0]:
        out.phases[phase] = max((v[phase] for v in views), key=lambda b: sum(b.values()))
    if local and config.objective.reads == "scores":
        scores = teacher_bytes(local, vocab, config, lengths, prompts * n * len(views))
        out.phases["teacher scores"] = scores | gather
    if local and config.rollout.teacher_writes and not asks_teacher_servers(config):
        written = kv_token_bytes(local.decoder, SIZES[config.teacher.dtype]) * config.teacher.batch_tokens
        out.phases["teacher responds"] = {"keys and values": written} | gather
    return out
