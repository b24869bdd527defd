"""The key at a certain order, in two digits: a histogram of the upper 15 bits of all keys, then of the lower 16."""

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
"""Bins held at a time. Groups are served in batches that fit."""


@dataclass
class Digits:
    """A digit of the key at some order (1 is the largest key) in each group, and what follows from it.

    All are int64 [G] on the device of the weights, or [G, R] for R orders at once.

    Attributes:
        digit: the upper 15 bits of the key, or its lower 16. Where the order is 0, a digit that no finite key has.
        order: the order of the key among the keys with this digit.
        asked: the order asked for, at most the number of keys in the group.
        count: the number of keys with this digit.
        own: how many of these this process has.
    """

    digit: Tensor
    order: Tensor
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
    """The upper 15 bits of the key at an order in each group, or its lower 16 bits given the upper ones.

    Args:
        passes: the backend.
        source: the pairs of tensors.
        groups: the group of every tensor.
        wanted: int64 [G], the order in each group; without prefixes also [G, R].
        prefixes: int64 [G], the upper bits; None looks for them.
        ranks: the processes that select together.
        nonfinite: int64 [1], set to 1 if an infinity or a NaN was seen.
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
        digit, order, count = bins_of_orders(total, asked)
        own, none = histogram.gather(1, digit), asked == 0
        digit = digit.masked_fill(none, NONFINITE_KEY >> 16)
        found.append((digit, *(t.masked_fill(none, 0) for t in (order, asked, count, own))))
    return Digits(*(torch.cat(parts).view(wanted.shape) for parts in zip(*found, strict=True)))


def joined(upper: Digits, lower: Digits) -> Tensor:
    """int64 [G]: the keys with these digits; where the order is 0, the smallest key that is not finite."""
    keys = ((upper.digit << 16) + lower.digit).clamp(min=1)
    return torch.where(lower.order > 0, keys, NONFINITE_KEY)


def bins_of_orders(histogram: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bin that holds the key at an order, the order of the key inside the bin, and the bin's count.

    Args:
        histogram: int64 [G, bins].
        order: int64 [G, R], from 1 for the largest key. The bin is arbitrary for 0, or beyond the count of the row.

    Returns:
        Three tensors, int64 [G, R].
    """
    from_top = histogram.flip(1).cumsum(1)
    at = torch.searchsorted(from_top, order).clamp(max=histogram.shape[1] - 1)
    bins = histogram.shape[1] - 1 - at
    count = histogram.gather(1, bins)
    return bins, order - (from_top.gather(1, at) - count), count
