"""Speech LLM families: one entry each."""

from __future__ import annotations

from opd.config import UserError
from opd.models.base import Family
from opd.models.qwen2_audio import Qwen2Audio

FAMILIES: dict[str, type[Family]] = {"qwen2_audio": Qwen2Audio}


def family_of(path: str) -> Family:
    """The family of a checkpoint, by the `model_type` of its config. Raises UserError when it is not one of ours."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise UserError(f"student.path {path}: no loadable config: {str(e).splitlines()[0]}") from e
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"student.path {path}: model_type {config.model_type!r} is not supported; supported: {known}")
    return FAMILIES[config.model_type](path)
