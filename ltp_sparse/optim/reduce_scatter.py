"""Sparse reduce-scatter: the ranks of FSDP2 exchange the active entries of gradients, not whole gradients.

Every rank has the gradient of all rows and needs the sum over all ranks for its own rows. It packs the active entries
of each rank's rows; all ranks reduce-scatter `[ranks, k]` packed values; and each rank scatters what it receives into
an output of zeros. k is the count of the rank with the most active entries; the others fill up with zeros.

FSDP2 has a public hook for reduce-scatters, but no public description of its buffer. `_Layout` derives it from FSDP2's
group of parameters, and a buffer of any other size is sent whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn

from ltp_sparse.ops import masked_gather, masked_scatter_
from ltp_sparse.optim.members import active_names, named_parameters, ticket_for
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.tickets.tile_table import TileTable

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_WHAT = "compress_gradients"
_ALIGNED = 16  # the length of a rank's part is a multiple of this, or gloo would cut the buffer within parts


@dataclass(frozen=True)
class Traffic:
    """The traffic of one rank's reduce-scatters.

    Attributes:
        sent: bytes sent.
        dense: bytes of the whole gradients.
        calls: number of reduce-scatters.
        whole: reason -> number of reduce-scatters that sent whole gradients for it.
    """

    sent: int
    dense: int
    calls: int
    whole: dict[str, int]


class CompressedGradients:
    """The compressed reduce-scatters of a model, as `compress_gradients` returns them."""

    def __init__(self, groups: Sequence[tuple[FSDPModule, _Group]]) -> None:
        self._groups = list(groups)
        for module, group in self._groups:
            module.set_custom_reduce_scatter(cast(Any, group))

    def report(self) -> Traffic:
        """The traffic of this rank since compression began."""
        groups = [group for _, group in self._groups]
        return Traffic(
            sum(group.sent for group in groups),
            sum(group.dense for group in groups),
            sum(group.calls for group in groups),
            dict(sum((group.whole for group in groups), Counter())),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the index on each rank: that of the whole ticket, from the first backward on."""
        return sum(layout.nbytes for _, group in self._groups for layout in group.layouts.values())

    def remove(self) -> None:
        """Restores FSDP2's own reduce-scatters. The report stays."""
        for module, group in self._groups:
            if group.is_in_place():
                module.set_custom_reduce_scatter(group.before)

    def __repr__(self) -> str:
        found = self.report()
        share = f", {found.sent / found.dense:.2%}" if found.dense else ""
        whole = "".join(f"; {count} whole: {reason}" for reason, count in found.whole.items())
        return (
            f"CompressedGradients({len(self._groups)} groups, {found.sent:,} of {found.dense:,} bytes{share}, "
            f"in {found.calls} reduce-scatters{whole})"
        )


def compress_gradients(model: nn.Module, ticket: Ticket) -> CompressedGradients:
    """Makes the ranks of FSDP2 exchange only the active entries of gradients: about `density` times the bytes.

    A parameter with active entries then has a gradient that is zero at its inactive entries. Gradients of all other
    parameters stay whole, and so do those of parameters that are not sharded by rows. FSDP2 reduces groups of
    parameters; a group sends whole gradients if one of its parameters had no gradient or if packing saves nothing. The
    all-reduce between replicas (HSDP) is not compressed.

    On two ranks the sums have the bits of the uncompressed ones. On more ranks they have them if the order of summation
    does not depend on the place in the buffer. With gloo it does not, except for entries at the ends of parts of odd
    length. NCCL promises no order, so results can differ by rounding.

    Args:
        model: a model on which `fully_shard` was called.
        ticket: the whole ticket, on every rank.

    Returns:
        An object that counts the bytes (`report()`) and ends the compression (`remove()`).

    Raises:
        ValueError: the model is not sharded by FSDP2 or is compressed already, or the ticket is not of this model.
    """
    from torch.distributed.fsdp import FSDPModule

    named = named_parameters(model, what=_WHAT)
    ticket = ticket_for(named, ticket, what=_WHAT)
    names = {id(named[name]): name for name in active_names(named, ticket, what=_WHAT)}
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ValueError(f"{_WHAT}: expected a model sharded by FSDP2; call fully_shard on it first")
    groups = []
    for module in modules:
        for group in module._get_fsdp_state()._fsdp_param_groups:  # parameters that it gathers and reduces together
            if isinstance(group._reduce_scatter_comm, _Group):
                raise ValueError(f"{_WHAT}: the model is compressed already; call remove() on the earlier result first")
            if any(id(param.sharded_param) in names for param in group.fsdp_params):
                groups.append((module, _Group(group, names, ticket)))
    return CompressedGradients(groups)


class _Group:
    """The reduce-scatter of one group of parameters, as FSDP2 calls it."""

    def __init__(self, group: Any, names: dict[int, str], ticket: Ticket) -> None:
        self._group, self._names, self._ticket = group, names, ticket
        self.before = group._reduce_scatter_comm
        self.layouts: dict[tuple[Any, ...], _Layout] = {}
        self.sent = self.dense = self.calls = 0
        self.whole: Counter[str] = Counter()

    def is_in_place(self) -> bool:
        return self._group._reduce_scatter_comm is self

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for whole gradients."""
        return self.before.allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Sums `input_tensor` [ranks * n] over the ranks and writes this rank's part to `output_tensor` [n]."""
        layout = self._layout(input_tensor.device, group)
        self.calls += 1
        self.dense += input_tensor.nbytes
        if reason := layout.objection(input_tensor) or ("asynchronous" if async_op else ""):
            self.whole[reason] += 1
            self.sent += input_tensor.nbytes
            return self.before(
                output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op, async_op=async_op
            )
        packed = layout.packed(input_tensor)
        self.sent += packed.nbytes
        received = packed.new_empty(layout.room)
        distributed.reduce_scatter_tensor(received, packed, op=op, group=group)
        output_tensor.zero_()
        layout.unpack(received, output_tensor)
        return None

    def _layout(self, device: torch.device, group: distributed.ProcessGroup) -> _Layout:
        params = [param for param in self._group.fsdp_params if param.sharded_param.requires_grad]
        key = device, group.size(), *map(id, params)
        if key not in self.layouts:
            blocks = [_Block.of(param, self._names, self._ticket, group.size()) for param in params]
            self.layouts[key] = _Layout(blocks, group.rank(), group.size(), device)
        return self.layouts[key]


@dataclass(frozen=True)
class _Block:
    """The place of a parameter in the buffer: the same number of entries for every rank, padded at its end.

    Attributes:
        length: entries of each rank, with padding.
        sets: the active entries of every rank, over its entries without padding.
    """

    length: int
    sets: list[IndexSet]

    @classmethod
    def of(cls, param: Any, names: dict[int, str], ticket: Ticket, ranks: int) -> _Block:
        from torch.distributed.tensor import Shard

        size, name = param._orig_size, names.get(id(param.sharded_param))
        if param.fsdp_placement.dim != 0:  # cut by columns, the same number for every rank
            return cls(size.numel() // ranks, [IndexSet.full(size.numel() // ranks)] * ranks)
        rows, row = -(-size[0] // ranks), size[1:].numel()
        cuts = list(pairwise(min(rank * rows, size[0]) for rank in range(ranks + 1)))
        by_rows = all(type(p) is Shard or p.is_replicate() for p in param.sharded_param.placements)
        if name is None or not by_rows or size != ticket.shapes[name]:
            return cls(rows * row, [IndexSet.full((stop - start) * row) for start, stop in cuts])
        return cls(rows * row, [ticket.rows(name, start, stop) for start, stop in cuts])


class _Layout:
    """The places of active entries in the buffers of a group whose parameters all have gradients.

    Attributes:
        n: entries of the output.
        room: packed values that a rank receives: the count of the rank with the most, rounded up.
        nbytes: bytes of the index.
    """

    def __init__(self, blocks: Sequence[_Block], rank: int, ranks: int, device: torch.device) -> None:
        self.n, self._ranks = sum(block.length for block in blocks), ranks
        counts = [sum(block.sets[to].k for block in blocks) for to in range(ranks)]
        self.room, self._least = -(-max(counts) // _ALIGNED) * _ALIGNED, min(counts)
        starts = list(accumulate((block.length for block in blocks), initial=0))

        def placed(to: int) -> list[tuple[int, IndexSet]]:
            """(start in the part of a rank, active entries there) of the blocks that have some."""
            found = [(start, block.sets[to]) for start, block in zip(starts[:-1], blocks, strict=True)]
            return [(start, index_set) for start, index_set in found if index_set.k]

        self._places: list[tuple[int | None, int]] = []  # (start, length) of each set in the buffer; None: zeros
        sets: list[IndexSet] = []
        for to in range(ranks):
            for start, index_set in placed(to):
                self._places.append((to * self.n + start, index_set.n))
                sets.append(index_set)
            if filling := self.room - counts[to]:
                self._places.append((None, filling))
                sets.append(IndexSet.full(filling))
        ranked = device.type != "cpu"
        self._all = TileTable.build(sets, device=device, ranks=ranked)
        self._mine = TileTable.build([index_set for _, index_set in placed(rank)], device=device, ranks=ranked)
        self._own = [(start, index_set.n) for start, index_set in placed(rank)]
        self.nbytes = self._all.nbytes + self._mine.nbytes

    def objection(self, buffer: Tensor) -> str:
        """The reason to send a buffer whole, or an empty string."""
        if buffer.numel() != self._ranks * self.n:
            return "a parameter had no gradient"
        return "nothing to save" if self.room >= self.n else ""

    def packed(self, buffer: Tensor) -> Tensor:
        """[ranks * room] values of a buffer [ranks * n]."""
        zeros = buffer.new_zeros(self.room - self._least)
        tensors = [
            zeros[:length] if start is None else buffer[start : start + length] for start, length in self._places
        ]
        return masked_gather(tensors, self._all)

    def unpack(self, values: Tensor, output: Tensor) -> None:
        """Writes this rank's values, [room], to its output, [n]."""
        masked_scatter_([output[at : at + n] for at, n in self._own], values[: self._mine.k], self._mine)
