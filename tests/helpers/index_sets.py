"""Masks to make index sets of."""

import torch


def random_mask(n: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density
