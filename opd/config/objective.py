"""What each objective is: one record of each, from which all else is read. Imports no torch.

A new objective is a record here, a function of the same name in opd/objectives/losses.py, a line in docs/objectives.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from opd.config.teacher import WITH_LOGITS, TeacherConfig
from opd.settings import Section


@dataclass(frozen=True)
class Objective:
    """What is known of an objective without its loss. docs/objectives.md has the formulas."""

    method: str  # in words, for a model card
    paper: str = ""  # where that is from
    settings: tuple[str, ...] = ()  # of `objective`, that not every objective reads
    sources: tuple[str, ...] = ("student",)  # rollout.source: where its responses may come from
    reads: Literal["logits", "scores", "nothing"] = "logits"  # of the teacher: its full vocabulary, or what it samples
    weight: str = ""  # setting that weighs these logits: at 0 it reads nothing of the teacher
    top_of: Literal["student", "teacher"] | None = None  # with objective.top_k: whose best ids, by scores instead
    other_tokenizer: bool = False  # its teacher, one local model, has another one; it needs whole responses, no chunks
    previews: bool = False  # it sees all tokens of a response before it weighs the first
    needs: dict[str, str] = field(default_factory=dict)  # one of them -> another, without which it is not read
    # For opd/plan/learner_memory.py, which a test holds to the real ones:
    tensors: int = 8  # [n, V] of a chunk alive at once, where it reads the teacher's logits
    mixture: int = 0  # and these, where objective.beta is neither 0 nor 1
    tempered: int = 0  # and these, at another rollout.temperature than 1


X_OPD, WARM_START, GKD = "arXiv 2603.24596", "arXiv 2509.14930", "arXiv 2306.13649"
ANY_SOURCE = ("student", "teacher", "dataset", "mix")
OBJECTIVES: dict[str, Objective] = {
    "sft": Objective("cross-entropy on given responses", sources=("dataset",), reads="nothing"),
    "kd": Objective(
        "cross-entropy and forward KL on the teacher's responses, in both views",
        WARM_START,
        ("mu", "tau"),
        sources=("teacher", "dataset"),
        weight="mu",
        needs={"tau": "mu"},
        tensors=9,
    ),
    "xopd": Objective(
        "cross-modal on-policy distillation, X-OPD",
        X_OPD,
        ("advantage_clip", "ratio_max", "ratio_above"),
        reads="scores",
        tempered=1,
    ),
    "reverse_kl": Objective(
        "reverse KL on the student's own responses, the dense form of X-OPD", X_OPD, ("top_k",), top_of="student"
    ),
    "forward_kl": Objective("forward KL to the teacher", GKD, ("top_k",), sources=ANY_SOURCE, top_of="teacher"),
    "jsd": Objective(
        "generalised Jensen-Shannon divergence to the teacher, GKD",
        GKD,
        ("beta", "top_k"),
        sources=ANY_SOURCE,
        top_of="teacher",
        mixture=4,
    ),
    "entropy_aware": Objective(
        "reverse KL, and forward KL where the teacher is unsure", "arXiv 2603.07079", ("entropy_threshold",), tensors=10
    ),
    "cord": Objective(
        "reverse KL with weights on important and early tokens, CORD",
        "arXiv 2601.16547",
        ("cord_share", "cord_importance", "cord_decay"),
        previews=True,
    ),
    "salad": Objective(
        "forward KL and cross-entropy on given responses, SALAD",
        "arXiv 2510.13632",
        ("alpha",),
        sources=("dataset",),
        weight="alpha",
    ),
    "uld": Objective(
        "universal logit distillation from a teacher with another tokenizer",
        "arXiv 2402.12030",
        ("hybrid", "beta"),
        sources=ANY_SOURCE,
        other_tokenizer=True,
        needs={"beta": "hybrid"},
        tensors=14,
    ),
}


class ObjectiveConfig(Section):
    """The loss (opd/objectives/losses.py) and its settings."""

    name: Literal[tuple(OBJECTIVES)] = "xopd"  # type: ignore[valid-type]
    lambda_: float = Field(0.5, ge=0, le=1, alias="lambda", description="weight of the text view; 1 - lambda: speech")
    average: Literal["response", "token"] = Field("response", description="per-response mean, or one mean over tokens")
    reference: float = Field(0.0, ge=0, description="on-policy: weight of KL(student || student at the start)")
    advantage_clip: PositiveFloat | None = Field(None, description="xopd: A is clipped to +- this")
    ratio_max: PositiveFloat = Field(2.0, description="xopd: largest importance ratio")
    ratio_above: Literal["truncate", "mask"] = Field("truncate", description="xopd: a larger ratio becomes it, or 0")
    mu: float = Field(0.5, ge=0, description="kd: weight of the KL term")
    tau: PositiveFloat = Field(2.0, description="kd: temperature of the KL term")
    beta: float = Field(0.5, ge=0, le=1, description="jsd: 0 would be forward KL, 1 reverse KL")
    hybrid: bool = Field(False, description="uld: tokens that both tokenizers have are compared directly (TRL's GOLD)")
    top_k: PositiveInt | None = Field(
        None, description="reverse_kl: the student's best ids and a bucket; forward_kl, jsd: the teacher's; none: all"
    )
    entropy_threshold: float = Field(0.8, ge=0, description="entropy_aware: nats above which forward KL is added")
    cord_share: float = Field(0.2, gt=0, le=1, description="cord: share of a response's tokens that are important")
    cord_importance: float = Field(2.0, ge=1, description="cord: their weight; the others' is 1")
    cord_decay: float = Field(0.99, gt=0, le=1, description="cord: weight of a token relative to the one before it")
    alpha: float = Field(0.5, ge=0, le=1, description="salad: weight of forward KL; 1 - alpha: of the response's NLL")

    @property
    def about(self) -> Objective:
        """The objective's record."""
        return OBJECTIVES[self.name]

    @property
    def top_of(self) -> Literal["student", "teacher"] | None:
        """Whose best objective.top_k ids it reads, if any."""
        return None if self.top_k is None else self.about.top_of

    @property
    def reads(self) -> Literal["logits", "scores", "nothing"]:
        """What it reads of the teacher under these settings: full-vocabulary logits, which only a local one has."""
        weight = self.about.weight
        if weight and getattr(self, weight) == 0:
            return "nothing"
        return "scores" if self.top_of else self.about.reads

    def idle(self) -> dict[str, str]:
        """Settings that it does not read -> what does not read them, in words."""
        found = {k: self.name for o in OBJECTIVES.values() for k in o.settings if k not in self.about.settings}
        for setting, needed in self.about.needs.items():
            if not getattr(self, needed):
                off = f"without objective.{needed}" if getattr(self, needed) is False else f"with objective.{needed} 0"
                found[setting] = f"{self.name} {off}"
        return found

    def check(self, source: str, teacher: TeacherConfig) -> None:
        """Raises ValueError when it does not go together with rollout.source, teacher.kind or itself."""
        about = self.about
        if source not in about.sources:
            wanted = " or ".join(about.sources)
            raise ValueError(f"objective.name {self.name} needs rollout.source {wanted}, found {source}")
        if self.reads == "logits" and not teacher.about.gives_logits:
            remedy = f" unless objective.{about.weight} is 0" if about.weight else ""
            remedy = " unless objective.top_k is set" if about.top_of else remedy
            kinds = "local" if about.other_tokenizer else WITH_LOGITS
            reads = f"objective.name {self.name} reads full-vocabulary logits{remedy}"
            raise ValueError(f"{reads}: teacher.kind must be {kinds}, found {teacher.kind}")
        if self.top_k is not None and self.top_of is None:
            *some, last = [name for name, o in OBJECTIVES.items() if o.top_of]
            raise ValueError(f"objective.top_k is of {', '.join(some)} and {last}, found objective.name {self.name}")
        if self.top_of == "teacher" and "beta" in about.settings and self.beta == 1.0:
            raise ValueError("objective.beta 1 with top_k is infinite: the teacher has no mass on other ids")
