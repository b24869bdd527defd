"""`Version`: what a publication or a step of a follower has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ltp_sparse.sync.encoding import as_integers
from ltp_sparse.sync.local import ActiveEntries


class Change(NamedTuple):
    """Entries of a parameter that changed.

    Attributes:
        name: its canonical name
        indices: int64 [c], flat row-major positions in the whole parameter, ascending
        values: [c], the new values
        shape: of the whole parameter
    """

    name: str
    indices: Tensor
    values: Tensor
    shape: Size


@dataclass(frozen=True, eq=False)
class Version:
    """A version of the weights, and how it differs from the one before.

    It holds the slots of both: drop it when it has been used.

    Attributes:
        number: of this version
        base: the version before; None: it was not known, and every active entry counts as changed
        nbytes: written to, or read from the store by this process
    """

    number: int
    base: int | None
    nbytes: int
    _active: ActiveEntries = field(repr=False)
    _slots: Mapping[str, Tensor] = field(repr=False)
    _earlier: Mapping[str, Tensor] | None = field(repr=False)

    @classmethod
    def of(
        cls,
        number: int,
        base: int | None,
        nbytes: int,
        active: ActiveEntries,
        slots: Sequence[Tensor],
        earlier: Sequence[Tensor] | None,
    ) -> Version:
        """From the slots of the groups of `active`, and those before."""
        return cls(
            number, base, nbytes, active, active.named(slots), None if earlier is None else active.named(earlier)
        )

    def changes(self) -> Iterator[Change]:
        """The entries whose bits differ, parameter by parameter; of a sharded model, those of this process."""
        for name, part in self._active.parts.items():
            slots, indices = self._slots[name], self._active.sets[name].indices().cpu().add_(part.start)
            if self._earlier is not None:
                differ = as_integers(slots) != as_integers(self._earlier[name])
                at = torch.from_numpy(differ.nonzero()[0])
                indices, slots = indices[at], slots[at]
            if indices.numel():
                yield Change(name, indices, slots, part.shape)
