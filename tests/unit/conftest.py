"""Unit tests run tiny models: threads cost them more than they give, most of all on a busy machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
