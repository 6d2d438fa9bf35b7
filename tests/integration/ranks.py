"""One rank of two, for several tests: starting ranks takes longer than what most tests ask of them.

`python ranks.py STUDENT FOLDER MODULE ...` under torchrun keeps what each module's `main(student, rank, folder)` gives
in FOLDER/MODULE.RANK.json.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist

from opd.train import extensions


def main(student: str, out: str, *modules: str) -> None:
    extensions.build()
    deepspeed.init_distributed("gloo", verbose=False)
    rank = dist.get_rank()
    for name in modules:
        found = importlib.import_module(name).main(student, rank, Path(out))
        Path(out, f"{name}.{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "unit"))
    main(*sys.argv[1:])
