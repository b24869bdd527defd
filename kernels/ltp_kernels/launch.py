"""What the launchers share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever the arguments; does nothing for CPU tensors."""
    return torch.cuda.device_of(tensor)
