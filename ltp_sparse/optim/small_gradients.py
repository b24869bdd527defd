"""Small dense gradients wait, so that one call packs many of them: a call costs more than their copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ltp_sparse import ops
from ltp_sparse.tickets.tile_table import Column, TileTable
from ltp_sparse.weights.sharding import is_sharded

WAITING = 1 << 18
"""The most bytes of dense gradients that wait, and that one call packs."""


@dataclass(eq=False)
class _Batch:
    """A range of parameters; the gradients of the small ones among them are packed together.

    Attributes:
        table: the tiles of these parameters.
        slots: their part of the flat buffer.
        copied: place in the range -> gradient to copy to the slots.
        added: place in the range -> gradient to add to the slots.
    """

    table: TileTable
    slots: Tensor
    copied: dict[int, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)

    def pack_(self) -> None:
        for grads, accumulate in ((self.copied, False), (self.added, True)):
            if grads:
                listed = list(map(grads.get, range(len(self.table.counts))))
                grads.clear()
                ops.masked_pack_(listed, self.slots, self.table, accumulate=accumulate)


class SmallGradients:
    """Dense gradients that are not in the flat buffer yet. Readers of the buffer must call `pack_` first.

    They wait until their storage takes more than `WAITING` bytes. Gradients do not wait if their parameter is sharded,
    because FSDP2 computes them on a stream of its own, under compiled autograd, or while a CUDA graph is captured.

    Args:
        params: the parameters of the table, or none if no gradient is to wait.
        buffer: float32 [table.k], the flat buffer.
        table: the tiles of the parameters.

    Attributes:
        waiting: the batches with waiting gradients, as the keys.
    """

    def __init__(self, params: Sequence[Tensor], buffer: Tensor, table: TileTable) -> None:
        self._batches: dict[int, tuple[_Batch, int]] = {}
        self._dtype = params[0].dtype if params else None
        small = [param.nbytes <= WAITING and not is_sharded(param) for param in params]
        ranges = list(_ranges([param.nbytes if waits else 0 for param, waits in zip(params, small, strict=True)]))
        for numbers, part in zip(ranges, subtables(table, ranges), strict=True):
            slot = sum(table.counts[: numbers.start])
            batch = _Batch(part, buffer[slot : slot + part.k])
            members = [number for number in numbers if small[number]]
            if len(members) > 1:
                self._batches |= {number: (batch, number - numbers.start) for number in members}
        self.waiting: dict[_Batch, None] = {}  # a set in the order of arrival
        self._bytes = 0
        self._stream: torch.cuda.Stream | None = None

    def take(self, number: int, grad: Tensor, *, add: bool, own: bool) -> bool:
        """Lets a gradient wait if it can.

        Args:
            number: the parameter's place in the list.
            grad: its gradient, in its shape.
            add: whether to add to the slots instead of overwriting them.
            own: whether no other code writes into `grad`. Otherwise a copy waits.

        Returns:
            False if the gradient cannot wait, so that the caller must pack it.
        """
        batch, place = self._batches.get(number, (None, 0))
        if batch is None or torch.compiler.is_compiling():
            return False
        if place in batch.copied or place in batch.added:
            self.pack_()
        if type(grad) is not Tensor or grad.layout != torch.strided or grad.dtype != self._dtype:
            return False
        size = grad.untyped_storage().nbytes() if own else grad.nbytes
        if size > WAITING:  # a view of a large tensor, which it would keep alive
            return False
        if grad.is_cuda and not self._is_on_stream(torch.cuda.current_stream(grad.device)):
            return False
        (batch.added if add else batch.copied)[place] = grad if own else grad.clone()
        self.waiting[batch] = None
        self._bytes += size
        if self._bytes > WAITING:
            self.pack_()
        return True

    def _is_on_stream(self, stream: torch.cuda.Stream) -> bool:
        """Whether a gradient computed on this stream can wait; all waiting gradients are of one stream."""
        if torch.cuda.is_current_stream_capturing():  # packing uploads a list of addresses, which a capture forbids
            return False
        if stream != self._stream:
            self.pack_()
            self._stream = stream
        return True

    def pack_(self) -> None:
        """Packs all waiting gradients on the stream that has computed them; the current stream waits for it."""
        if not self.waiting:
            return
        waiting, self.waiting, self._bytes = self.waiting, {}, 0
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for batch in waiting:
                batch.pack_()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            if current != self._stream:
                current.wait_stream(self._stream)


def _ranges(sizes: Sequence[int]) -> Iterator[range]:
    """Cuts a list of parameters into ranges of at most `WAITING` bytes each."""
    first = taken = 0
    for number, size in enumerate(sizes):
        taken += size
        if taken > WAITING:
            yield range(first, number)
            first, taken = number, size
    if sizes:
        yield range(first, len(sizes))


def subtables(table: TileTable, ranges: Sequence[range]) -> Iterator[TileTable]:
    """Yields a table for each range of parameters. Its parameters and slots are numbered from 0; the index is shared.

    Args:
        table: the tiles of all parameters, those of one parameter next to each other.
        ranges: ranges of parameter numbers.
    """
    param_of_tile = table.tiles[:, Column.PARAM].contiguous().cpu()
    for numbers in ranges:
        bounds = torch.tensor([numbers.start, numbers.stop], dtype=param_of_tile.dtype, device="cpu")
        low, high = torch.searchsorted(param_of_tile, bounds).tolist()
        tiles = table.tiles[low:high].clone()
        tiles[:, Column.PARAM] -= numbers.start
        tiles[:, Column.SLOT] -= sum(table.counts[: numbers.start])
        own = slice(numbers.start, numbers.stop)
        yield replace(table, tiles=tiles, counts=table.counts[own], sizes=table.sizes[own])
