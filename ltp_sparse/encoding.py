"""Index sets and the tile table: how the active entries of parameters are stored.

An `IndexSet` says which entries of one parameter are active, in one of three encodings:

* ``FULL``   every entry; no index at all,
* ``BITMAP`` one bit per entry,
* ``LIST16`` a uint16 position inside its 65,536-entry tile per active entry.

A `TileTable` lays the index sets of many parameters out so that one launch covers all of them.
Everything is plain torch and independent of the device. int16 tensors hold uint16 bits, since torch computes little in
uint16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from ltp_sparse.files import hash_tensor
from ltp_sparse.quantization import state_blocks

TILE = 65_536
"""Entries of a tile: the largest block whose positions fit in 16 bits."""

WORDS_PER_TILE = TILE // 32

LIST16_MAX_DENSITY = 1 / 16
"""Up to this density 16 bits per active entry are fewer bytes than one bit per entry."""

_CHUNK = 16 * TILE  # entries decoded at a time: bounds the temporaries to a few megabytes


class Encoding(IntEnum):
    FULL = 0
    BITMAP = 1
    LIST16 = 2


def bitmap_words(n: int) -> int:
    """int32 words of a bitmap of `n` entries: an even number, so that 64-bit groups never cross tiles or parameters."""
    return 2 * -(-n // 64)


def tiles_of(n: int) -> int:
    """Tiles of a tensor of `n` entries."""
    return -(-n // TILE)


def popcount(words: Tensor) -> Tensor:
    """Number of set bits of every int32 word, as int32."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def smallest_encoding(n: int, k: int) -> Encoding:
    """The encoding of least bytes for `k` active of `n` entries."""
    if k == n:
        return Encoding.FULL
    return Encoding.LIST16 if k <= LIST16_MAX_DENSITY * n else Encoding.BITMAP


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """int64 [256]: the 8 bits of every byte as 8 bytes of 0 or 1, lowest bit first."""
    value = torch.arange(256, dtype=torch.uint8, device="cpu")
    bits = (value[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return bits.contiguous().view(torch.int64).view(256).to(device)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [m] -> int32 [bitmap_words(m)], lowest entry in the lowest bit."""
    padded = torch.zeros(32 * bitmap_words(mask.numel()), dtype=torch.bool, device=mask.device)
    padded[: mask.numel()] = mask
    # eight bytes of 0 or 1 at a time: the product moves byte i to bit 56 + i
    packed = (padded.view(torch.int64) * 0x0102040810204080) >> 56
    return packed.to(torch.uint8).view(torch.int32)


def unpack_bits(words: Tensor) -> Tensor:
    """int32 [w] -> bool [32 w]."""
    return _bits_of_bytes(words.device)[words.view(torch.uint8).to(torch.int64)].view(torch.bool)


def shifted_words(words: Tensor, by: int) -> Tensor:
    """int32 [w] -> int32 [w + 1], every bit moved `by` places up, 0 <= by < 32."""
    shifted = torch.cat([words << by, words.new_zeros(1)])
    if by:
        shifted[1:] |= (words >> (32 - by)) & ((1 << by) - 1)
    return shifted


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


def to_uint16_bits(positions: Tensor) -> Tensor:
    return torch.where(positions >= 32768, positions - 65536, positions).to(torch.int16)


def from_uint16_bits(positions: Tensor) -> Tensor:
    return positions.to(torch.int64) & 0xFFFF


@dataclass(frozen=True, eq=False)
class IndexSet:
    """The active entries of one parameter.

    n:           entries of the parameter
    encoding:    how `data` is to be read
    data:        FULL: empty. BITMAP: int32 [bitmap_words(n)], bit j of word w is entry 32 w + j, bits past n are zero.
                 LIST16: int16 [k] with uint16 bits, positions inside their tiles, ascending
    tile_counts: int64 [ceil(n / TILE)], active entries of every tile
    """

    n: int
    encoding: Encoding
    data: Tensor
    tile_counts: Tensor

    @classmethod
    def full(cls, n: int, device: torch.device | str = "cpu") -> IndexSet:
        counts = torch.full((tiles_of(n),), TILE, dtype=torch.int64, device=device)
        if n % TILE:
            counts[-1] = n % TILE
        return cls(n, Encoding.FULL, torch.empty(0, dtype=torch.int32, device=device), counts)

    @classmethod
    def from_bitmap(cls, words: Tensor, n: int, counts: Tensor | None = None) -> IndexSet:
        """Adopts `words` (int32 [bitmap_words(n)], no copy); a bitmap of ones becomes FULL.

        counts: int64 [tiles_of(n)], active entries of each tile, from one who knows them; None: they are counted
        """
        if words.dtype != torch.int32 or words.shape != (bitmap_words(n),):
            raise ValueError(
                f"IndexSet: a bitmap of {n} entries is int32 [{bitmap_words(n)}], got {words.dtype} {list(words.shape)}"
            )
        if n % 64 and bool(unpack_bits(words[-2:])[n % 64 :].any()):
            raise ValueError(f"IndexSet: the bitmap has bits set past its {n} entries")
        if n == 0:
            return cls.full(0, words.device)
        if counts is None:
            counts = _tile_counts(words, n)
        elif counts.dtype != torch.int64 or not torch.equal(counts, _tile_counts(words, n)):
            raise ValueError("IndexSet: the counts are not int64 [tiles], the bits of each tile of the bitmap")
        if int(counts.sum()) == n:
            return cls.full(n, words.device)
        return cls(n, Encoding.BITMAP, words, counts)

    @classmethod
    def from_mask(cls, mask: Tensor) -> IndexSet:
        """mask: bool of any shape, True for active entries."""
        flat = mask.reshape(-1)
        words = [pack_bits(piece) for piece in flat.split(_CHUNK)]
        empty = torch.empty(0, dtype=torch.int32, device=flat.device)
        return cls.from_bitmap(torch.cat([empty, *words]), flat.numel())

    @classmethod
    def from_indices(cls, indices: Tensor, n: int) -> IndexSet:
        """indices: integers [k], unique, ascending, 0 <= index < n."""
        if indices.numel() and (indices.dim() != 1 or indices.dtype == torch.bool or indices.is_floating_point()):
            raise ValueError(
                f"IndexSet: expected integer indices [k], got {indices.dtype} {list(indices.shape)}; "
                "masks go to from_mask, positions of several dimensions become flat ones first"
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
        counts = torch.bincount(indices // TILE, minlength=tiles_of(n))
        return cls(n, Encoding.LIST16, to_uint16_bits(indices % TILE), counts)

    @classmethod
    def from_list16(cls, positions: Tensor, tile_counts: Tensor, n: int) -> IndexSet:
        """Adopts positions (int16 with uint16 bits) and tile counts (int64), after checking every one of them."""
        fits = tile_counts.shape == (tiles_of(n),)  # before anything of that size is made
        lengths = cls.full(n, positions.device).tile_counts if fits else tile_counts
        if not fits or bool((tile_counts < 0).any() | (tile_counts > lengths).any()):
            raise ValueError(f"IndexSet: the tile counts do not fit a parameter of {n} entries")
        if positions.shape != (int(tile_counts.sum()),):
            raise ValueError(f"IndexSet: expected {int(tile_counts.sum())} positions, got {list(positions.shape)}")
        index_set = cls(n, Encoding.LIST16, positions, tile_counts)
        last = -1
        for _, indices in index_set.chunks():
            if int(indices[0]) <= last or int(indices[-1]) >= n or not bool((indices[1:] > indices[:-1]).all()):
                raise ValueError(f"IndexSet: positions must be ascending inside their tiles and below {n}")
            last = int(indices[-1])
        return index_set

    @property
    def k(self) -> int:
        """Active entries."""
        return self.n if self.encoding is Encoding.FULL else int(self.tile_counts.sum())

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.tile_counts.nbytes

    def __repr__(self) -> str:
        return f"IndexSet({self.k:,} of {self.n:,} entries, {self.encoding.name.lower()}, {self.nbytes:,} bytes)"

    def indices(self) -> Tensor:
        """int64 [k], flat row-major positions, ascending."""
        empty = torch.empty(0, dtype=torch.int64, device=self.data.device)
        return torch.cat([empty, *(indices for _, indices in self.chunks())])

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first slot, int64 indices) in ascending order, with bounded temporaries."""
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
        """bool [n]."""
        if self.encoding is Encoding.FULL:
            return torch.ones(self.n, dtype=torch.bool, device=self.data.device)
        mask = torch.zeros(self.n, dtype=torch.bool, device=self.data.device)
        for _, indices in self.chunks():
            mask[indices] = True
        return mask

    def bitmap(self) -> Tensor:
        """int32 [bitmap_words(n)]."""
        if self.encoding is Encoding.BITMAP:
            return self.data
        words = torch.zeros(bitmap_words(self.n), dtype=torch.int32, device=self.data.device)
        for _, indices in self.chunks():
            # every bit occurs once, so adding is or-ing
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
            return IndexSet(self.n, Encoding.BITMAP, self.bitmap(), self.tile_counts)
        positions = torch.empty(self.k, dtype=torch.int16, device=self.data.device)
        for slot, indices in self.chunks():
            positions[slot : slot + indices.numel()] = to_uint16_bits(indices % TILE)
        return IndexSet(self.n, Encoding.LIST16, positions, self.tile_counts)

    def compact(self) -> IndexSet:
        """The same set in the encoding of least bytes."""
        return self.encoded(smallest_encoding(self.n, self.k))

    def to(self, device: torch.device | str) -> IndexSet:
        return IndexSet(self.n, self.encoding, self.data.to(device), self.tile_counts.to(device))

    def digest(self) -> str:
        """A hash of the set itself: the same for every encoding and device."""
        sha = hashlib.sha256(f"{self.n} ".encode())
        if self.k == self.n:
            sha.update(b"full")
        else:
            hash_tensor(sha, self.bitmap())
        return sha.hexdigest()[:32]

    def combine(self, other: IndexSet, operation: str) -> IndexSet:
        """Set algebra: operation is one of "&", "|", "-", "^"."""
        if self.n != other.n:
            raise ValueError(f"IndexSet: sets of {self.n} and {other.n} entries cannot be combined")
        a, b = self.bitmap(), other.bitmap()
        words = {"&": lambda: a & b, "|": lambda: a | b, "-": lambda: a & ~b, "^": lambda: a ^ b}[operation]()
        return IndexSet.from_bitmap(words, self.n).compact()

    def complement(self) -> IndexSet:
        return IndexSet.full(self.n, self.data.device).combine(self, "-")

    def entries(self, start: int, stop: int) -> IndexSet:
        """The entries start..stop of the parameter, as a set over that range."""
        if (start, stop) == (0, self.n):
            return self
        n = stop - start
        first, shift = divmod(start, 32)
        words = self.bitmap()[first : -(-stop // 32)]
        if shift:
            words = shifted_words(words, 32 - shift)[1:]
        cut = torch.zeros(bitmap_words(n), dtype=torch.int32, device=words.device)
        cut[: -(-n // 32)] = words[: -(-n // 32)]
        if n % 32:
            cut[n // 32] &= (1 << n % 32) - 1
        return IndexSet.from_bitmap(cut, n)

    def rows(self, start: int, stop: int, row: int) -> IndexSet:
        """The entries of rows start..stop of a parameter with `row` entries a row, as a set over that block."""
        return self.entries(start * row, stop * row).compact()


class Column(IntEnum):
    """Columns of `TileTable.tiles`."""

    PARAM = 0
    START = 1
    LENGTH = 2
    ACTIVE = 3
    SLOT = 4
    INDEX = 5
    ENCODING = 6
    BLOCK = 7


@dataclass(frozen=True, eq=False)
class TileTable:
    """The run-time view of index sets over a list of parameters: what a kernel launch reads.

    tiles:     int64 [T, 8], ordered by (parameter, start), columns `Column`. Tiles without active entries do not exist.
               INDEX counts words (BITMAP) or positions (LIST16) from the start of the shared arrays; SLOT is the tile's
               first slot in the packed buffers, which are ordered by (parameter, flat index); BLOCK its first block of
               8-bit moments
    words:     int32 [W], the bitmaps
    ranks:     int16 [W / 2] with uint16 bits, active entries of the tile before each 64-entry group; empty if not built
    positions: int16 [L] with uint16 bits, the lists
    blocks:    blocks of 8-bit moments
    counts:    active entries of every parameter
    sizes:     entries of every parameter
    density:   active entries in parts of all, of the whole that a table was cut from; default: its own
    """

    tiles: Tensor
    words: Tensor
    ranks: Tensor
    positions: Tensor
    blocks: int
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    density: float = -1.0

    def __post_init__(self) -> None:
        if self.density < 0:
            object.__setattr__(self, "density", self.k / max(1, sum(self.sizes)))

    @classmethod
    def build(cls, sets: Sequence[IndexSet], *, device: torch.device | str = "cpu", ranks: bool = False) -> TileTable:
        """Lays out `sets`, parameter by parameter; each is re-encoded to the encoding of least bytes."""
        tiles, words, positions = [], [], []
        slot = n_words = n_positions = 0
        for param, index_set in enumerate(sets):
            index_set = index_set.compact()
            counts = index_set.tile_counts.cpu()
            rows = torch.empty(counts.numel(), len(Column), dtype=torch.int64, device="cpu")
            rows[:, Column.PARAM] = param
            rows[:, Column.START] = TILE * torch.arange(counts.numel(), dtype=torch.int64, device="cpu")
            rows[:, Column.LENGTH] = (index_set.n - rows[:, Column.START]).clamp(max=TILE)
            rows[:, Column.ACTIVE] = counts
            rows[:, Column.SLOT] = slot + counts.cumsum(0) - counts
            rows[:, Column.ENCODING] = index_set.encoding
            if index_set.encoding is Encoding.FULL:
                rows[:, Column.INDEX] = 0
            elif index_set.encoding is Encoding.BITMAP:
                occupied = [w for w, c in zip(index_set.data.split(WORDS_PER_TILE), counts.tolist(), strict=True) if c]
                lengths = (rows[:, Column.LENGTH] + 63) // 64 * 2 * (counts > 0)
                rows[:, Column.INDEX] = n_words + lengths.cumsum(0) - lengths
                words += [w.to(device) for w in occupied]
                n_words += int(lengths.sum())
            else:
                rows[:, Column.INDEX] = n_positions + counts.cumsum(0) - counts
                positions.append(index_set.data.to(device))
                n_positions += index_set.data.numel()
            slot += int(counts.sum())
            tiles.append(rows[counts > 0])
        rows = torch.cat([torch.empty(0, len(Column), dtype=torch.int64, device="cpu"), *tiles])
        blocks = state_blocks(rows[:, Column.ACTIVE])
        rows[:, Column.BLOCK] = blocks.cumsum(0) - blocks
        table = cls(
            tiles=rows.to(device),
            words=torch.cat([torch.empty(0, dtype=torch.int32, device=device), *words]),
            ranks=torch.empty(0, dtype=torch.int16, device=device),
            positions=torch.cat([torch.empty(0, dtype=torch.int16, device=device), *positions]),
            blocks=int(blocks.sum()),
            counts=tuple(index_set.k for index_set in sets),
            sizes=tuple(index_set.n for index_set in sets),
        )
        return table.with_ranks() if ranks else table

    def with_ranks(self) -> TileTable:
        """The same table with the rank directory that GPU kernels read."""
        if self.ranks.numel() == self.words.numel() // 2:
            return self
        counts = popcount(self.words).view(-1, 2).sum(1, dtype=torch.int64)
        before = counts.cumsum(0) - counts
        bitmap = self.tiles[self.tiles[:, Column.ENCODING] == Encoding.BITMAP]
        groups = (bitmap[:, Column.LENGTH] + 63) // 64
        ranks = before - torch.repeat_interleave(before[bitmap[:, Column.INDEX] // 2], groups)
        return replace(self, ranks=to_uint16_bits(ranks))

    @property
    def k(self) -> int:
        """Slots of the packed buffers: active entries of all parameters."""
        return sum(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return sum(t.nbytes for t in (self.tiles, self.words, self.ranks, self.positions))

    def __repr__(self) -> str:
        where = f"{len(self.counts)} parameters, {len(self.tiles):,} tiles"
        return f"TileTable({self.k:,} active entries of {where}, {self.nbytes:,} bytes)"


def tile_indices(tile: Sequence[int], words: Tensor, positions: Tensor) -> Tensor:
    """int64 [ACTIVE]: flat indices of the active entries of one row of `TileTable.tiles` (as Python integers)."""
    _, start, length, active, _, index, encoding, _ = tile
    if encoding == Encoding.FULL:
        return torch.arange(start, start + length, device=words.device, dtype=torch.int64)
    if encoding == Encoding.BITMAP:
        return start + unpack_bits(words[index : index + bitmap_words(length)]).nonzero().view(-1)
    return start + from_uint16_bits(positions[index : index + active])
