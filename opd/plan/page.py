"""`opd plan`: tables of a plan, or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from opd.config.needs import copies_start
from opd.plan.estimate import Machine, Plan, Use, alternatives, at, estimate, gib, load, recommended, where
from opd.plan.learner_memory import Bytes
from opd.plan.server_memory import CONTEXT, GRAPHS, ServerMemory
from opd.plan.shapes import ModelShape
from opd.settings import UserError, shipped

PARTS = ("tower", "adapter", "llm", "fixed")  # of a model
FOLDER = Path(shipped("recipes/placements"))
BUDGETS = (8192, 4096, 2048, 1024, 512)  # of tokens, tried as a remedy
SHARES = (0.4, 0.6, 0.8)  # of a device that a server shares with the learner


def main(recipe: str, overrides: list[str], machine: Machine, as_json: bool) -> int:
    """Print the plan of a recipe; 0 when its placement fits, 1 when it does not."""
    config = load(recipe, overrides)
    plan = estimate(config, machine)
    folder, p = Path(config.launch.placement).parent if config.launch.placement else FOLDER, plan.placement
    gpus, nodes = p.devices_per_node if machine.gpus is None else machine.gpus, machine.nodes or p.nodes
    at_most = replace(machine, gpus=gpus, nodes=nodes)  # no more GPUs than the recipe's placement has
    others = alternatives(recipe, overrides, at_most, folder) if plan.uses or machine.gpus else {}
    best = recommended(others)
    cure = remedy(recipe, overrides, plan) if not plan.fits else None
    found = plan, others, best, cure
    print(json.dumps(to_json(*found), indent=2) if as_json else "\n".join(page(*found)))
    return 0 if plan.fits else 1


def page(plan: Plan, others: dict[str, Plan | str], best: str | None, cure: list[str] | None) -> list[str]:
    """All tables as lines."""
    c = plan.config
    name = c.launch.placement or "no placement: all on this machine's CPU"
    lines = [f"placement  {name}", f"student    {_model(plan.student)}"]
    lines += [f"teacher    {_model(plan.teacher) if plan.teacher else 'none: nothing in this run asks one'}"]
    for word, n in (("longest", plan.longest), ("typical", plan.typical)):
        views = f"{n.speech} tokens in the speech view ({n.audio:g} s), {n.text} in the text view"
        lines += [f"{word}    {views}, {n.response} of a response"]
    lines += ["", *_learner(plan)]
    for server, groups in plan.servers.items():
        lines += ["", *_server(plan, server, at(groups))]
    lines += ["", *_places(plan), "", *_push(plan), "", *_time(plan), "", *_verdict(plan, cure)]
    return lines + _alternatives(plan, others, best)


def _model(shape: ModelShape) -> str:
    counts = {part: shape.count(part) for part in PARTS}
    parts = ", ".join(f"{part} {_billions(n)}" for part, n in counts.items() if n)
    active = f", {_billions(shape.active)} at work per token" if shape.decoder.experts > 1 else ""
    return f"{shape.path}: {_billions(shape.count())} parameters ({parts}{active}); from {shape.source}"


def _billions(n: float) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e8 else f"{n / 1e6:.2f}M"


def _table(title: str, rows: Bytes, total: str = "") -> list[str]:
    lines = [title] + [f"  {name:40}{gib(size):>12}" for name, size in rows.items()]
    return [*lines, f"  {total:40}{gib(sum(rows.values())):>12}"] if total else lines


def _learner(plan: Plan) -> list[str]:
    c, m = plan.config, plan.learner
    zero = f"ZeRO stage {plan.zero.stage} over {plan.placement.ranks}"
    off = [w for w, on in (("optimizer", plan.zero.offload_optimizer), ("parameters", plan.zero.offload_param)) if on]
    about = [zero, c.student.dtype, f"{c.train.micro_batch_tokens} tokens a micro-batch"]
    about += [f"{' and '.join(off)} offloaded"] if off else []
    about += [f"LoRA of rank {c.student.lora.r}"] if c.student.lora else [f"trains {', '.join(c.student.train)}"]
    about += ["gradient checkpointing"] if c.train.gradient_checkpointing else ["no gradient checkpointing"]
    lines = _table(f"Learner rank: {', '.join(about)}", m.device, "always there")
    for phase, rows in m.phases.items():
        lines += _table(f"  {phase}", {f"  {k}": v for k, v in rows.items()})
    lines += [f"  {'peak (' + m.worst + ')':40}{gib(m.peak):>12}"]
    if c.student.lora and plan.student.decoder.experts > 1:
        lines += ["  LoRA adapts attention alone here: experts fused into one tensor are no linear layers"]
    return lines + (_table("  on the host", {f"  {k}": v for k, v in m.host.items()}) if m.host else [])


def _server(plan: Plan, s: ServerMemory, devices: str) -> list[str]:
    rows = {"share of the GPU": s.share, "weights": s.weights, "a forward pass, context, graphs": s.forward_pass}
    rows["left for keys and values"] = s.kv
    if s.beyond:
        rows["beyond its share: log-probs of prompts"] = s.beyond
    typical = max(plan.typical.speech if s.kind == "student" else 0, plan.typical.text) + plan.typical.response
    lines = _table(f"{s.kind.capitalize()} server, each of {s.tensor_parallel} GPUs: {devices}", rows)
    most = s.max_model_len
    counts = f"{s.sequences(most)} sequences of {most} tokens, {s.sequences(typical)} of {typical}"
    return [*lines, f"  {s.kv_per_token} bytes of keys and values a token; at a time {counts}"]


def _places(plan: Plan) -> list[str]:
    groups: dict[str, list[Use]] = {}
    for use in [*plan.uses, *plan.hosts]:
        for moment, rows in use.moments.items():
            of = f" of {gib(use.capacity)}" if use.capacity is not None else " (not judged: --host-memory)"
            what = ", ".join(f"{k} {gib(v)}" for k, v in rows.items())
            groups.setdefault(f"{moment}: {gib(sum(rows.values()))}{of}: {what}", []).append(use)
    return ["Devices", *(f"  {where(uses)}: {said}" for said, uses in groups.items())]


def _push(plan: Plan) -> list[str]:
    if not plan.push:
        return ["Weight push: none"]
    transport = plan.config.rollout.transport or "file"
    speed = f"{plan.push_s:.1f} s at {plan.machine.speeds.links[transport]:g} GB/s"
    return [f"Weight push: {gib(plan.push)} by {transport}, {speed} (the wire alone, without gathering and loading)"]


def _time(plan: Plan) -> list[str]:
    t, s, steps = plan.time, plan.machine.speeds, plan.config.train.steps
    if t is None:
        return ["Time: not estimated on a CPU"]
    return [
        f"Time, a rough estimate: {t.step:.0f} s a step, {_span(t.step * steps)} for {steps} steps",
        f"  rollout {t.rollout:.0f} s ({t.at_once} sequences at a time), teacher {t.teacher:.0f} s, "
        f"learner {t.learner:.0f} s, sync {t.sync:.0f} s",
        f"  assumed: {s.tflops:g} TFLOPS, of which {s.dense:.0%} are reached ({s.mixture:.0%} by a mixture), "
        f"{s.hbm:g} GB/s of memory, of which decoding reaches {s.read:.0%}; the typical lengths above",
        "  left out: loading, evaluation, checkpoints, communication of ZeRO, waiting for the longest response",
    ]


def _span(seconds: float) -> str:
    unit, of = next(((u, n) for u, n in (("h", 3600), ("min", 60)) if seconds >= n), ("s", 1))
    return f"{seconds / of:.{1 if unit == 'h' else 0}f} {unit}"


def _verdict(plan: Plan, cure: list[str] | None) -> list[str]:
    if plan.fits:
        free = [(u.capacity - u.needs, u) for u in [*plan.uses, *plan.hosts] if u.capacity is not None]
        least, use = min(free, key=lambda pair: pair[0])
        return [f"It fits: {where([use])} has the least to spare, {gib(least)}"]
    tried = "smaller token budgets, offload, a sharded teacher, LoRA, other shares of a shared device"
    word = f"it would with: {' '.join(cure)}" if cure else f"tried, and not enough: {tried}"
    return ["It does not fit:", *(f"  {s}" for s in plan.shortfalls), f"  {word}"]


def _alternatives(plan: Plan, others: dict[str, Plan | str], best: str | None) -> list[str]:
    if not others:
        return []
    said, chosen = "none of the placements fits", others[best] if best else None
    if isinstance(chosen, Plan) and chosen.time:
        said = f"{best}, the shortest step of those that fit ({chosen.time.step:.0f} s, {len(chosen.uses)} GPUs)"
    lines = ["", f"Recommended: {said}"]
    for path, other in others.items():
        if isinstance(other, str):
            said = other
        elif other.fits:
            said = f"fits, {other.time.step:.0f} s a step on {len(other.uses)} GPUs" if other.time else "fits, on a CPU"
        else:
            said = "does not fit: " + "; ".join(other.shortfalls)
        lines.append(f"  {path}: {said}")
    return lines


def to_json(plan: Plan, others: dict[str, Plan | str], best: str | None, cure: list[str] | None) -> dict[str, Any]:
    """The same as plain data; sizes in bytes, times in seconds."""
    roles = {"student": plan.student} | ({"teacher": plan.teacher} if plan.teacher else {})
    servers = []
    for s, groups in plan.servers.items():
        devices = [[g.node, d] for g in groups for d in g.devices]
        servers.append(asdict(s) | {"devices": devices, "kv": s.kv, "sequences": s.sequences(s.max_model_len)})
    t = plan.time
    seconds = asdict(t) | {"step": t.step, "run": t.step * plan.config.train.steps} if t else {}
    seconds.pop("at_once", None)
    return {
        "placement": plan.config.launch.placement,
        "fits": plan.fits,
        "shortfalls": plan.shortfalls,
        "remedy": cure,
        "models": {
            role: {"path": s.path, "source": s.source, "parameters": {p: s.count(p) for p in PARTS}}
            for role, s in roles.items()
        },
        "learner": asdict(plan.learner) | {"peak": plan.learner.peak},
        "servers": servers,
        "devices": [asdict(use) for use in [*plan.uses, *plan.hosts]],
        "push": {"bytes": plan.push, "seconds": plan.push_s},
        "seconds": seconds or None,
        "recommended": best,
        "alternatives": {
            path: {"fits": False, "shortfalls": [o]} if isinstance(o, str)
            else {"fits": o.fits, "shortfalls": o.shortfalls, "step": o.time.step if o.time else None}
            for path, o in others.items()
        },
        "assumed": {"context": CONTEXT, "graphs": GRAPHS, "speeds": asdict(plan.machine.speeds)},
    }  # fmt: skip


def remedy(recipe: str, overrides: list[str], plan: Plan) -> list[str] | None:
    """Overrides under which a plan that does not fit would, those that cost least first; None: none was found.

    Tried: offload, a sharded teacher, LoRA and their combinations, each with smaller token budgets and, where server
    and learner share a device, other shares of it.
    """
    c = plan.config
    offload = Path(c.train.deepspeed).with_name("zero3_offload.json")
    choices = [f"train.deepspeed={offload}"] if offload.is_file() else []
    local = (plan.teacher is not None and c.teacher.about.weights == "own") or copies_start(c)
    choices += ["teacher.shard=true"] if local and not c.teacher.shard else []
    choices += ["student.lora={}"] if c.student.lora is None and "llm" in c.student.train else []
    budgets = {"train.micro_batch_tokens": c.train.micro_batch_tokens}
    if c.teacher.about.weights:
        budgets["teacher.batch_tokens"] = c.teacher.batch_tokens
    largest = max(c.train.micro_batch_tokens, c.teacher.batch_tokens)
    shares = [[f"rollout.server.gpu_memory_utilization={s}"] for s in SHARES if plan.placement.shared]
    for step in (list(some) for n in range(len(choices) + 1) for some in combinations(choices, n)):
        for budget, share in product((largest, *(b for b in BUDGETS if b < largest)), [[], *shares]):
            tried = [*step, *(f"{key}={budget}" for key, now in budgets.items() if budget < now), *share]
            try:
                if tried and estimate(load(recipe, [*overrides, *tried]), plan.machine).fits:
                    return tried
            except UserError:
                continue
    return None
