"""The folder through which new weights travel, and what a dead run left in it."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

TRANSFER_PREFIX = f"opd-{socket.gethostname()}-"  # a shared folder may serve several hosts


def sweep(parent: str) -> None:
    """Remove from the folder of a file transport what killed learners of this host left there."""
    import psutil

    for folder in Path(parent).glob(f"{TRANSFER_PREFIX}*-*"):
        pid = folder.name.removeprefix(TRANSFER_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
