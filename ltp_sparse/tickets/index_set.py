"""Index sets: which entries of one parameter are active, in one of three encodings.

* ``FULL``   every entry; no index at all,
* ``BITMAP`` one bit per entry,
* ``LIST16`` a uint16 position inside its 65,536-entry tile per active entry.

All code is plain torch and works on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from ltp_sparse.tickets.bits import (
    TILE,
    WORDS_PER_TILE,
    bitmap_words,
    from_uint16_bits,
    pack_bits,
    popcount,
    position_listers,
    shifted_words,
    tiles_of,
    to_uint16_bits,
    unpack_bits,
)
from ltp_sparse.weights.digests import Hash

LIST16_MAX_DENSITY = 1 / 16
"""Up to this density, 16 bits per active entry take no more space than one bit per entry."""

_CHUNK = 16 * TILE  # entries decoded at a time, which limits temporaries to a few megabytes


class Encoding(IntEnum):
    """How an index set is stored; the numbers are those of the ENCODING column of a tile table."""

    FULL = 0
    BITMAP = 1
    LIST16 = 2


def _tile_counts(words: Tensor, n: int) -> Tensor:
    """int64 [tiles_of(n)]: set bits of each tile of a bitmap."""
    counts = torch.zeros(tiles_of(n), dtype=torch.int64, device=words.device)
    for first, piece in zip(range(0, counts.numel(), 16), words.split(16 * WORDS_PER_TILE), strict=True):
        per_word = popcount(piece)
        whole = per_word.numel() // WORDS_PER_TILE
        tail = per_word[whole * WORDS_PER_TILE :]
        counts[first : first + whole] = per_word[: whole * WORDS_PER_TILE].view(whole, WORDS_PER_TILE).sum(1)
        if tail.numel():
            counts[first + whole] = tail.sum()
    return counts


@dataclass(frozen=True, eq=False)
class IndexSet:
    """The active entries of one parameter.

    Attributes:
        n: entries of the parameter.
        encoding: the encoding of `data`.
        data: FULL: empty. BITMAP: int32 [bitmap_words(n)], bit j of word w is entry 32 w + j, bits past n are zero.
            LIST16: int16 [k] with uint16 bits, positions inside their tiles, ascending.
        tile_counts: int64 [ceil(n / TILE)], active entries of every tile.
        k: active entries.
    """

    n: int
    encoding: Encoding
    data: Tensor
    tile_counts: Tensor
    k: int

    @classmethod
    def full(cls, n: int, device: torch.device | str = "cpu") -> IndexSet:
        """The set of all n entries of a parameter."""
        counts = torch.full((tiles_of(n),), TILE, dtype=torch.int64, device=device)
        if n % TILE:
            counts[-1] = n % TILE
        return cls(n, Encoding.FULL, torch.empty(0, dtype=torch.int32, device=device), counts, n)

    @classmethod
    def empty(cls, n: int, device: torch.device | str = "cpu") -> IndexSet:
        """The set of no entry of a parameter with n entries."""
        if n == 0:
            return cls.full(0, device)
        counts = torch.zeros(tiles_of(n), dtype=torch.int64, device=device)
        return cls(n, Encoding.LIST16, torch.empty(0, dtype=torch.int16, device=device), counts, 0)

    @classmethod
    def from_bitmap(cls, words: Tensor, n: int) -> IndexSet:
        """A set from a bitmap, which it uses without a copy. A bitmap of ones becomes FULL.

        Args:
            words: int32 [bitmap_words(n)], without bits past n.
            n: entries of the parameter.

        Raises:
            ValueError: dtype or shape differ, or there are bits past n.
        """
        if words.dtype != torch.int32 or words.shape != (bitmap_words(n),):
            raise ValueError(
                f"IndexSet: a bitmap of {n} entries is int32 [{bitmap_words(n)}], got {words.dtype} {list(words.shape)}"
            )
        if n % 64 and bool(unpack_bits(words[-2:])[n % 64 :].any()):
            raise ValueError(f"IndexSet: the bitmap has bits set past its {n} entries")
        if n == 0:
            return cls.full(0, words.device)
        counts = _tile_counts(words, n)
        return cls.of_counted(words, n, counts, int(counts.sum()))

    @classmethod
    def of_counted(cls, words: Tensor, n: int, counts: Tensor, k: int) -> IndexSet:
        """Like `from_bitmap`, for callers that know the counts. Nothing is checked.

        Args:
            words: int32 [bitmap_words(n)], without bits past n.
            n: entries of the parameter.
            counts: int64 [tiles_of(n)], active entries of each tile.
            k: their sum.
        """
        return cls.full(n, words.device) if k == n else cls(n, Encoding.BITMAP, words, counts, k)

    @classmethod
    def from_mask(cls, mask: Tensor) -> IndexSet:
        """The active entries of a bool mask of any shape."""
        flat = mask.reshape(-1)
        words = [pack_bits(piece) for piece in flat.split(_CHUNK)]
        empty = torch.empty(0, dtype=torch.int32, device=flat.device)
        return cls.from_bitmap(torch.cat([empty, *words]), flat.numel())

    @classmethod
    def from_indices(cls, indices: Tensor, n: int) -> IndexSet:
        """A set from indices.

        Args:
            indices: integers [k], unique, ascending, 0 <= index < n.
            n: entries of the parameter.

        Raises:
            ValueError: they are not.
        """
        if indices.numel() and (indices.dim() != 1 or indices.dtype == torch.bool or indices.is_floating_point()):
            raise ValueError(
                f"IndexSet: expected integer indices [k], got {indices.dtype} {list(indices.shape)}; "
                "use from_mask for masks; flatten positions of several dimensions first"
            )
        indices = indices.to(torch.int64)
        if indices.numel():
            if int(indices[0]) < 0 or int(indices[-1]) >= n:
                raise ValueError(
                    f"IndexSet: indices must lie in [0, {n}), got {int(indices.min())} to {int(indices.max())}"
                )
            if not bool((indices[1:] > indices[:-1]).all()):
                raise ValueError("IndexSet: indices must be unique and ascending; sort them and drop duplicates")
        if indices.numel() == n:
            return cls.full(n, indices.device)
        ends = TILE * torch.arange(1, tiles_of(n) + 1, dtype=torch.int64, device=indices.device)
        slots = torch.searchsorted(indices, ends)
        return cls(n, Encoding.LIST16, to_uint16_bits(indices), slots.diff(prepend=slots.new_zeros(1)), indices.numel())

    @classmethod
    def from_list16(cls, positions: Tensor, tile_counts: Tensor, n: int) -> IndexSet:
        """A set from a list, which it uses without a copy after checking all of it.

        Args:
            positions: int16 [k] with uint16 bits, the positions inside the tiles.
            tile_counts: int64 [tiles_of(n)], active entries of each tile.
            n: entries of the parameter.

        Raises:
            ValueError: they do not fit each other, or positions are not ascending.
        """
        fits = tile_counts.shape == (tiles_of(n),)  # checked before memory of that size is allocated
        lengths = cls.full(n, positions.device).tile_counts if fits else tile_counts
        if not fits or bool((tile_counts < 0).any() | (tile_counts > lengths).any()):
            raise ValueError(f"IndexSet: the tile counts do not fit a parameter of {n} entries")
        k = int(tile_counts.sum())
        if positions.shape != (k,):
            raise ValueError(f"IndexSet: expected {k} positions, got {list(positions.shape)}")
        index_set = cls(n, Encoding.LIST16, positions, tile_counts, k)
        last = -1
        for _, indices in index_set.chunks():
            if int(indices[0]) <= last or int(indices[-1]) >= n or not bool((indices[1:] > indices[:-1]).all()):
                raise ValueError(f"IndexSet: positions must be ascending inside their tiles and below {n}")
            last = int(indices[-1])
        return index_set

    @property
    def nbytes(self) -> int:
        """Bytes of index and counts."""
        return self.data.nbytes + self.tile_counts.nbytes

    def __repr__(self) -> str:
        return f"IndexSet({self.k:,} of {self.n:,} entries, {self.encoding.name.lower()}, {self.nbytes:,} bytes)"

    def indices(self) -> Tensor:
        """int64 [k], flat row-major positions, ascending."""
        empty = torch.empty(0, dtype=torch.int64, device=self.data.device)
        return torch.cat([empty, *(indices for _, indices in self.chunks())])

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first slot, int64 indices) in ascending order, some tiles at a time."""
        slot = 0
        tiles = _CHUNK // TILE
        for tile in range(0, self.tile_counts.numel(), tiles):
            start, stop = tile * TILE, min((tile + tiles) * TILE, self.n)
            if self.encoding is Encoding.FULL:
                indices = torch.arange(start, stop, device=self.data.device, dtype=torch.int64)
            elif self.encoding is Encoding.BITMAP:
                words = self.data[start // 32 : start // 32 + bitmap_words(stop - start)]
                indices = unpack_bits(words).nonzero().view(-1).add_(start)
            else:
                counts = self.tile_counts[tile : tile + tiles]
                bases = start + TILE * torch.arange(counts.numel(), device=counts.device, dtype=torch.int64)
                positions = self.data[slot : slot + int(counts.sum())]
                indices = torch.repeat_interleave(bases, counts) + from_uint16_bits(positions)
            if indices.numel():
                yield slot, indices
            slot += indices.numel()

    def mask(self) -> Tensor:
        """bool [n], True for active entries."""
        if self.encoding is Encoding.FULL:
            return torch.ones(self.n, dtype=torch.bool, device=self.data.device)
        mask = torch.zeros(self.n, dtype=torch.bool, device=self.data.device)
        if self.encoding is Encoding.BITMAP:
            for piece, words in zip(mask.split(_CHUNK), self.data.split(_CHUNK // 32), strict=True):
                piece.copy_(unpack_bits(words)[: piece.numel()])
            return mask
        for _, indices in self.chunks():
            mask[indices] = True
        return mask

    def bitmap(self) -> Tensor:
        """int32 [bitmap_words(n)], a bit per entry; not a copy if the set is stored as a bitmap."""
        if self.encoding is Encoding.BITMAP:
            return self.data
        words = torch.zeros(bitmap_words(self.n), dtype=torch.int32, device=self.data.device)
        for _, indices in self.chunks():
            # no bit is set twice, so a sum is a bitwise or
            bits = torch.ones_like(indices, dtype=torch.int32) << (indices & 31).to(torch.int32)
            words.index_add_(0, indices >> 5, bits)
        return words

    def encoded(self, encoding: Encoding) -> IndexSet:
        """The same set in another encoding."""
        if encoding is self.encoding:
            return self
        if encoding is Encoding.FULL:
            if self.k < self.n:
                raise ValueError(f"IndexSet: {self!r} cannot be stored as {encoding.name}")
            return IndexSet.full(self.n, self.data.device)
        if encoding is Encoding.BITMAP:
            return IndexSet(self.n, Encoding.BITMAP, self.bitmap(), self.tile_counts, self.k)
        positions = torch.empty(self.k, dtype=torch.int16, device=self.data.device)
        fill = position_listers.get(self.data.device.type) if self.encoding is Encoding.BITMAP else None
        if fill is None or not fill(self.data, positions):
            for slot, indices in self.chunks():
                positions[slot : slot + indices.numel()] = to_uint16_bits(indices)
        return IndexSet(self.n, Encoding.LIST16, positions, self.tile_counts, self.k)

    def compact(self) -> IndexSet:
        """The same set in its smallest encoding."""
        smallest = Encoding.LIST16 if self.k <= LIST16_MAX_DENSITY * self.n else Encoding.BITMAP
        return self.encoded(Encoding.FULL if self.k == self.n else smallest)

    def to(self, device: torch.device | str) -> IndexSet:
        """The same set on a device."""
        return replace(self, data=self.data.to(device), tile_counts=self.tile_counts.to(device))

    def digest(self, like: str | None = None) -> str:
        """The digest of the set, which does not depend on encoding and device.

        Args:
            like: a digest that it will be compared with (`weights.digests.Hash`).
        """
        found = Hash(like).update(f"{self.n} ".encode())
        return found.update(b"full" if self.k == self.n else self.bitmap()).digest()

    def combine(self, other: IndexSet, operation: str) -> IndexSet:
        """The set operation "&", "|", "-" or "^" with another set over as many entries."""
        if self.n != other.n:
            raise ValueError(f"IndexSet: sets of {self.n} and {other.n} entries cannot be combined")
        a, b = self.bitmap(), other.bitmap()
        words = {"&": lambda: a & b, "|": lambda: a | b, "-": lambda: a & ~b, "^": lambda: a ^ b}[operation]()
        return IndexSet.from_bitmap(words, self.n).compact()

    def complement(self) -> IndexSet:
        """The entries that are not in this set."""
        return IndexSet.full(self.n, self.data.device).combine(self, "-")

    def slots_at(self, entries: Tensor) -> Tensor:
        """Counts the active entries before some entries, which is the slot of the next active one.

        Args:
            entries: int64 [m], each in [0, n].

        Returns:
            int64 [m], on the device of `entries`.
        """
        entries, device = entries.to(self.data.device), entries.device
        if self.encoding is Encoding.FULL:
            return entries.to(device)
        first = torch.cat([self.tile_counts.new_zeros(1), self.tile_counts.cumsum(0)])  # slot of every tile
        tiles = entries // TILE
        low = first[tiles]
        if self.encoding is Encoding.BITMAP:
            for number, (tile, rest) in enumerate(zip(tiles.tolist(), (entries % TILE).tolist(), strict=True)):
                words = self.data[tile * WORDS_PER_TILE :][: bitmap_words(rest)]
                low[number] += unpack_bits(words)[:rest].sum()
            return low.to(device)
        high = first[(tiles + 1).clamp(max=first.numel() - 1)]
        for _ in range(TILE.bit_length() if self.k else 0):  # bisection in all tiles at once
            middle = (low + high) // 2
            below = from_uint16_bits(self.data[middle.clamp(max=self.k - 1)]) < entries % TILE
            low, high = torch.where(below & (low < high), middle + 1, low), torch.where(below, high, middle)
        return low.to(device)

    def entries(self, start: int, stop: int) -> IndexSet:
        """The active entries in start..stop, as a set over that range, with its own memory."""
        if (start, stop) == (0, self.n):
            return self
        n = stop - start
        if self.encoding is Encoding.FULL or n == 0:
            return IndexSet.full(n, self.data.device)
        return self._cut_list(start, n) if self.encoding is Encoding.LIST16 else self._cut_bitmap(start, n)

    def _cut_bitmap(self, start: int, n: int) -> IndexSet:
        """The set over `n` entries of a bitmap from `start` on."""
        first, shift = divmod(start, 32)
        words = self.data[first : -(-(start + n) // 32)]
        if shift:
            words = shifted_words(words, 32 - shift)[1:]
        cut = torch.zeros(bitmap_words(n), dtype=torch.int32, device=words.device)
        cut[: -(-n // 32)] = words[: -(-n // 32)]
        if n % 32:
            cut[n // 32] &= (1 << n % 32) - 1
        return IndexSet.from_bitmap(cut, n)

    def _cut_list(self, start: int, n: int) -> IndexSet:
        """The set over `n` entries of a list from `start` on."""
        bounds = start + TILE * torch.arange(tiles_of(n) + 1, dtype=torch.int64, device=self.data.device)
        slots = self.slots_at(bounds.clamp(max=start + n))
        first, last = int(slots[0]), int(slots[-1])
        if last - first == n:
            return IndexSet.full(n, self.data.device)
        by = start % TILE  # positions wrap around as those of the tiles do
        positions = self.data[first:last] - (by - TILE if by >= TILE // 2 else by)
        return IndexSet(n, Encoding.LIST16, positions, slots.diff(), last - first)
