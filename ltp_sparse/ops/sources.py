"""What a selection reads: pairs of tensors, in memory or read piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ltp_sparse.backends import Backend, reference
from ltp_sparse.backends.arguments import Sample, Tensors
from ltp_sparse.ops.staging import Piece, staged
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE, tiles_of
from ltp_sparse.tickets.layout import Layout
from ltp_sparse.weights.checkpoints import VIEW, CheckpointTensor, Readable
from ltp_sparse.weights.tensors import flat_piece


@dataclass
class Chunk:
    """Whole tiles of consecutive tensors that are in memory at once.

    tensors:      positions of the tensors
    initial:      contiguous pieces, or nothing: zeros
    tuned:        contiguous pieces
    word_offsets: where the bitmap of each piece starts
    tiles:        the tiles of all pieces, in order
    digests:      where those of these tiles of the initial tensors go, if they are asked for: int64 [tiles, 2]
    """

    tensors: list[int]
    initial: list[Tensor]
    tuned: list[Tensor]
    word_offsets: list[int]
    tiles: slice
    digests: Tensor | None = None


class Source(Protocol):
    """Pairs of tensors to select from, in memory or not."""

    sizes: list[int]
    device: torch.device

    @property
    def can_sample(self) -> bool: ...
    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]: ...
    def sample(self, passes: Backend, tensors: Tensor, runs: Tensor, keys: Tensor) -> None: ...


class TensorSource:
    """Tensors in memory. Those that are not contiguous are copied piece by piece, never whole.

    Args:
        initial, tuned: pairs of tensors; `initial` may be empty: zeros.
        digests: int64 [T, 2], to be filled with those of the tiles of `initial` when a band pass reads them, or None.
    """

    PIECE = 8 * TILE
    can_sample = True

    def __init__(self, initial: Sequence[Tensor], tuned: Sequence[Tensor], digests: Tensor | None = None) -> None:
        self.initial, self.tuned = list(initial), list(tuned)
        self.sizes = [t.numel() for t in tuned]
        self.device = tuned[0].device if tuned else torch.device("cpu")
        self.layout, self.digests = Layout(self.sizes), digests

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        """The given tensors, in ascending order: runs of neighbours at once, strided ones in pieces."""
        run: list[int] = []
        for tensor in tensors:
            sides = (self.initial, self.tuned) if self.initial else (self.tuned,)
            whole = all(side[tensor].is_contiguous() for side in sides)
            if run and not (whole and tensor == run[-1] + 1):
                yield self._whole(run)
                run = []
            if whole:
                run.append(tensor)
            else:
                yield from self._pieces(tensor)
        if run:
            yield self._whole(run)

    def _whole(self, tensors: list[int]) -> Chunk:
        layout = self.layout
        tiles = slice(layout.tile_offsets[tensors[0]], layout.tile_offsets[tensors[-1] + 1])
        return Chunk(
            tensors,
            [self.initial[t] for t in tensors] if self.initial else [],
            [self.tuned[t] for t in tensors],
            [layout.word_offsets[t] for t in tensors],
            tiles,
            None if self.digests is None else self.digests[tiles],
        )

    def _pieces(self, tensor: int) -> Iterator[Chunk]:
        for start in range(0, self.sizes[tensor], self.PIECE):
            stop = min(start + self.PIECE, self.sizes[tensor])
            initial = [flat_piece(self.initial[tensor], start, stop)] if self.initial else []
            tuned = flat_piece(self.tuned[tensor], start, stop)
            yield _piece_of(self.layout, tensor, start, initial, tuned, self.digests)

    def sample(self, passes: Backend, tensors: Tensor, runs: Tensor, keys: Tensor) -> None:
        """`sample_keys` of the backend, which wants contiguous tensors, or of the reference."""
        contiguous = all(t.is_contiguous() for t in (*self.initial, *self.tuned))
        sample = Sample(Tensors(self.initial), Tensors(self.tuned), tensors, runs, keys)
        (passes if contiguous else reference).sample_keys(sample)


def _piece_of(
    layout: Layout, tensor: int, start: int, initial: list[Tensor], tuned: Tensor, digests: Tensor | None
) -> Chunk:
    """The chunk of a piece of one tensor, which starts at entry `start`, a whole number of tiles."""
    first = layout.tile_offsets[tensor] + start // TILE
    words = layout.word_offsets[tensor] + start // TILE * WORDS_PER_TILE
    tiles = slice(first, first + tiles_of(tuned.numel()))
    return Chunk([tensor], initial, [tuned], [words], tiles, None if digests is None else digests[tiles])


_PIECE = 1 << 19  # entries copied at a time: 2 MB of each float32 tensor

_KEPT = 384 << 20  # bytes of both sides that stay mapped from one reading to the next: page cache, taken back at need

_SAMPLED = 64 << 20  # bytes of both sides that samples are taken from at a time, if they may not

_STAGED = 1 << 23  # entries sent to a GPU at a time: 32 MB of each float32 tensor, twice page-locked


@dataclass(frozen=True)
class Reader:
    """A tensor that is read piece by piece.

    n:        entries
    read:     (start, stop) -> these entries of the row-major order, contiguous
    device:   where these are
    copies:   whether a piece takes memory of its own
    release:  told (start, stop) when a piece is no longer needed, if given; not by a `StreamSource` of small pairs
    itemsize: bytes of an entry
    """

    n: int
    read: Callable[[int, int], Tensor]
    device: torch.device
    copies: bool = True
    release: Callable[[int, int], None] | None = None
    itemsize: int = 4

    @classmethod
    def of(cls, tensor: Readable) -> Reader:
        """Reads a tensor where it is: in memory, or on disk through the CPU's."""
        n, itemsize = tensor.numel(), tensor.dtype.itemsize
        if isinstance(tensor, CheckpointTensor):
            return cls(n, tensor.piece, torch.device("cpu"), False, tensor.release, itemsize)
        read = partial(flat_piece, tensor)
        return cls(n, read, tensor.device, not tensor.is_contiguous(), None, itemsize)

    def rounded(self, dtype: torch.dtype | None) -> Reader:
        """Reads the entries rounded to a dtype; None: as they are."""
        if dtype is None:
            return self
        read = self.read
        return replace(self, read=lambda start, stop: read(start, stop).to(dtype), copies=True, itemsize=dtype.itemsize)

    def part(self, start: int, stop: int) -> Reader:
        """Entries start..stop as a tensor of their own."""
        release = self.release
        return replace(
            self,
            n=stop - start,
            read=lambda a, b: self.read(start + a, start + b),
            release=release and (lambda a, b: release(start + a, start + b)),
        )


class StreamSource:
    """Pairs of tensors that are read piece by piece, anew in every pass; samples are taken where the entries lie.

    Args:
        initial, tuned: a reader per tensor; `initial` may be empty: zeros.
        device: where the passes run. What is read elsewhere is copied there, a piece ahead.
        progress: its `update` is told the bytes that were read.
        digests: as of `TensorSource`, on `device`.
    """

    def __init__(
        self,
        initial: Sequence[Reader],
        tuned: Sequence[Reader],
        device: torch.device | str = "cpu",
        progress: Any = None,
        digests: Tensor | None = None,
    ) -> None:
        self.initial, self.tuned = list(initial), list(tuned)
        self.sizes = [reader.n for reader in self.tuned]
        self.device = torch.device(device)
        self.layout = Layout(self.sizes)
        self.progress, self.digests = progress, digests

    @property
    def nbytes(self) -> int:
        """Bytes of one pass."""
        return sum(reader.n * reader.itemsize for reader in (*self.initial, *self.tuned))

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        pairs = {t: [side[t] for side in (self.initial, self.tuned) if side] for t in tensors}
        elsewhere = any(reader.device != self.device for pair in pairs.values() for reader in pair)
        pieces = []
        for tensor, pair in pairs.items():
            size = _STAGED if elsewhere else _PIECE if any(reader.copies for reader in pair) else VIEW
            n = self.sizes[tensor]
            pieces += [(tensor, start, min(start + size, n)) for start in range(0, n, size)]
        release = self._release if self.nbytes > _KEPT else _nothing
        read = (
            Piece(partial(_read, pairs[tensor], start, stop), partial(release, tensor, start, stop))
            for tensor, start, stop in pieces
        )
        room = [max(min(r.n, _STAGED) * r.itemsize for r in side) for side in zip(*pairs.values(), strict=True)]
        found = staged(read, room, self.device) if elsewhere else _in_place(read)
        for (tensor, start, _), (*initial, tuned) in zip(pieces, found, strict=True):
            yield _piece_of(self.layout, tensor, start, initial, tuned, self.digests)
            if self.progress is not None:
                self.progress.update(sum(t.nbytes for t in (*initial, tuned)))

    @property
    def can_sample(self) -> bool:
        """Whether all entries can be looked at where they lie."""
        return not any(reader.copies or reader.device != self.device for reader in (*self.initial, *self.tuned))

    def sample(self, passes: Backend, tensors: Tensor, runs: Tensor, keys: Tensor) -> None:
        sides = [Tensors(reader.read(0, reader.n) for reader in side) for side in (self.initial, self.tuned)]
        keep = self.nbytes <= _KEPT
        some = len(runs) if keep else max(1, len(runs) * _SAMPLED // self.nbytes)
        for which, where, found in zip(tensors.split(some), runs.split(some), keys.split(some), strict=True):
            passes.sample_keys(Sample(sides[0], sides[1], which, where, found))
            if not keep:
                for tensor in which.unique_consecutive().tolist():
                    self._release(tensor, 0, self.sizes[tensor])

    def _release(self, tensor: int, start: int, stop: int) -> None:
        for side in (self.initial, self.tuned):
            if side and (release := side[tensor].release) is not None:
                release(start, stop)


def _read(pair: Sequence[Reader], start: int, stop: int) -> list[Tensor]:
    return [reader.read(start, stop) for reader in pair]


def _nothing(*_: int) -> None:
    pass


def _in_place(pieces: Iterable[Piece]) -> Iterator[list[Tensor]]:
    for piece in pieces:
        yield list(piece.read())
        piece.release()
