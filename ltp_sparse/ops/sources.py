"""The pairs of tensors that a selection reads, in memory or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ltp_sparse.backends import Backend, reference
from ltp_sparse.backends.arguments import Sample, Tensors
from ltp_sparse.ops.staging import Piece, staged
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE, tiles_of
from ltp_sparse.tickets.layout import Layout
from ltp_sparse.weights.checkpoints import VIEW, CheckpointTensor, Readable
from ltp_sparse.weights.tensors import flat_piece


class Chunk(NamedTuple):
    """Whole tiles of consecutive tensors that are in memory at the same time.

    Attributes:
        tensors: positions of the tensors.
        initial: contiguous pieces; empty for zeros.
        tuned: contiguous pieces.
        word_offsets: where the bitmap of each piece starts.
        tiles: the tiles of all pieces, in order.
        digests: int64 [tiles, 2], to be filled with the digests of the initial tiles; None if nobody wants them.
    """

    tensors: list[int]
    initial: list[Tensor]
    tuned: list[Tensor]
    word_offsets: list[int]
    tiles: slice
    digests: Tensor | None = None


class Source(Protocol):
    """Pairs of tensors to select from.

    Attributes:
        sizes: the number of entries of each pair.
        device: where the passes run.
        can_sample: whether `sample` works, so that a selection may begin with a sample.
    """

    sizes: list[int]
    device: torch.device
    can_sample: bool

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        """Yields the given tensors, or pieces of them, for the calls of one pass. `tensors` is ascending."""

    def sample(self, passes: Backend, tensors: Tensor, runs: Tensor, keys: Tensor) -> None:
        """Writes the keys of runs of neighbouring entries.

        Args:
            passes: the backend.
            tensors, runs, keys: as in the record `Sample` of `backends/arguments.py`.
        """


class TensorSource:
    """Tensors in memory. Those that are not contiguous are copied piece by piece, never whole.

    Args:
        initial: tensors before tuning; empty for zeros.
        tuned: tensors after it.
        digests: int64 [T, 2], which the band pass fills with the digests of the tiles of `initial`, or None.

    Attributes:
        contiguous: whether every tensor is contiguous.
    """

    PIECE = 8 * TILE
    can_sample = True

    def __init__(self, initial: Sequence[Tensor], tuned: Sequence[Tensor], digests: Tensor | None = None) -> None:
        self.initial, self.tuned = list(initial), list(tuned)
        self.sizes = [t.numel() for t in tuned]
        self.device = tuned[0].device if tuned else torch.device("cpu")
        self.layout, self.digests = Layout(self.sizes), digests
        self.contiguous = all(map(Tensor.is_contiguous, (*initial, *tuned)))

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        """The given tensors in ascending order: contiguous neighbours together, strided tensors in pieces."""
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
        """`sample_keys` by the backend, or by the reference if a tensor is not contiguous."""
        sample = Sample(Tensors(self.initial), Tensors(self.tuned), tensors, runs, keys)
        (passes if self.contiguous else reference).sample_keys(sample)


def _piece_of(
    layout: Layout, tensor: int, start: int, initial: list[Tensor], tuned: Tensor, digests: Tensor | None
) -> Chunk:
    """The chunk of a piece of one tensor, which starts at entry `start`, a whole number of tiles."""
    first = layout.tile_offsets[tensor] + start // TILE
    words = layout.word_offsets[tensor] + start // TILE * WORDS_PER_TILE
    tiles = slice(first, first + tiles_of(tuned.numel()))
    return Chunk([tensor], initial, [tuned], [words], tiles, None if digests is None else digests[tiles])


_PIECE = 1 << 19  # entries copied at a time: 2 MB of each float32 tensor

_KEPT = 384 << 20  # up to so many bytes of both sides stay mapped between passes; the page cache can drop them

_SAMPLED = 64 << 20  # bytes of both sides that are mapped at a time for samples, if there are more than that

_STAGED = 1 << 23  # entries sent to a GPU at a time: 32 MB of a float32 tensor, page-locked in two buffers


@dataclass(frozen=True)
class Reader:
    """A tensor that is read piece by piece.

    Attributes:
        n: number of entries.
        read: (start, stop) -> these entries in row-major order, contiguous.
        device: the device of what is read.
        copies: whether a piece has memory of its own.
        release: called with (start, stop) when a piece is not needed any more, or None. A `StreamSource` does not call
            it if all its pairs are small.
        itemsize: bytes per entry.
    """

    n: int
    read: Callable[[int, int], Tensor]
    device: torch.device
    copies: bool = True
    release: Callable[[int, int], None] | None = None
    itemsize: int = 4

    @classmethod
    def of(cls, tensor: Readable) -> Reader:
        """A reader of a tensor in memory, or of a checkpoint's tensor on disk."""
        n, itemsize = tensor.numel(), tensor.dtype.itemsize
        if isinstance(tensor, CheckpointTensor):
            return cls(n, tensor.piece, torch.device("cpu"), False, tensor.release, itemsize)
        return cls(n, partial(flat_piece, tensor), tensor.device, not tensor.is_contiguous(), None, itemsize)

    def rounded(self, dtype: torch.dtype | None) -> Reader:
        """A reader of the same entries rounded to a dtype; None leaves them as they are."""
        if dtype is None:
            return self
        read = self.read
        return replace(self, read=lambda start, stop: read(start, stop).to(dtype), copies=True, itemsize=dtype.itemsize)

    def part(self, start: int, stop: int) -> Reader:
        """A reader of the entries start..stop as if they were a tensor."""
        release = self.release
        return replace(
            self,
            n=stop - start,
            read=lambda a, b: self.read(start + a, start + b),
            release=release and (lambda a, b: release(start + a, start + b)),
        )


class StreamSource:
    """Pairs of tensors that every pass reads piece by piece.

    Args:
        initial: a reader per tensor; empty for zeros.
        tuned: a reader per tensor.
        device: where the passes run. Entries read elsewhere are copied there, one piece ahead.
        progress: an object whose `update` is called with the number of bytes read.
        digests: as in `TensorSource`, on `device`.

    Attributes:
        nbytes: bytes of one pass.
        can_sample: whether single entries can be read in place.
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
        readers = (*self.initial, *self.tuned)
        self.nbytes = sum(reader.n * reader.itemsize for reader in readers)
        self.can_sample = not any(reader.copies or reader.device != self.device for reader in readers)

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        pairs = {t: [side[t] for side in (self.initial, self.tuned) if side] for t in tensors}
        elsewhere = any(reader.device != self.device for pair in pairs.values() for reader in pair)
        pieces = []
        for tensor, pair in pairs.items():
            size = _STAGED if elsewhere else _PIECE if any(reader.copies for reader in pair) else VIEW
            n = self.sizes[tensor]
            pieces += [(tensor, start, min(start + size, n)) for start in range(0, n, size)]
        release = self._release if self.nbytes > _KEPT else lambda *_: None
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


def _in_place(pieces: Iterable[Piece]) -> Iterator[list[Tensor]]:
    for piece in pieces:
        yield list(piece.read())
        piece.release()
