"""Tables of tensor addresses for kernels on a GPU, kept from one call to the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from ltp_sparse.backends.arguments import Norm, Pairs, Step
from ltp_sparse.tickets.bits import tiles_of
from ltp_sparse.tickets.layout import tiles_in_order

_MOST = 64
"""How many tables are kept."""


class _Table(NamedTuple):
    """A table on a device, the stream that copied it there, and the event after the copy."""

    data: Tensor
    stream: torch.cuda.Stream | None
    copied: torch.cuda.Event | None


_tables: OrderedDict[tuple[tuple[int, ...], torch.device], _Table] = OrderedDict()
_captured: dict[tuple[tuple[int, ...], torch.device], _Table] = {}


def address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [len(addresses)] on `device`. A list that was seen before is not copied again, on any stream.

    A table used while a CUDA graph is captured is kept forever, since every replay reads it.

    Raises:
        RuntimeError: a graph is being captured, and the table would first have to be copied there.
    """
    key = addresses, device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if (table := _tables.get(key)) is None:
        if capturing:
            raise RuntimeError(
                "a CUDA graph is being captured, and the addresses of its parameters or gradients have not been seen "
                "before; take a step on the same tensors before capturing, or use the compiled backend, which copies "
                "no addresses"
            )
        table = _tables[key] = _upload(addresses, device)
        if len(_tables) > _MOST:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing:  # the copy has ended: a capture starts after all earlier work
        _captured[key] = table
    elif table.stream is not None and table.copied is not None:
        current = torch.cuda.current_stream(device)
        if current != table.stream:
            current.wait_event(table.copied)
            table.data.record_stream(current)
    return table.data


def _upload(addresses: tuple[int, ...], device: torch.device) -> _Table:
    # From pageable memory CUDA copies before the call returns, without waiting for earlier work of the device.
    data = torch.tensor(addresses, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
    if device.type != "cuda":
        return _Table(data, None, None)
    stream = torch.cuda.current_stream(device)
    return _Table(data, stream, stream.record_event())


def of_update(norm: Norm | Step, device: torch.device) -> Tensor:
    """int64 [2 P]: the addresses of each parameter and its gradient, 0 for none. Packed gradients share one address."""
    params, grads = norm.params.addresses, norm.grads.addresses
    if norm.packed:
        grads *= len(params)
    return address_table(tuple(chain.from_iterable(zip(params, grads, strict=True))), device)


def of_pairs(pairs: Pairs, groups: Sequence[int], word_offsets: Sequence[int], device: torch.device) -> Tensor:
    """int64 on the device: the parts of `PairTable` in csrc/cuda/topk_delta.h. Known pairs are not copied again."""
    befores = (pairs.initial.addresses, tuple(pairs.initial.codes))
    if not pairs.initial:
        befores = (0,) * len(pairs.tuned), (-1,) * len(pairs.tuned)
    columns = (*befores, pairs.tuned.addresses, tuple(pairs.tuned.codes), pairs.tuned.sizes)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _pair_table((*columns, tuple(groups), tuple(word_offsets)), device, stream)


@lru_cache(maxsize=8)
def _pair_table(columns: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """`columns` are those of the rows `DeltaPair` except the last one; the table is copied on `stream`."""
    *_, sizes, groups, word_offsets = columns
    first_tiles = tuple(accumulate(map(tiles_of, sizes), initial=0))
    rows = torch.tensor((*columns, first_tiles[:-1]), dtype=torch.int64, device="cpu").t()
    size, group = rows[:, 4], rows[:, 5]
    of_tile, tile_words = tiles_in_order(sizes, word_offsets)
    tile_groups = group[of_tile]
    order = group.argsort(stable=True)
    starts = size[order].cumsum(0) - size[order]
    parts = (rows.reshape(-1), of_tile, tile_groups, tile_words, tile_groups.argsort(stable=True), order, starts)
    # from pageable memory, as in `_upload`
    return torch.cat(parts).to(device, non_blocking=True)
