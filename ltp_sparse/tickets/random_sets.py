"""Random index sets: exactly k entries, every set of k entries equally likely.

Each entry is first taken at random with a probability a little below k / n; the few missing ones are then drawn one by
one from the free entries. All entries are treated alike, so the set is uniform, and its counts per parameter follow the
multivariate hypergeometric distribution. This needs neither a permutation nor a score per entry.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Size, Tensor

from ltp_sparse.tickets.bits import bitmap_words, pack_bits
from ltp_sparse.tickets.counts import as_share, entries_for
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.layout import Layout

_PIECE = 1 << 15  # random numbers drawn at a time: too few for torch to use threads
_DEVIATIONS = 6  # standard deviations by which the first pass aims below k


class _RandomBits:
    """A random stream that depends on the seed only: the same on every machine and with any number of threads."""

    def __init__(self, seed: int) -> None:
        # hashed, so that a ticket is independent of weights initialised with the same seed
        key = hashlib.sha256(f"ltp_sparse random ticket {seed}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))

    def integers(self, n: int, dtype: torch.dtype) -> Tensor:
        """[n], uniform over all values of an integer dtype."""
        words = torch.empty(-(-n * dtype.itemsize // 8), dtype=torch.int64, device="cpu")
        return words.random_(-(1 << 63), None, generator=self._generator).view(dtype)[:n]

    def below(self, bound: int, n: int) -> Tensor:
        """int64 [n], uniform over 0..bound-1 (to one part in 2^63 / bound)."""
        return (self.integers(n, torch.int64) & ((1 << 63) - 1)) % bound


def _bernoulli(words: Tensor, n: int, chance: int, random: _RandomBits, dtype: torch.dtype) -> int:
    """Sets each of the n bits of a bitmap with probability chance / 2^(bits of dtype). Returns their number."""
    if chance == 0:
        words.zero_()
        return 0
    last = torch.iinfo(dtype).min + chance - 1
    count = 0
    for start in range(0, n, _PIECE):
        taken = random.integers(min(_PIECE, n - start), dtype) <= last
        words[start // 32 :][: bitmap_words(taken.numel())] = pack_bits(taken)
        count += int(taken.sum())
    return count


def _exactly(sizes: Sequence[int], k: int, random: _RandomBits) -> list[Tensor]:
    """int32 bitmaps of tensors of the given sizes, with k bits set in all."""
    n, layout = sum(sizes), Layout(sizes)
    words = torch.zeros(layout.words, dtype=torch.int32, device="cpu")
    bitmaps = list(words.split([bitmap_words(size) for size in sizes]))
    inverted = k > n - k  # draw the inactive entries, which are fewer
    wanted = n - k if inverted else k
    chance = max(0, wanted - _DEVIATIONS * math.isqrt(wanted)) * (1 << 16) // max(n, 1)
    taken = wanted + 1
    while taken > wanted:  # almost never repeated; the set is uniform given its count, so it stays uniform
        taken = sum(
            _bernoulli(bitmap, size, chance, random, torch.int16) for bitmap, size in zip(bitmaps, sizes, strict=True)
        )
    _fill(words, layout, wanted - taken, random)
    if inverted:
        words.bitwise_not_()
        for bitmap, size in zip(bitmaps, sizes, strict=True):
            if size % 64:
                bitmap[-2:] &= pack_bits(torch.ones(size % 64, dtype=torch.bool, device="cpu"))
    return bitmaps


def _fill(words: Tensor, layout: Layout, missing: int, random: _RandomBits) -> None:
    """Sets `missing` more bits, drawn uniformly from the free entries."""
    starts = torch.tensor([0, *layout.sizes], dtype=torch.int64, device="cpu").cumsum(0)
    word_offsets = torch.tensor(layout.word_offsets, dtype=torch.int64, device="cpu")
    while missing:
        drawn = random.below(sum(layout.sizes), missing).unique()
        tensor = torch.searchsorted(starts, drawn, right=True) - 1
        entry = drawn - starts[tensor]
        word, bit = word_offsets[tensor] + (entry >> 5), entry & 31
        free = (words[word] >> bit) & 1 == 0
        words.index_add_(0, word[free], torch.ones_like(word[free], dtype=torch.int32) << bit[free].to(torch.int32))
        missing -= int(free.sum())


def random_sets(
    shapes: Mapping[str, Size],
    *,
    density: float | None,
    k: int | None,
    seed: int,
    per_parameter: Mapping[str, int] | None = None,
    bernoulli: bool = False,
) -> dict[str, IndexSet]:
    """Random index sets over parameters of the given shapes.

    Args:
        shapes: name -> shape.
        density, k, seed, bernoulli: as in `Ticket.random`.
        per_parameter: name -> number of entries, instead of one number over all.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    random = _RandomBits(seed)
    if bernoulli:
        if density is None or k is not None:
            raise ValueError(
                "Ticket.random: bernoulli=True takes density=, the probability of every entry, and no k=, got "
                f"density={density} and k={k}"
            )
        chance = math.floor(as_share(density) * (1 << 32))
        bitmaps = [torch.zeros(bitmap_words(n), dtype=torch.int32, device="cpu") for n in sizes.values()]
        for bitmap, n in zip(bitmaps, sizes.values(), strict=True):
            _bernoulli(bitmap, n, chance, random, torch.int32)
    elif per_parameter is not None:
        bitmaps = [_exactly([n], per_parameter[name], random)[0] for name, n in sizes.items()]
    else:
        bitmaps = _exactly(list(sizes.values()), entries_for(sum(sizes.values()), density=density, k=k), random)
    return {
        name: IndexSet.from_bitmap(words, sizes[name]).compact() for name, words in zip(sizes, bitmaps, strict=True)
    }
