"""CUDA memory of this process mapped by another, its handle told in JSON."""

from __future__ import annotations

import json
import subprocess
import sys

READ = """
import json, sys, torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from opd.inference.transports import decode_handle
(handle,) = json.load(sys.stdin).values()
print(json.dumps(rebuild_cuda_tensor(*decode_handle(handle)).cpu().tolist()))
"""


def test_another_process_reads_what_was_exported() -> None:
    import torch

    from opd.inference.transports import export

    flat = torch.arange(200, dtype=torch.uint8, device="cuda")
    told = json.dumps(export(flat))
    done = subprocess.run([sys.executable, "-c", READ], input=told, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(range(200))
