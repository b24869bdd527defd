"""Which GPUs are too old for the kernels, CUDA and Triton alike."""

from __future__ import annotations

from functools import cache

import torch

NEEDED = (8, 0)


@cache
def too_old(device: torch.device) -> str | None:
    """Why a GPU is too old; None if it is not, or if there is no GPU to ask."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= NEEDED:
        return None
    needed, given = ("{}.{}".format(*capability) for capability in (NEEDED, found))
    return f"its kernels need compute capability {needed}, {torch.cuda.get_device_name(device)} has {given}"
