"""The device of a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the device of a tensor the current one, where Triton launches. Does nothing for CPU tensors."""
    return torch.cuda.device_of(tensor)
