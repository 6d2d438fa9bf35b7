"""What each objective is: its name, its sources, the settings that it reads, its paper. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from opd.settings import Section


class ObjectiveConfig(Section):
    """The loss (opd/objectives/losses.py) and its settings."""

    name: Literal["sft", "kd", "xopd", "reverse_kl", "forward_kl", "jsd", "entropy_aware", "cord", "salad", "uld"] = (
        "xopd"
    )
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
    def divergence_beta(self) -> float:
        """beta of the generalised JSD that forward_kl and jsd compute."""
        return 0.0 if self.name == "forward_kl" else self.beta

    @property
    def reads_logits(self) -> bool:
        """Whether it reads the teacher's full-vocabulary logits, which only a local teacher has."""
        if self.name in ("reverse_kl", "forward_kl", "jsd"):
            return self.top_k is None
        weight = {"kd": self.mu, "salad": self.alpha, "sft": 0.0, "xopd": 0.0}
        return weight.get(self.name, 1.0) > 0

    @property
    def asks_teacher(self) -> bool:
        """Whether it reads anything of the teacher's."""
        return self.reads_logits or self.name in ("xopd", "reverse_kl", "forward_kl", "jsd")

    @property
    def top_of(self) -> Literal["student", "teacher"] | None:
        """Whose best objective.top_k ids it reads, if any."""
        if self.top_k is None or self.name not in ("reverse_kl", "forward_kl", "jsd"):
            return None
        return "student" if self.name == "reverse_kl" else "teacher"


# Where an objective's responses may come from.
SOURCES_OF = {
    "sft": ("dataset",),
    "kd": ("teacher", "dataset"),
    "xopd": ("student",),
    "reverse_kl": ("student",),
    "forward_kl": ("student", "teacher", "dataset", "mix"),
    "jsd": ("student", "teacher", "dataset", "mix"),
    "entropy_aware": ("student",),
    "cord": ("student",),
    "salad": ("dataset",),
    "uld": ("student", "teacher", "dataset", "mix"),
}

X_OPD, WARM_START, GKD = "arXiv 2603.24596", "arXiv 2509.14930", "arXiv 2306.13649"
# What objective.name trains by, and where it is from; docs/objectives.md has the formulas.
METHODS = {
    "sft": ("cross-entropy on given responses", ""),
    "kd": ("cross-entropy and forward KL on the teacher's responses, heard and read", WARM_START),
    "xopd": ("cross-modal on-policy distillation, X-OPD", X_OPD),
    "reverse_kl": ("reverse KL on the student's own responses, the dense form of X-OPD", X_OPD),
    "forward_kl": ("forward KL to the teacher", GKD),
    "jsd": ("generalised Jensen-Shannon divergence to the teacher, GKD", GKD),
    "entropy_aware": ("reverse KL, and forward KL where the teacher is unsure", "arXiv 2603.07079"),
    "cord": ("reverse KL with weights on important and early tokens, CORD", "arXiv 2601.16547"),
    "salad": ("forward KL and cross-entropy on given responses, SALAD", "arXiv 2510.13632"),
    "uld": ("universal logit distillation from a teacher with another tokenizer", "arXiv 2402.12030"),
}


SHARED = ("name", "lambda_", "average", "reference")  # of `objective`: every objective's
# The others, by who reads them; docs/objectives.md has them in a column.
SETTINGS_OF = {
    "sft": (),
    "kd": ("mu", "tau"),
    "xopd": ("advantage_clip", "ratio_max", "ratio_above"),
    "reverse_kl": ("top_k",),
    "forward_kl": ("top_k",),
    "jsd": ("beta", "top_k"),
    "entropy_aware": ("entropy_threshold",),
    "cord": ("cord_share", "cord_importance", "cord_decay"),
    "salad": ("alpha",),
    "uld": ("hybrid", "beta"),
}
