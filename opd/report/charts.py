"""The charts of a report."""

from __future__ import annotations

from typing import Any

from opd.report.blocks import BLUE, COLOURS, GREEN, GREY, INK, ORANGE, PINK, Figure, figure
from opd.report.runs import PHASES, Pipeline, Run, phases
from opd.types import VIEWS

BARS = {"speech": BLUE, "text": ORANGE, "teacher": GREY, "retention": GREEN}
PHASE_COLOURS = dict(zip(PHASES, (BLUE, ORANGE, GREEN, PINK, GREY), strict=True))
POINTS = 1000  # of a curve at most: longer ones show means of consecutive steps

# what a chart shows: of each panel its metrics, the label of its axis and the least span of that, so that noise around
# a constant looks like one
KL = [("reverse_kl/speech reverse_kl/text", "nats per token", 0.01)]
RATIO = [("ratio/mean", "importance ratio, mean", 0.02), ("ratio/clipped", "importance ratio, share clipped", 0.02)]
LENGTH = [("length/mean", "tokens", 1.0), ("length/truncated", "share truncated", 0.02)]
LOSS = [("loss", "loss", 0.01), ("grad_norm", "gradient norm", 0.01)]
MISMATCH = [("mismatch/logprob", "nats per token", 1e-6), ("entropy", "entropy, nats per token", 0.01)]
CURVES = {
    "Reverse KL on the student's own samples, by view (text dashed).": KL,
    "Importance ratio of learner to sampler, and the share of tokens where it is cut off.": RATIO,
    "Responses: mean length, and the share that never ended.": LENGTH,
    "Loss, which each objective defines for itself, and the norm of the gradient.": LOSS,
    "Mean |learner - sampler| log-prob of the sampled tokens, and the student's entropy.": MISMATCH,
}


def accuracy(pipelines: list[Pipeline]) -> Figure:
    """Bars with standard errors by stage, a group of bars for each pipeline."""
    shown = [p for p in pipelines if p.stages]
    places, ticks, x = [], [], 0.0
    for p in shown:
        for s in p.stages:
            places.append((x, s))
            ticks.append(s["name"] if s is not p.stages[-1] or len(shown) == 1 else f"{s['name']}\n{p.name}")
            x += 1
        x += 0.6

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(True, axis="y")
        for k, (name, colour) in enumerate(BARS.items()):
            values = [(at, s["retention"] if name == "retention" else s["accuracy"][name]) for at, s in places]
            known = [(at + (k - 1.5) * 0.2, e) for at, e in values if e and e["mean"] is not None]
            if known:
                xs, heights, errors = zip(*((at, e["mean"], e["stderr"]) for at, e in known), strict=True)
                yerr = [float("nan") if error is None else error for error in errors]
                axes.bar(xs, heights, 0.2, yerr=yerr, ecolor=INK, color=colour, label=name)
        axes.set_xticks([at for at, _ in places], ticks)
        axes.set(ylim=(0, 1.05), ylabel="accuracy")

    caption = "Accuracy by stage, with standard errors" + ("; pipelines side by side." if len(shown) > 1 else ".")
    return figure(caption, draw, (max(8.0, 1.1 * x), 3.2))


def curves(pipelines: list[Pipeline], caption: str) -> Figure:
    """Metrics of CURVES against the steps of a pipeline: a colour per pipeline, or per run or view of a single one.

    A run that several pipelines begin with is drawn once, in grey; other runs before a pipeline's last are paler.
    """
    panels = CURVES[caption]
    pale = {r.name for p in pipelines for r in p.runs[:-1]} if len(pipelines) > 1 else set()

    def draw(figure: Any) -> None:
        for ax, (names, label, least) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            ax.grid(True, axis="y")
            ax.set(xlabel="step of the pipeline", ylabel=label)
            for run, start, colour in _placed(pipelines):
                for name in names.split():
                    style: dict[str, Any] = {"color": colour, "linestyle": "--" if name.endswith("/text") else "-"}
                    style["alpha"] = 0.55 if run.name in pale else 1.0
                    view = name.rpartition("/")[2]
                    if view in VIEWS and len(pipelines) == 1:
                        style["color"] = BARS[view]
                    points = [(start + m["step"], m[name]) for m in run.steps if m.get(name) is not None]
                    if points := _thinned(points):
                        shown = f"{view}, {run.name}" if view in VIEWS else run.name
                        shown = " " * shown.startswith("_") + shown  # matplotlib's legends leave out _ labels
                        style["marker"] = "o" if len(points) == 1 else None
                        ax.plot(*zip(*points, strict=True), **style, linewidth=1.4, label=shown)
            _widen(ax, least)

    if any(len(r.steps) > POINTS for p in pipelines for r in p.runs):
        caption += f" Means of consecutive steps, at most {POINTS} points a curve."
    return figure(caption, draw, (8.0, 3.2))


def _widen(axes: Any, least: float) -> None:
    low, high = axes.dataLim.ymin, axes.dataLim.ymax
    if high - low < least:
        start = (low + high - least) / 2
        if low >= 0:  # a share or a distance is never below 0
            start = max(start, -least / 20)
        axes.set_ylim(start, start + least)


def times(runs: list[Run]) -> Figure:
    """Seconds of a mean step by phase, a bar for each run."""
    found = [(r, seconds) for r in runs if (seconds := phases(r))["step"]["n"]]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        left = [0.0] * len(found)
        for phase in PHASES if found else ():
            values = [float(seconds[phase]["mean"] or 0.0) for _, seconds in found]
            axes.barh(range(len(found)), values, 0.6, left=left, color=PHASE_COLOURS[phase], label=phase)
            left = list(map(sum, zip(left, values, strict=True)))
        axes.set_yticks(range(len(found)), [r.name for r, _ in found])
        axes.invert_yaxis()
        axes.set_xlabel("seconds per step")

    caption = "Where a step's time goes: mean seconds by phase, a run's first step left out when there are more."
    return figure(caption, draw, (8.0, 1.4 + 0.4 * len(found)))


def _placed(pipelines: list[Pipeline]) -> list[tuple[Run, int, str]]:
    """Every run once: the steps that its pipeline took before it, and its colour."""
    placed: dict[str, tuple[Run, int, str]] = {}
    for k, p in enumerate(pipelines):
        start = 0
        for run in p.runs:
            own = p.runs.index(run) if len(pipelines) == 1 else k
            colour = GREY if run.name in placed else COLOURS[own % len(COLOURS)]
            placed[run.name] = run, start, colour
            start += run.done
    return list(placed.values())


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
