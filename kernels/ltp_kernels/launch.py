"""The launch of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, near: Tensor, *arguments: Any, **options: Any) -> None:
    """Launches programs, if there are any, on the device of a tensor. Products and sums are never fused."""
    if programs:
        with torch.cuda.device_of(near):
            kernel[(programs,)](*arguments, enable_fp_fusion=False, **options)
