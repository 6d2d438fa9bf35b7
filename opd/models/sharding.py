"""Models under DeepSpeed ZeRO-3: each rank holds its part, and the values are those of a whole copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def load_sharded(load: Callable[[], Any], settings: dict[str, Any]) -> Any:
    """The Hugging Face model that `load()` gets by from_pretrained, sharded as it loads where settings are of ZeRO-3.

    transformers keeps the settings for the whole process: here for this one model, whatever becomes of it.
    """
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    try:
        model = load()
    finally:
        unset_hf_deepspeed_config()
        del alive
    if (settings.get("zero_optimization") or {}).get("stage") == 3:
        _restore_buffers(model)
    return model


def inside(module: Any, run: Callable[..., Any], *inputs: Any) -> Any:
    """`run(*inputs)` in the place of the module's forward: its parameters are whole there, and again in backward.

    ZeRO-3 gathers and releases them in the module's hooks: once, however often `run` reads them.
    """
    module.forward = run  # an instance's attribute: the class's own forward is back when it is deleted
    try:
        return module(*inputs)
    finally:
        del module.forward


def _restore_buffers(model: Any) -> None:
    """Compute anew what a constructor computes and no checkpoint holds, such as rotary frequencies.

    DeepSpeed casts every tensor that is made while it shards to the dtype of the parameters: bfloat16 frequencies are
    off by up to 0.6 %, which turns position 1000 by more than a radian.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), torch.no_grad():
        fresh = type(model)._from_config(model.config, dtype=model.dtype)
    found = dict(fresh.named_modules())
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            old, new = module._buffers[key], found[name]._buffers[key]
            if old is not None:
                module._buffers[key] = new.to(old.device)


def all_reduce(x: Tensor, op: str) -> Tensor:
    """Sum or maximum of `x` over all ranks, on the device where `x` was; `x` itself without a process group."""
    if dist.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
        y = x.to(device)
        dist.all_reduce(y, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        return y.to(x.device)
    return x


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
