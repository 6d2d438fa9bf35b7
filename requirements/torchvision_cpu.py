"""Lets the published torchvision, which is linked against CUDA torch, be imported beside CPU torch.

Its import fails on operators that its compiled library would have brought. The CPU set-up has every Python process of
its environment import this file (a .pth file); nothing else happens until someone imports torchvision. Processors of
the Omni families need it for images, which opd never sends.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Definer(MetaPathFinder):
    """Defines the missing operators when torchvision is about to be imported; finds nothing itself."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Always None."""
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            if torch.version.cuda is None:
                for schema in SCHEMAS:
                    self.library.define(schema)


def install() -> None:
    """Put the finder first, once per process."""
    if not any(isinstance(f, Definer) for f in sys.meta_path):
        sys.meta_path.insert(0, Definer())


install()
