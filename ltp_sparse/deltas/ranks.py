"""The active entries of sharded tensors, of which each rank reads and writes those in its shard.

All functions accept ordinary tensors as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltp_sparse.deltas.entries import gather
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.sharding import Cut, everywhere, local, spread, sum_over
from ltp_sparse.weights.tensors import bits


def own_entries(whole: IndexSet, cut: Cut) -> tuple[IndexSet, slice | Tensor]:
    """The active entries in this rank's block of a tensor, and their slots among all of them."""
    if cut.by_rows:
        start, stop = cut.entries
        first, own = (whole.entries(0, start).k if start else 0), whole.entries(start, stop)
        return own if own is whole else own.compact(), slice(first, first + own.k)
    inside, places = cut.find(whole.to("cpu").indices())
    return IndexSet.from_indices(places, torch.Size(cut.sizes).numel()).compact(), inside.nonzero()[:, 0]


def gather_from_ranks(tensor: Any, index_set: IndexSet) -> Tensor:
    """[k] values of the active entries of a whole tensor, on every rank. All ranks must call it."""
    own, slots = own_entries(index_set, Cut.of(tensor, "a tensor"))
    held = local(tensor).detach()
    found = torch.zeros(index_set.k, dtype=held.dtype, device=held.device)
    found[slots] = gather(held, own)
    sum_over(spread(tensor), found.view(torch.uint8))  # one rank has the bits of each entry, the others have zeros
    return found


def entries_equal(tensor: Tensor, index_set: IndexSet, values: Tensor) -> bool:
    """Whether the active entries of a whole tensor have the bits of `values`, [k]. All ranks must call it.

    The answer is that of all ranks together.
    """
    own, slots = own_entries(index_set, Cut.of(tensor, "a tensor"))
    held = local(tensor).detach()
    return everywhere(tensor, torch.equal(bits(gather(held, own)), bits(values[slots].to(held.device))))
