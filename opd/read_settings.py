"""Settings that nothing in a recipe reads: which objective reads which. Imports no torch."""

from __future__ import annotations

from opd.config import Config, ObjectiveConfig

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


def unread(config: Config) -> list[str]:
    """Settings that are not at their defaults and that nothing in this recipe reads: which, and by what, in words.

    They are allowed: a study's rows share overrides.
    """
    o, t, r = config.objective, config.teacher, config.rollout
    idle: dict[str, str] = {k: o.name for k in ObjectiveConfig.model_fields if k not in (*SHARED, *SETTINGS_OF[o.name])}
    if o.name == "kd" and not o.reads_rows:
        idle["tau"] = "kd with objective.mu 0"
    if o.name == "uld" and not o.hybrid:
        idle["beta"] = "uld without objective.hybrid"
    found = [
        f"objective.{k} is not read by {by}"
        for k, by in idle.items()
        if getattr(o, k) != ObjectiveConfig.model_fields[k].default
    ]
    if t.kind != "routed" and t.field != type(t).model_fields["field"].default:
        found.append(f"teacher.field is not read by teacher.kind {t.kind}")
    if r.source != "mix" and r.student_share != type(r).model_fields["student_share"].default:
        found.append(f"rollout.student_share is not read by rollout.source {r.source}")
    return found
