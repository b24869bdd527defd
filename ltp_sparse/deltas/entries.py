"""Copies of the active entries of many tensors, with one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ltp_sparse.ops import masked_gather, masked_scatter_, masked_swap_
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable


@dataclass(frozen=True, eq=False)
class Entries:
    """The active entries of named tensors of one device and dtype. The tensors themselves are passed to each call.

    Attributes:
        names: names of the tensors, in the order of the table.
        dtype: their dtype.
        table: their active entries.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    table: TileTable

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.table.tiles.device

    def gather(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """[table.k] values in slot order, in `out` or in a new tensor."""
        return masked_gather(self._of(tensors), self.table, out=out)

    def scatter_(self, tensors: Mapping[str, Tensor], slots: Tensor) -> None:
        """Writes [table.k] values to the entries."""
        masked_scatter_(self._of(tensors), slots, self.table)

    def swap_(self, tensors: Mapping[str, Tensor], slots: Tensor) -> None:
        """Exchanges the entries and [table.k] values."""
        masked_swap_(self._of(tensors), slots, self.table)

    def _of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[name].detach() for name in self.names]

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """[table.k]: values by name, joined in a new tensor of the tensors' dtype and on their device."""
        there = values[self.names[0]].device if self.names else self.device
        joined = torch.empty(self.table.k, dtype=self.dtype, device=there)
        for name, share in self.split(joined).items():  # copies run on all threads, unlike `torch.cat`
            share.copy_(values[name].detach())
        return joined.to(self.device)

    def split(self, slots: Tensor) -> dict[str, Tensor]:
        """Name -> its slots, as views."""
        return dict(zip(self.names, slots.split(self.table.counts), strict=True))


def entries_of(tensors: Mapping[str, Tensor], sets: Mapping[str, IndexSet]) -> list[Entries]:
    """The active entries of tensors, as one `Entries` per device and dtype.

    Args:
        tensors: name -> tensor, on any devices and of any dtypes.
        sets: name -> active entries, for all of these tensors.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype), []).append(name)
    return [
        Entries(tuple(names), dtype, _table([sets[name] for name in names], device))
        for (device, dtype), names in alike.items()
    ]


def same_places(known: list[Entries], tensors: Mapping[str, Tensor]) -> bool:
    """Whether these entries are of exactly these names, devices and dtypes."""
    places = {name: (entries.device, entries.dtype) for entries in known for name in entries.names}
    return places == {name: (tensor.device, tensor.dtype) for name, tensor in tensors.items()}


def gathered(places: Iterable[Entries], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> [k] values of all of these entries, in slot order, on the device of the tensor."""
    found: dict[str, Tensor] = {}
    for entries in places:
        found |= entries.split(entries.gather(tensors))
    return found


def gather_all(tensors: Mapping[str, Tensor], sets: Mapping[str, IndexSet]) -> dict[str, Tensor]:
    """Name -> [k] values of the active entries, in slot order, on the device of the tensor."""
    found = gathered(entries_of(tensors, sets), tensors)
    return {name: found[name] for name in tensors}


def gather(tensor: Tensor, index_set: IndexSet) -> Tensor:
    """[k] values of the active entries of one tensor, in slot order."""
    return masked_gather([tensor.detach()], _table([index_set], tensor.device))


def scatter_(tensor: Tensor, index_set: IndexSet, packed: Tensor) -> None:
    """Writes [k] values to the active entries of one tensor, in place."""
    masked_scatter_([tensor.detach()], packed.to(tensor.device), _table([index_set], tensor.device))


def _table(sets: list[IndexSet], device: torch.device) -> TileTable:
    return TileTable.build(sets, device=device, ranks=device.type != "cpu")
