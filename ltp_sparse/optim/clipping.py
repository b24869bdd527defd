"""The norm of the gradients over all launches of a step, and the factor that clips them."""

from __future__ import annotations

import torch
from torch import Tensor

from ltp_sparse import ops
from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import NORM_GROUP, Total
from ltp_sparse.optim.launch import Launch
from ltp_sparse.weights.sharding import sum_over


class ClippedNorm:
    """Measures the norm of the gradients of some launches.

    Attributes:
        clips: device -> 0-dim float64, the factor for the gradients on it.
    """

    def __init__(self, launches: list[Launch]) -> None:
        self._launches = launches
        self._tiles = sum(len(launch.table.tiles) for launch in launches)
        self.clips = {launch.device: _empty(launch.device) for launch in launches}
        self._arrived: Tensor | None = None

    def measure(self, max_norm: float) -> Tensor:
        """Writes the factors that clip to a norm of `max_norm`; returns the norm before clipping, 0-dim float64."""
        backends = {launch.backend.name: launch.backend for launch in self._launches}
        spread = any(launch.spread for launch in self._launches)
        if len(self.clips) > 1 or len(backends) > 1 or not self._tiles or spread:
            return self._measure_apart(max_norm)
        ((device, clip),), (backend,) = self.clips.items(), backends.values()
        grad_norm, first = _empty(device), 0
        sums, arrived = self._scratch(backend, device)
        for launch in self._launches:
            for update, _ in launch.runs():
                ops.gradient_norm(update, Total(first, self._tiles, max_norm, sums, arrived, grad_norm, clip), backend)
                first += len(update.tiles)
        return grad_norm

    def _scratch(self, backend: Backend, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The `sums` and `arrived` of `Total`."""
        if not backend.needs_prepared:
            return _empty(device, self._tiles), None
        groups = -(-self._tiles // NORM_GROUP)
        if self._arrived is None:
            self._arrived = torch.zeros(1 + groups + self._tiles, dtype=torch.int32, device=device)
        return _empty(device, self._tiles * backend.sums_per_tile + groups), self._arrived

    def _measure_apart(self, max_norm: float) -> Tensor:
        """Measures with one sum per launch: for several devices, several backends, or parameters sharded over ranks."""
        sums = []
        for launch in self._launches:
            own = torch.stack([ops.run("masked_sum_squares", *run).sum() for run in launch.runs()]).sum()
            sums.append(sum_over(launch.spread, own))
        grad_norm = torch.stack([of_launch.to(sums[0].device) for of_launch in sums]).sum().sqrt()
        clip = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for own in self.clips.values():
            own.copy_(clip)
        return grad_norm


def _empty(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=device)
