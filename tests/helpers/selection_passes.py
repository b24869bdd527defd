"""The passes of a selection over tensors in memory: pairs of weights, bounds of a band, outputs of a band pass."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from helpers.bits import DTYPES
from ltp_sparse.tickets.layout import Layout

SELECTION_SIZES = (1, 31, 0, 32, 33, 65_535, 1024, 65_536, 65_537, 140_000)
SELECTION_GROUPS = (0, 0, 2, 1, 1, 0, 0, 2, 2, 2)
KINDS = [
    pytest.param(before, after, id=f"{before}-{after}") for before, after in itertools.product((None, *DTYPES), DTYPES)
]
TAKE = (1, 0, 5, 33, 1000, 0, 70_000, 3, 1, 65_536, 2000, 2)  # of each tile


def unaligned(tensor: Tensor) -> Tensor:
    """The same entries at an address where no vector can be loaded."""
    return torch.cat([tensor[:1], tensor])[1:]


def pairs_of(before: str | None, after: str, rng: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors whose deltas are normal, tied, denormal and zero; some unaligned."""
    initial, tuned = [], []
    for number, n in enumerate(SELECTION_SIZES):
        base = torch.zeros(n) if before is None else torch.randn(n, generator=rng) * 0.02
        start = base.to(DTYPES[before or "f32"])
        end = start.float() + torch.randn(n, generator=rng) * 1e-3
        end[1::3] = start.float()[1::3] + 2.0**-9
        end[2::7] = start.float()[2::7]
        start[4::9], end[4::9] = 0, torch.arange(len(end[4::9])) * 2.0**-149
        end = end.to(DTYPES[after])
        initial.append(unaligned(start) if number % 4 == 1 else start)
        tuned.append(unaligned(end) if number % 4 == 3 else end)
    return [] if before is None else initial, tuned


class BandOutputs:
    def __init__(self, run, initial, tuned, low, high, take, capacity: int) -> None:
        layout, device = Layout([t.numel() for t in tuned]), tuned[0].device

        def filled(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((n,), 77, dtype=dtype, device=device)

        self.words = filled(layout.words, torch.int32)
        self.above, self.inside, self.offsets = (filled(layout.tiles) for _ in range(3))
        self.keys, self.positions = filled(capacity, torch.int32), filled(capacity, torch.int16)
        self.cursor, self.nonfinite = torch.zeros(2, 1, dtype=torch.int64, device=device)
        bounds = torch.tensor([low, high], device=device)
        run(
            initial, tuned, SELECTION_GROUPS, bounds[0], bounds[1], self.words,
            layout.word_offsets[:-1], self.above, self.inside, take, self.keys, self.positions, self.offsets,
            self.cursor, self.nonfinite,
        )  # fmt: skip

    def counts(self) -> list[list[int]]:
        return [t.tolist() for t in (self.words, self.above, self.inside, self.cursor, self.nonfinite)]

    def candidates(self) -> list[tuple[list[int], list[int]] | None]:
        """(keys, positions) of every tile, independent of their place; None if they were not stored."""
        places = zip(self.offsets.tolist(), self.inside.tolist(), strict=True)
        spans = [slice(first, first + count) if first >= 0 else None for first, count in places]
        return [None if span is None else (self.keys[span].tolist(), self.positions[span].tolist()) for span in spans]


def key_at(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32))


BANDS = {
    "narrow": ([key_at(1e-3)] * 3, [key_at(1.02e-3), key_at(1e-3), key_at(1.5e-3)]),
    "ties": ([key_at(2.0**-9)] * 3, [key_at(2.0**-9) + 1] * 3),
    "all that moved": ([1, 2, 1], [0x7F800000] * 3),
    "none": ([0x7F800000] * 3, [0x7F800000, 0x7F810000, 0x7FFFFFFF]),
}
