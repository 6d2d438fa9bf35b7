"""One learner process: `python -m opd.train RECIPE`, started on every rank by accelerate, deepspeed or torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from opd.config.deepspeed import deepspeed_settings
from opd.config.load import Taken, load_config
from opd.config.schema import Config
from opd.settings import UserError
from opd.storage.disk import filling
from opd.storage.metrics import MetricsLog
from opd.train import extensions
from opd.train.build import run


def main(argv: list[str] | None = None) -> NoReturn:
    """`python -m opd.train RECIPE [key=value ...]`: exit code 0 done, 2 a user's mistake, 1 anything else.

    Ends the process.
    """
    parser = argparse.ArgumentParser(prog="opd train", description="One learner process; start it with accelerate.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    config: Config | None = None
    code, message, ours = 0, "", True
    try:
        config = load_config(args.recipe, args.overrides)
        _init_distributed(config)
        with filling(config.run.dir, "run.dir"):
            run(config)
    except UserError as e:
        code, message, ours = 2, str(e), not isinstance(e, Taken)
    except Exception as e:
        traceback.print_exc()
        code, message = 1, f"{type(e).__name__}: {e}"
    if code:
        rank = int(os.environ.get("RANK", "0"))
        if config is not None and ours and Path(config.run.dir).is_dir():
            MetricsLog(Path(config.run.dir), [], "", "").failed(rank, config.train.steps, message, code == 2)
        print(f"opd: error: {message}", file=sys.stderr)
    else:
        dist.destroy_process_group()  # after a failure other ranks may wait in a collective: no orderly end is possible
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. An interpreter that unloads torch, OpenMP and the rest beside their threads is aborted now and
    # then, and a finished run would count as failed.
    os._exit(code)


def _init_distributed(config: Config) -> None:
    import deepspeed

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ.update(alone | os.environ)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    extensions.build(deepspeed_settings(config))
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=config.train.timeout_s), verbose=False)
    torch.manual_seed(config.run.seed)


if __name__ == "__main__":
    main()
