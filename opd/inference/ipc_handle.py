"""Handles of CUDA memory as JSON: what `torch.multiprocessing` would pickle, without a pickle from the network."""

from __future__ import annotations

import base64
from typing import Any

import torch

# Arguments of `rebuild_cuda_tensor` as torch's `reduce_tensor` gives them, in order, and what JSON holds of each.
FIELDS: dict[str, type] = {
    **{"class": str, "size": list, "stride": list, "offset": int, "storage_class": str, "dtype": str, "device": int},
    **{"handle": bytes, "storage_bytes": int, "storage_offset_bytes": int, "requires_grad": bool},
    **{"counter": bytes, "counter_offset": int, "event": bytes, "event_sync": bool},
}
# The only classes and dtypes that a handle may name.
KNOWN: dict[str, dict[str, Any]] = {
    "class": {"Tensor": torch.Tensor},
    "storage_class": {"TypedStorage": torch.storage.TypedStorage, "UntypedStorage": torch.UntypedStorage},
    "dtype": {"uint8": torch.uint8},
}


def encode(args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments of `rebuild_cuda_tensor` for a flat uint8 tensor as JSON; bytes in base64."""
    out: dict[str, Any] = {}
    for (name, kind), value in zip(FIELDS.items(), args, strict=True):
        if name in KNOWN:
            out[name] = next(word for word, known in KNOWN[name].items() if known is value)
        elif kind is bytes:
            out[name] = base64.b64encode(value).decode()
        else:
            out[name] = kind(value)
    return out


def decode(handle: Any) -> tuple[Any, ...]:
    """What `encode` was given. Raises ValueError for anything else than its results."""
    if not isinstance(handle, dict) or set(handle) != set(FIELDS):
        raise ValueError(f"IPC handle: expected the keys {', '.join(FIELDS)}, found {str(handle)[:80]}")
    return tuple(_decoded(name, kind, handle[name]) for name, kind in FIELDS.items())


def _decoded(name: str, kind: type, value: Any) -> Any:
    right = type(value) is (str if kind is bytes else kind)  # a bool is no int here
    if not right:
        raise ValueError(f"IPC handle: {name}: expected {kind.__name__}, found {str(value)[:80]!r}")
    if name in KNOWN:
        if value not in KNOWN[name]:
            raise ValueError(f"IPC handle: {name}: expected {' or '.join(KNOWN[name])}, found {value[:80]!r}")
        return KNOWN[name][value]
    if kind is bytes:
        return base64.b64decode(value, validate=True)
    if kind is list:
        if any(type(n) is not int for n in value):
            raise ValueError(f"IPC handle: {name}: expected whole numbers, found {str(value)[:80]}")
        return torch.Size(value) if name == "size" else tuple(value)
    return value
