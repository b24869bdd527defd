"""The processes of torch.distributed that select together."""

from __future__ import annotations

import torch
from torch import Tensor


class Ranks:
    """The processes that select together. This class stands for one process that has all tensors whole.

    `selection.distributed` has the one for several processes, each with its pieces of the tensors. All of them take the
    same route, so that their calls of these methods match.
    """

    def sum(self, counts: Tensor) -> Tensor:
        """Sums over the processes, on the same device."""
        return counts

    def in_order(self, counts: Tensor) -> Tensor:
        """int64 [P] of every process -> [P, R] for all R processes, each tensor's pieces in the order of entries."""
        return counts[:, None]

    def places(self, tensors: int) -> Tensor:
        """int64 [P]: the column of `in_order` that belongs to this process, for each tensor."""
        return torch.zeros(tensors, dtype=torch.int64, device="cpu")
