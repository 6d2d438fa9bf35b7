"""What processes of one host share: its free ports, and the folder through which new weights travel."""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
from pathlib import Path

from opd.settings import UserError
from opd.storage import disk

LOOPBACK = "127.0.0.1"
TRANSFER_PREFIX = f"opd-{socket.gethostname()}-"  # a shared folder may serve several hosts
# Below the range from which Linux takes the ports of outgoing connections: a server binds its port seconds after it
# was chosen, and none of those may have it by then.
PORTS = range(20000, 32768)
_held: list[socket.socket] = []
SOCKETS = "VLLM_RPC_BASE_PATH"  # vLLM's word for the folder of its sockets; TMPDIR by default
LONGEST = 107 - len("/00000000-0000-0000-0000-000000000000")  # bytes of that: Linux's limit (unix(7)), vLLM's names
SHORT = "/tmp"


def free_port() -> int:
    """A port that nobody listens on and that no other `opd` process of this machine has been given.

    It is this process's until it ends: an abstract Unix socket of that name says so to the others.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0opd-port-{port}")
            with socket.socket() as s:
                s.bind((LOOPBACK, port))
        except OSError:
            claim.close()
            continue
        _held.append(claim)
        return port
    raise UserError(f"no free port on {LOOPBACK} from {min(PORTS)} to {max(PORTS)}")


def sockets() -> dict[str, str]:
    """What vLLM's processes are told where the paths of their sockets would be too long. UserError: no short folder."""
    asked = os.environ.get(SOCKETS, tempfile.gettempdir())
    if len(os.fsencode(asked)) <= LONGEST:
        return {}
    disk.free(SHORT, f"TMPDIR {asked} is too long for sockets, of {LONGEST} bytes at most; set {SOCKETS}, for")
    return {SOCKETS: SHORT}


def sweep(parent: str) -> None:
    """Remove from the folder of a file transport what killed learners of this host left there."""
    import psutil

    for folder in Path(parent).glob(f"{TRANSFER_PREFIX}*-*"):
        pid = folder.name.removeprefix(TRANSFER_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
