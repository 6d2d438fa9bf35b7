"""DeepSpeed's compiled extensions: built once for each Python environment, where a killed build cannot hang the next.

torch guards a build by a file named `lock` and waits for its removal for ever, also when the builder was killed. Here
the guard is flock, which the system releases with its process: whoever holds it knows every such file to be stale.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd.settings import UserError
from opd.storage import disk

VARIABLE = "TORCH_EXTENSIONS_DIR"


def folder() -> Path:
    """$TORCH_EXTENSIONS_DIR, else `torch_extensions` in this environment, else in the user's cache."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    own = Path(sys.prefix) / "torch_extensions"
    with suppress(UserError):
        disk.free(own, VARIABLE)
        return own
    return Path.home() / ".cache" / "opd" / "torch_extensions"


def build(settings: dict[str, Any] | None = None) -> Path:
    """Compile, or just load, what DeepSpeed will ask for under `settings` (its JSON); returns the folder.

    Each process calls it before DeepSpeed starts; processes of one host take turns. Afterwards DeepSpeed finds the
    extensions loaded. Raises UserError when they do not compile.
    """
    where = folder()
    where.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(where)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__ as compatible

    builders = ["ShareMemCommBuilder"] if get_accelerator()._name == "cpu" else []
    offload = ((settings or {}).get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        builders.append("CPUAdamBuilder")
    with (where / ".turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for name in builders:
            builder = get_accelerator().create_op_builder(name)
            if builder is not None and compatible.get(builder.NAME, False):
                (where / builder.NAME / "lock").unlink(missing_ok=True)
                try:
                    builder.load(verbose=False)
                except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as e:
                    raise UserError(f"DeepSpeed's extension {builder.NAME} does not compile in {where}: {e}") from e
    return where


if __name__ == "__main__":
    print(build())
