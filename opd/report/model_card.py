"""The model card of an exported checkpoint: what it is, how it was made, how it was measured. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.config.objective import OBJECTIVES, Objective
from opd.config.teacher import TEACHER_KINDS
from opd.report.runs import Run, section, student_of
from opd.storage import run_folder as saved

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TASK = "audio-text-to-text"
NOT_RECORDED = "not recorded"
# What eval.jsonl measures of a student: its name in words, its unit, and its type as the Hub lists it.
METRICS = {
    "accuracy/speech": ("accuracy, spoken questions", "share", "accuracy"),
    "accuracy/text": ("accuracy, typed questions", "share", "accuracy"),
    "retention": ("accuracy on a skill that was not trained", "share", "accuracy"),
    "drop/speech": ("drop below the teacher, spoken questions", "%", "relative_drop"),
    "drop/text": ("drop below the teacher, typed questions", "%", "relative_drop"),
    "misalignment": ("misalignment M = KL(student, text view ‖ student, speech view)", "nats/token", "kl_divergence"),
    "forgetting": ("forgetting F = KL(teacher ‖ student, text view)", "nats/token", "kl_divergence"),
    "reverse_kl/speech": ("reverse KL to the teacher, own spoken samples", "nats/token", "kl_divergence"),
    "reverse_kl/text": ("reverse KL to the teacher, own typed samples", "nats/token", "kl_divergence"),
    "length/speech": ("length of an answer, spoken questions", "tokens", "response_length"),
    "length/text": ("length of an answer, typed questions", "tokens", "response_length"),
}


@dataclass
class Exported:
    """What a card is about."""

    runs: list[Run]  # the last one's checkpoint; those that it came from before it
    step: int
    adapter: bool
    model_class: str
    parameters: int


@dataclass
class Parent:
    """A model that this one was made from, as far as its own card or config is here."""

    name: str
    hub: str | None = None
    license: str | None = None
    more: dict[str, Any] = field(default_factory=dict)  # license_name, license_link
    language: Any = None

    @property
    def licence(self) -> str:
        """Its licence in words."""
        if self.license is None:
            return f"unknown, see {f'https://huggingface.co/{self.hub}' if self.hub else f'where {self.name} is from'}"
        return " ".join([self.license, *map(str, self.more.values())])


def model_card(about: Exported) -> ModelCard:
    """The card, README.md of the folder: YAML front matter as the Hub reads it, then prose."""
    from huggingface_hub import ModelCard, ModelCardData

    run, base = about.runs[-1], base_of(about.runs)
    # the evaluation of these very weights, the whole one before one in training
    measured = next((e for e in (*reversed(run.evaluations), *run.interim) if e["step"] == about.step), None)
    folder, stage = run.folder.resolve().name, _get(run, "run", "stage", "")
    name = f"{folder}-{stage}" if stage and stage not in folder else folder
    best = saved.best_of(run.folder)
    manifests = [str(_get(r, "data", "train", "")) for r in about.runs]
    objectives = sorted({str(_get(r, "objective", "name", "xopd")) for r in about.runs})
    data_sets = {re.sub(r"^hub:([^/:]*(/[^/:]*)?).*", r"\1", m) for m in manifests if m.startswith("hub:")}
    data = ModelCardData(
        base_model=base.hub,
        base_model_relation=("adapter" if about.adapter else "finetune") if base.hub else None,
        datasets=sorted(data_sets) or None,
        language=base.language,
        license=base.license or "unknown",
        library_name="peft" if about.adapter else "transformers",
        pipeline_tag=TASK,
        tags=["opd", "on-policy-distillation", "speech", *objectives],
        model_name=name,
        eval_results=_results(run, measured) or None,
        **base.more,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        about=about,
        run=run,
        base=base,
        teachers=_teachers(about.runs),
        stages=[_stage(about, r) for r in about.runs],
        measured=measured,
        metrics=_metrics(about, measured) if measured else [],
        manifests={k: label(str(_get(run, "eval", k, "none"))) for k in ("test", "retention")},
        best=best if best is not None and best["step"] == about.step else None,
    )


def label(path: str) -> str:
    """A path as others may read it: of an absolute one its last name."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", "~")) else path


def hub_id(path: str, at: Path | None = None) -> str | None:
    """A model's id on the Hub, if `path` is one and no folder (at `at`, where it is relative)."""
    here = path.startswith(("runs/", "recipes/", "data/")) or any(p.exists() for p in (Path(path), at) if p)
    return path if HUB_ID.fullmatch(path) and not here else None


def base_of(runs: list[Run]) -> Parent:
    """The model that the first run's student is."""
    return _parent(saved.split(str(_get(runs[0], "student", "path", "")))[0].as_posix(), student_of(runs[0]))


def _teachers(runs: list[Run]) -> list[Parent]:
    found: dict[str, Parent] = {}
    for run in runs:
        teacher = run.config.get("teacher") or {}
        for one in (teacher.get("routes") or {"": teacher}).values():
            if path := str(one.get("path") or ""):
                found.setdefault(path, _parent(path, Path(path)))
            elif (kind := TEACHER_KINDS.get(str(one.get("kind")))) and kind.weights == "student":
                found.setdefault("self", Parent("the student itself before training", license="its own"))
    return list(found.values())


def _parent(path: str, here: Path) -> Parent:
    """What a local folder's card, or a downloaded one, says of a model."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    hub = hub_id(path, here)
    found = Parent(label(path), hub)
    cached = try_to_load_from_cache(hub, "README.md") if hub else None
    readme = Path(cached) if isinstance(cached, str) else here / "README.md"
    if not readme.is_file():
        return found
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # front matter that is no YAML, or none
        return found
    found.license = data.get("license") if isinstance(data.get("license"), str) else None
    found.more = {k: str(data[k]) for k in ("license_name", "license_link") if data.get(k)}
    found.language = data.get("language")
    return found


def _results(run: Run, e: dict[str, Any] | None) -> list[EvalResult]:
    """The metrics for the front matter: `args` has standard error and records."""
    from huggingface_hub import EvalResult

    found = []
    for key, (words, unit, kind) in METRICS.items():
        estimate = (e or {}).get(key)
        if not estimate or estimate["mean"] is None:
            continue
        data = label(str(_get(run, "eval", "retention" if key == "retention" else "test", NOT_RECORDED)))
        hub = data.removeprefix("hub:")  # a data set's type, by which the Hub groups results
        slug = re.sub(r"[^\w.-]+", "-", data) if hub == data else hub.partition(":")[0]
        args = {"unit": unit} | {k: estimate[k] for k in ("stderr", "n") if estimate.get(k) is not None}
        found.append(EvalResult(TASK, slug, data, kind, estimate["mean"], metric_name=words, metric_args=args))
    return found


def _get(run: Run, name: str, key: str, default: Any) -> Any:
    value = section(run.config, name).get(key)
    return default if value is None else value


def _stage(about: Exported, run: Run) -> dict[str, str]:
    """How a run trained: its name, method, paper, data, and settings in one line."""
    name = str(_get(run, "objective", "name", NOT_RECORDED))
    objective = OBJECTIVES.get(name, Objective(name))
    lora = _get(run, "student", "lora", None)
    sampled = _get(run, "rollout", "source", "") in ("student", "mix")
    facts = {
        "teacher": ", ".join(t.name for t in _teachers([run])),
        "weight of the text view λ": _get(run, "objective", "lambda", None),
        "responses from": _get(run, "rollout", "source", None),
        "steps": about.step if run is about.runs[-1] else run.done,
        "prompts a step": _get(run, "train", "prompts_per_step", None),
        "responses per prompt and view": _get(run, "rollout", "n", None) if sampled else None,
        "learning rate": _get(run, "optim", "lr", None),
        "trained parts": ", ".join(_get(run, "student", "train", [])),
        "LoRA": f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}" if lora else None,
        "precision": _get(run, "student", "dtype", None),
        "seed": _get(run, "run", "seed", None),
    }
    return {
        "name": _get(run, "run", "stage", run.name),
        "method": objective.method,
        "paper": objective.paper,
        "data": label(str(_get(run, "data", "train", NOT_RECORDED))),
        "facts": "; ".join(f"{k} {v}" for k, v in facts.items() if v not in (None, "")),
    }


def _metrics(about: Exported, e: dict[str, Any]) -> list[list[str]]:
    """A table's rows, the first its heads: what an evaluation found, beside the first on the same records, if any."""
    run = about.runs[-1]
    same = [(r, b) for r in about.runs for b in r.evaluations if r.records == run.records]
    where, before = next(((r, b) for r, b in same if (r, b["step"]) != (run, about.step)), (run, {}))
    before = {} if e.get("interim") else before
    of = f" of {where.name}" if where is not run else ""
    earlier = [f"before: {before['stage']}{of}"] if before else []
    rows = [["metric", "unit", *earlier, f"step {about.step}", "records"]]
    teacher = {"accuracy/teacher": ("accuracy of the teacher, typed questions", "share", "accuracy")}
    for key, (words, unit, _) in (METRICS | teacher).items():
        if (found := e.get(key)) and found["mean"] is not None:
            earlier = [_number(None if key in teacher else before.get(key))] if before else []
            rows.append([words, unit, *earlier, _number(found), str(found.get("n") or "")])
    return rows


def _number(e: dict[str, Any] | None) -> str:
    if not e or e.get("mean") is None:
        return "–"
    return f"{e['mean']:.4g}" + (f" ± {e['stderr']:.2g}" if e.get("stderr") is not None else "")
