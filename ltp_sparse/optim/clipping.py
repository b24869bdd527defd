"""The norm of the gradients of a step, over all launches, and what clips them to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ltp_sparse import ops
from ltp_sparse.backends.arguments import Totals
from ltp_sparse.optim.launch import Launch


class ClippedNorm:
    """Where the launches of each device add up their squares, and where they find what scales their gradients."""

    def __init__(self, launches: list[Launch]) -> None:
        self._launches: dict[torch.device, list[Launch]] = {}
        for launch in launches:
            self._launches.setdefault(launch.device, []).append(launch)
        self._totals = {
            device: _zeros(device, sum(len(launch.pieces) for launch in of_device))
            for device, of_device in self._launches.items()
        }
        self._arrived = {device: torch.zeros(1, dtype=torch.int32, device=device) for device in self._launches}
        self.clips = {device: _zeros(device) for device in self._launches}
        """0-dim float64 on each device"""

    def measure(self, max_norm: float) -> Tensor:
        """Writes the clips for a norm of at most `max_norm`; returns the norm before, 0-dim float64."""
        norms = []
        for device, launches in self._launches.items():
            norms.append(_zeros(device))
            runs = (run for launch in launches for run in launch.runs())
            for number, (update, backend) in enumerate(runs):
                totals = Totals(
                    self._totals[device], number, max_norm, norms[-1], self.clips[device], self._arrived[device]
                )
                ops.gradient_norm(update, totals, backend)
        if len(norms) > 1:
            first = norms[0].device
            norms[0] = torch.stack([totals.sum().to(first) for totals in self._totals.values()]).sum().sqrt()
            clip = (max_norm / (norms[0] + 1e-6)).clamp(max=1.0)
            for own in self.clips.values():
                own.copy_(clip)
        return norms[0]


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)
