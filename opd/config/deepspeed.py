"""DeepSpeed settings: what the recipe owns, and what its JSON file may say. Imports no torch."""

from __future__ import annotations

import json
import os
from typing import Any

from opd.config.schema import Config
from opd.settings import UserError, looked, read_text, shipped

RECIPE_OWNS = {
    "train_batch_size": "train.prompts_per_step",
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "train.micro_batch_tokens"),
    "gradient_clipping": "optim.grad_clip",
    **dict.fromkeys(("bf16", "fp16", "amp", "torch_autocast", "data_types"), "student.dtype"),
    "communication_data_type": "student.dtype",
    "optimizer": "optim.lr",
    "scheduler": "optim.schedule",
}
# What else a file may set: memory and what is shown, nothing that changes a gradient.
DEEPSPEED_OWNS = ("zero_optimization", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown")


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """The DeepSpeed config: ZeRO from the JSON file, everything else from the recipe.

    An accelerate config's `deepspeed_config_file` (in the environment that `accelerate launch` sets) comes first.
    Raises UserError when the file sets what the recipe owns, naming both.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or config.train.deepspeed
    try:
        settings: dict[str, Any] = json.loads(read_text(shipped(path), f"file{looked(path, ', or in opd itself')}"))
    except UserError as e:
        raise UserError(f"train.deepspeed: {e}") from e
    except ValueError as e:
        raise UserError(f"train.deepspeed: {path}: not valid JSON: {e}") from e
    if not isinstance(settings, dict):
        raise UserError(f"train.deepspeed: {path}: expected an object, found {type(settings).__name__}")
    for key, owner in RECIPE_OWNS.items():
        if settings.get(key, "auto") not in ("auto", {"enabled": "auto"}):
            section, name = owner.split(".")
            ours = getattr(getattr(config, section), name)
            raise UserError(f"{path}: sets {key} to {settings[key]}, the recipe's {owner} is {ours}: take it out there")
        settings.pop(key, None)
    if other := [key for key in settings if key not in DEEPSPEED_OWNS]:
        allowed = ", ".join(DEEPSPEED_OWNS)
        raise UserError(f"{path}: sets {other[0]} to {settings[other[0]]}; expected nothing but {allowed}")
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.student.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def inference_settings(config: Config, dtype: str) -> dict[str, Any]:
    """DeepSpeed settings of a sharded teacher of `dtype`: ZeRO-3, whatever the student's stage, with the recipe's
    offload_param and bucket sizes; nothing that an optimizer would need."""
    settings = deepspeed_settings(config)
    zero = {k: v for k, v in (settings.get("zero_optimization") or {}).items() if k != "offload_optimizer"}
    return settings | {
        "zero_optimization": zero | {"stage": 3},
        "bf16": {"enabled": dtype == "bfloat16"},
        "gradient_clipping": 0.0,
    }
