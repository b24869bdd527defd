"""The key of a certain rank, digit by digit: a histogram of the upper 15 bits of all keys, and one of the lower 16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import Histogram, Tensors
from ltp_sparse.backends.reference import NONFINITE_KEY
from ltp_sparse.ops.ranks import Ranks
from ltp_sparse.ops.sources import Source

BINS_AT_ONCE = 1 << 18
"""Bins held at a time, of as many groups as they serve."""


@dataclass
class Digits:
    """Of the key of a certain rank, int64 [G] each, or [G, R] of several, on the device of the weights.

    digit: its upper 15 bits, or its lower 16; where the rank is 0, that of no finite key
    rank:  its rank among the keys of that digit
    asked: the rank that was asked for; where a group has fewer keys, their number
    count: the keys of that digit
    own:   those of this process
    """

    digit: Tensor
    rank: Tensor
    asked: Tensor
    count: Tensor
    own: Tensor


def digit_pass(
    passes: Backend,
    source: Source,
    groups: list[int],
    wanted: Tensor,
    prefixes: Tensor | None,
    ranks: Ranks,
    nonfinite: Tensor,
) -> Digits:
    """Per group the upper 15 bits of the key of rank `wanted` or, given these as `prefixes`, the lower 16.

    wanted:    int64 [G], or without prefixes [G, R]
    nonfinite: int64 [1], set to 1 if an infinity or a NaN was seen
    """
    bins = 1 << (15 if prefixes is None else 16)
    at_once = BINS_AT_ONCE // bins
    found = []
    for first in range(0, len(wanted), at_once):
        batch = range(first, min(first + at_once, len(wanted)))
        histogram = torch.zeros(len(batch), bins, dtype=torch.int64, device=source.device)
        upper = None if prefixes is None else prefixes[first : batch.stop]
        for chunk in source.chunks([tensor for tensor, group in enumerate(groups) if group in batch]):
            of_batch = [groups[t] - first for t in chunk.tensors]
            sides = Tensors(chunk.initial), Tensors(chunk.tuned)
            passes.delta_histogram(Histogram(*sides, of_batch, upper, histogram, nonfinite))
        total = ranks.sum(histogram)
        asked = torch.minimum(wanted[first : batch.stop].view(len(batch), -1), total.sum(1, keepdim=True))
        digit, rank, count = bins_of_ranks(total, asked)
        own, none = histogram.gather(1, digit), asked == 0
        digit = digit.masked_fill(none, NONFINITE_KEY >> 16)
        found.append((digit, *(t.masked_fill(none, 0) for t in (rank, asked, count, own))))
    return Digits(*(torch.cat(parts).view(wanted.shape) for parts in zip(*found, strict=True)))


def joined(upper: Digits, lower: Digits) -> Tensor:
    """int64 [G]: the keys that have these digits; where the rank is 0, that of no finite one."""
    keys = ((upper.digit << 16) + lower.digit).clamp(min=1)
    return torch.where(lower.rank > 0, keys, NONFINITE_KEY)


def bins_of_ranks(histogram: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [G, R], thrice: the bin of each row that holds the rank-th largest, its rank in the bin, the bin's count.

    histogram: int64 [G, bins]; rank: int64 [G, R]. Where the rank is 0 or beyond the count of the row, any bin.
    """
    from_top = histogram.flip(1).cumsum(1)
    at = torch.searchsorted(from_top, rank).clamp(max=histogram.shape[1] - 1)
    bins = histogram.shape[1] - 1 - at
    count = histogram.gather(1, bins)
    return bins, rank - (from_top.gather(1, at) - count), count
