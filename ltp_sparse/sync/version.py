"""`Version`: the changes that a publisher has written or a follower has applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ltp_sparse.sync.encoding import as_integers
from ltp_sparse.sync.local import ActiveEntries


class Change(NamedTuple):
    """Entries of a parameter that changed.

    Attributes:
        name: the canonical name of the parameter.
        indices: int64 [c], flat row-major positions in the whole parameter, ascending.
        values: [c], the new values.
        shape: the shape of the whole parameter.
    """

    name: str
    indices: Tensor
    values: Tensor
    shape: Size


@dataclass(frozen=True, eq=False)
class Version:
    """A version of the weights and its changes from the version before.

    It holds the slots of both versions, so do not keep it longer than needed.

    Attributes:
        number: the number of this version.
        base: the version before; None if it is unknown, in which case every active entry counts as changed.
        nbytes: bytes that this process has written to the store or read from it.
    """

    number: int
    base: int | None
    nbytes: int
    _active: ActiveEntries = field(repr=False)
    _slots: Sequence[Tensor] = field(repr=False)  # of the groups of `_active`
    _earlier: Sequence[Tensor] | None = field(repr=False)  # of the version before

    def changes(self) -> Iterator[Change]:
        """Yields the entries whose bits differ, by parameter; for a sharded model, those of this process."""
        now = self._active.named(self._slots)
        earlier = None if self._earlier is None else self._active.named(self._earlier)
        for name, part in self._active.parts.items():
            slots, indices = now[name], self._active.sets[name].indices().cpu().add_(part.start)
            if earlier is not None:
                differ = as_integers(slots) != as_integers(earlier[name])
                at = torch.from_numpy(differ.nonzero()[0])
                indices, slots = indices[at], slots[at]
            if indices.numel():
                yield Change(name, indices, slots, part.shape)
