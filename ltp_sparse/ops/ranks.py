"""The processes that select together."""

from __future__ import annotations

import torch
from torch import Tensor


class Ranks:
    """The processes that select together, each from its own pieces of the tensors: here, one that has them whole.

    `selection.distributed` knows the others. Every process takes the same route, so these calls pair up.
    """

    def sum(self, counts: Tensor) -> Tensor:
        """Sums over the processes, on the same device."""
        return counts

    def in_order(self, counts: Tensor) -> Tensor:
        """int64 [P] of every process -> [P, R], each tensor's pieces in the order of their entries."""
        return counts[:, None]

    def places(self, tensors: int) -> Tensor:
        """int64 [P]: the columns of `in_order` that are this process's."""
        return torch.zeros(tensors, dtype=torch.int64, device="cpu")
