"""What the launchers share: tables of addresses, and the device of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

_captured: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def address(tensor: Tensor) -> int:
    """Where the data of `tensor` is; 0 if it has none."""
    return tensor.data_ptr() if tensor.numel() else 0


def address_table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 [len(tensors)] on `device`: the address of each, read in this call; an unchanged list copies nothing.

    A table used while a CUDA graph is captured is kept for good, since replays read it. One that would first have to be
    copied there is an error from torch: take a step before capturing.
    """
    addresses = tuple(map(address, tensors))
    table = _upload(addresses, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[addresses, device] = table
    return table


def address_pairs(params: Sequence[Tensor], grads: Sequence[Tensor], packed: bool, device: torch.device) -> Tensor:
    """int64 [2 P]: the addresses of parameter and gradient in turn; packed: of the one gradient tensor every time."""
    if packed:
        grads = [grads[0]] * len(params)
    return address_table(list(chain(*zip(params, grads, strict=True))), device)


@lru_cache(maxsize=64)
def _upload(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    # Pageable memory: copied out before the call returns, without waiting for the device.
    return torch.tensor(addresses, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever the arguments; does nothing for CPU tensors."""
    return torch.cuda.device_of(tensor)
