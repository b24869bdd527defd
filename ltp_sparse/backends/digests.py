"""Digests of tiles, int64 [T, 2], computed on the device of the tensors; `weights.digests` defines them.

On a GPU a Triton kernel computes them. Without Triton the tensors are copied to the host, which takes as long as the
copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltp_sparse.backends import triton
from ltp_sparse.tickets.bits import tiles_of
from ltp_sparse.weights import digests


def on_host(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Writes the digests of contiguous tensors, on any device, to `out`."""
    found = bytearray().join(digests.tile_digests(tensor.cpu()) for tensor in tensors)
    if found:
        out.copy_(torch.frombuffer(found, dtype=torch.int64).view(-1, 2))


def on_gpu(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Writes the digests of contiguous tensors, on the GPU of `out`, to `out`."""
    kernels = triton.kernels()
    (on_host if isinstance(kernels, str) else kernels.tile_digests)(tensors, out)


def _found_on_gpu(tensors: Sequence[Tensor]) -> Tensor:
    tiles = sum(tiles_of(tensor.numel()) for tensor in tensors)
    out = torch.empty(tiles, 2, dtype=torch.int64, device=tensors[0].device)
    on_gpu(tensors, out)
    return out


digests.on_device["cuda"] = _found_on_gpu
