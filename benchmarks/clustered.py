"""Tickets of any shapes with the clustering of a real MLM run.

Embedding rows of rare words hardly move, those of absent words not at all, and rows and columns of the other matrices
move by different amounts. So a real ticket touches far fewer sectors of memory than a random one.

`MEASURED` and the constants come from stage 1 with mini-xlmr (6.4M entries) on English Wikipedia; see NOTES.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import ltp_sparse as ls

MEASURED = {0.01: (0.054, 0.082), 0.05: (0.188, 0.235), 0.2: (0.380, 0.396), 0.5: (0.622, 0.623)}
"""Density -> share of touched groups of 8 and of 16 entries: the 32-byte sectors of float32 and of bfloat16 weights.
For uniformly random masks: 0.077 and 0.149, 0.337 and 0.560, 0.832 and 0.972, 0.996 and 1."""

ABSENT = 0.38  # share of words that are not in the text: their rows do not move
WORDS = 0.24  # median deviation of the other words' rows, relative to that of the matrices
WORD_ROWS = 0.7  # standard deviation of the logarithm of a word's activity
WITHIN_WORD = 0.3  # deviation of the deltas of one word relative to their mean: its entries move alike
ROWS, COLUMNS = 0.32, 0.2  # deviations of the logarithm of a row's and a column's activity in other matrices


def deltas(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Name -> float32 tensor >= 0: how far every entry moves, relative to the matrices' standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {}
    for name, shape in shapes.items():
        delta = normal(*shape)
        if "word_embeddings" in name:
            rows = WORDS * normal(shape[0]).mul_(WORD_ROWS).exp_()
            rows[torch.rand(shape[0], generator=generator) < ABSENT] = 0
            delta.mul_(WITHIN_WORD).add_(1).mul_(rows[:, None])
        elif len(shape) == 2:
            delta.mul_(normal(shape[0], 1).mul_(ROWS).exp_()).mul_(normal(shape[1]).mul_(COLUMNS).exp_())
        found[name] = delta.abs_()
    return found


def ticket(shapes: Mapping[str, Sequence[int]], density: float, seed: int = 0) -> ls.Ticket:
    """The ticket of the entries that move most.

    Raises:
        ValueError: too few entries move.
    """
    moves = deltas(shapes, seed)
    k = int(density * sum(delta.numel() for delta in moves.values()))
    sets, _ = ls.topk_delta([], list(moves.values()), k)
    if (found := sum(index_set.k for index_set in sets)) < k:
        raise ValueError(f"clustered ticket: {k:,} entries requested (density {density:g}), {found:,} move")
    return ls.Ticket({name: found.compact() for name, found in zip(moves, sets, strict=True)}, shapes)
