"""Random index sets: exactly k entries, every set of k entries equally likely.

A coin is tossed for every entry, with a chance that leaves a few entries open; these are drawn one by one among the
entries that are still free. Entries are exchangeable whatever the chance, so the set is uniform, and its counts per
parameter follow the multivariate hypergeometric distribution; yet there is no permutation, and no score to rank.
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

_PIECE = 1 << 15  # coins tossed at a time: too few for torch to wait for threads
_DEVIATIONS = 6  # of the number of coins that fall on the right side, left open to be drawn


class _RandomBits:
    """A stream that depends on the seed only: the same on every machine, in serial order whatever the threads."""

    def __init__(self, seed: int) -> None:
        # hashed, so that a ticket is unrelated to weights initialised with the same seed
        key = hashlib.sha256(f"ltp_sparse random ticket {seed}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))

    def integers(self, n: int, dtype: torch.dtype) -> Tensor:
        """[n], uniform over all values of an integer dtype."""
        words = torch.empty(-(-n * dtype.itemsize // 8), dtype=torch.int64, device="cpu")
        return words.random_(-(1 << 63), None, generator=self._generator).view(dtype)[:n]

    def below(self, bound: int, n: int) -> Tensor:
        """int64 [n], uniform over 0..bound-1 (to one part in 2^63 / bound)."""
        return (self.integers(n, torch.int64) & ((1 << 63) - 1)) % bound


def _toss(words: Tensor, n: int, chance: int, random: _RandomBits, dtype: torch.dtype) -> int:
    """Sets each of the n bits of a bitmap with probability chance / 2^(bits of dtype); how many were set."""
    if chance == 0:
        words.zero_()
        return 0
    last = torch.iinfo(dtype).min + chance - 1
    heads = 0
    for start in range(0, n, _PIECE):
        coins = random.integers(min(_PIECE, n - start), dtype) <= last
        words[start // 32 :][: bitmap_words(coins.numel())] = pack_bits(coins)
        heads += int(coins.sum())
    return heads


def _exactly(sizes: Sequence[int], k: int, random: _RandomBits) -> list[Tensor]:
    """int32 bitmaps of tensors of the given sizes, with k bits set in all."""
    n, layout = sum(sizes), Layout(sizes)
    words = torch.zeros(layout.words, dtype=torch.int32, device="cpu")
    bitmaps = list(words.split([bitmap_words(size) for size in sizes]))
    few = min(k, n - k)  # the others are drawn where these are more than half
    chance = max(0, few - _DEVIATIONS * math.isqrt(few)) * (1 << 16) // max(n, 1)
    while True:
        missing = few - sum(
            _toss(bitmap, size, chance, random, torch.int16) for bitmap, size in zip(bitmaps, sizes, strict=True)
        )
        if missing >= 0:  # else once more: a set that is uniform given its count is uniform
            break

    starts = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(0)
    word_offsets = torch.tensor(layout.word_offsets, dtype=torch.int64, device="cpu")
    while missing:
        drawn = random.below(n, missing).unique()
        tensor = torch.searchsorted(starts, drawn, right=True) - 1
        entry = drawn - starts[tensor]
        word, bit = word_offsets[tensor] + (entry >> 5), entry & 31
        free = (words[word] >> bit) & 1 == 0
        words.index_add_(0, word[free], torch.ones_like(word[free], dtype=torch.int32) << bit[free].to(torch.int32))
        missing -= int(free.sum())

    if few < k:
        words.bitwise_not_()
        for bitmap, size in zip(bitmaps, sizes, strict=True):
            if size % 64:
                bitmap[-2:] &= pack_bits(torch.ones(size % 64, dtype=torch.bool, device="cpu"))
    return bitmaps


def random_sets(
    shapes: Mapping[str, Size],
    *,
    density: float | None,
    k: int | None,
    seed: int,
    per_parameter: Mapping[str, int] | None = None,
    bernoulli: bool = False,
) -> dict[str, IndexSet]:
    """Random index sets over parameters of the given shapes; see `Ticket.random`."""
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
            _toss(bitmap, n, chance, random, torch.int32)
    elif per_parameter is not None:
        bitmaps = [_exactly([n], per_parameter[name], random)[0] for name, n in sizes.items()]
    else:
        wanted = entries_for(sum(sizes.values()), density=density, k=k)
        bitmaps = _exactly(list(sizes.values()), wanted, random)
    return {
        name: IndexSet.from_bitmap(words, sizes[name]).compact() for name, words in zip(sizes, bitmaps, strict=True)
    }
