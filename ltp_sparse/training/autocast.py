"""Computing in bfloat16, and a warning where the processor is slow at it."""

from __future__ import annotations

import warnings

import torch


class SlowBfloat16(UserWarning):
    """bfloat16 was asked for on a processor without fast instructions for it."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context that computes in `dtype` on a device; None: in the dtypes of the tensors.

    Warns:
        SlowBfloat16: see `check_speed`.
    """
    check_speed(device, dtype)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def check_speed(device: torch.device, dtype: torch.dtype | None) -> None:
    """Warns where matrix products in bfloat16 take far longer than in float32.

    On x86 processors without AVX-512 torch multiplies bfloat16 in plain loops: layers of 384 x 1536 took 60 times as
    long as in float32.

    Warns:
        SlowBfloat16: the dtype is bfloat16, the device such a processor.
    """
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")
    if slow and dtype == torch.bfloat16:
        warnings.warn(
            "this processor has no fast instructions for bfloat16, which can take 60 times as long as float32; leave "
            "out bf16 (--bf16)",
            SlowBfloat16,
            stacklevel=3,
        )
