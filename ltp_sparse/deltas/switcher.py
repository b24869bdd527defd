"""`TicketSwitcher`: keeps many deltas of one base and puts one at a time into the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.delta import Fitted, SparseDelta, applied_deltas
from ltp_sparse.deltas.entries import Entries, entries_of, gather, gather_all, gathered
from ltp_sparse.deltas.restoring import restoring
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.digests import fingerprint
from ltp_sparse.weights.names import canonical_buffers, canonical_parameters, homes_of, parameter_order
from ltp_sparse.weights.reading import closest
from ltp_sparse.weights.sharding import is_sharded

Place = tuple[torch.device, torch.dtype]


class _Version(NamedTuple):
    """The content of the model for one delta: its active entries and whole tensors. Those of the base are empty."""

    sets: dict[str, IndexSet]
    values: dict[Place, Tensor]
    dense: dict[str, Tensor]


class _Pair(NamedTuple):
    """The index for switching between two versions.

    Attributes:
        union: the entries of either version in the model.
        in_base: the same entries among the base values.
        in_union: version -> its entries among those of the union.
    """

    union: dict[Place, Entries]
    in_base: dict[Place, Entries]
    in_union: dict[str | None, dict[Place, Entries]]


class TicketSwitcher:
    """Keeps many deltas of one base model; `switch` replaces the delta in the model by another in one pass.

    switcher = ls.TicketSwitcher(model, {"jv": javanese, "su": sundanese})
    switcher.switch("su")
    ...
    switcher.switch(None)  # the base

    The model then has the bits that `SparseDelta.apply` gives on the base. A switch writes the entries of the old and
    the new delta together, in one launch per device and dtype. A forward pass costs nothing extra. The base is hashed
    once, when the switcher is made.

    Use one switcher per model, and switch between requests: a forward pass that is running would see the weights
    change. If other code changes entries of these deltas, e.g. by a training step, the next switch overwrites them
    without noticing.

    The switcher holds the values of every delta and the base values of all their entries on the device of the model, a
    buffer for the largest switch, and an index for each of the latest pairs of deltas. The first switch between two
    deltas builds their index and takes longer.

    Args:
        model: the base, without applied deltas.
        deltas: name -> delta of this base.
        dtype, strict, dense: as for `SparseDelta.apply`.
        pairs: the number of pairs of deltas whose index is kept.

    Raises:
        ValueError: a delta does not fit the model, or deltas are applied to it. The model is unchanged then.
    """

    def __init__(
        self,
        model: nn.Module,
        deltas: Mapping[str, SparseDelta],
        *,
        dtype: str = "same",
        strict: bool = True,
        dense: bool = True,
        pairs: int = 8,
    ) -> None:
        if pairs < 1:
            raise ValueError(f"TicketSwitcher: pairs must be at least 1, got {pairs}")
        self._model = model
        self._check_stack()
        parameters = canonical_parameters(model)
        tensors = {**canonical_buffers(model), **parameters}
        if any(map(is_sharded, parameters.values())):
            raise ValueError("TicketSwitcher: sharded models are not supported; use apply and revert of the deltas")
        named = {name for delta in deltas.values() for name in delta.ticket.active_names}
        known = {n: parameters[n].detach() for n in {parameters.called(n) for n in named} if n is not None}
        digests = fingerprint(known) if strict else {}
        self._tensors: dict[str, Tensor] = {}
        self._versions: dict[str | None, _Version] = {None: _Version({}, {}, {})}
        for name, delta in deltas.items():
            try:
                fitted = delta.fitted_to(model, dtype=dtype, strict=strict, dense=dense, digests=digests)
            except ValueError as error:
                raise ValueError(f"TicketSwitcher: {name!r} does not fit the model: {error}") from error
            self._versions[name] = _version(fitted)
            self._tensors |= {each: tensors[each] for each in fitted.tensors}
        self._union: dict[str, IndexSet] = {}
        for version in self._versions.values():
            self._union = _united(self._union, version.sets)
        self._base = gather_all({name: self._tensors[name] for name in self._union}, self._union)
        dense_names = {name for version in self._versions.values() for name in version.dense}
        self._base_dense = {name: self._tensors[name].detach().clone() for name in dense_names}
        self._homes = homes_of(model, self._tensors)
        self._places = {name: (tensor.device, tensor.dtype) for name, tensor in self._tensors.items()}
        self._pairs: OrderedDict[frozenset[str | None], _Pair] = OrderedDict()
        self._room: dict[Place, Tensor] = {}
        self._kept = pairs
        self._active: list[str | None] = [None]

    @property
    def active(self) -> str | None:
        """The name of the delta in the model; None for the base."""
        return self._active[0]

    @property
    def names(self) -> list[str]:
        """The names of the deltas."""
        return [name for name in self._versions if name is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held besides the model: values, base values and indices."""
        tensors = [*self._base.values(), *self._base_dense.values(), *self._room.values()]
        for version in self._versions.values():
            tensors += [*version.values.values(), *version.dense.values()]
        indices = sum(index_set.nbytes for v in self._versions.values() for index_set in v.sets.values())
        tables = [
            entries.table.nbytes
            for pair in self._pairs.values()
            for places in (pair.union, pair.in_base, *pair.in_union.values())
            for entries in places.values()
        ]
        return sum(tensor.nbytes for tensor in tensors) + indices + sum(tables)

    def __repr__(self) -> str:
        entries = sum(index_set.k for index_set in self._union.values())
        return f"TicketSwitcher({len(self.names)} deltas over {entries:,} entries, {self.active!r} is in the model)"

    def switch(self, name: str | None) -> None:
        """Replaces the active delta in the model by another one. After an interruption the old one is still active.

        Args:
            name: the name of a delta, or None for the base.

        Raises:
            ValueError: there is no delta of this name, deltas are applied to the model, or its parameters were moved or
                replaced. Nothing has changed then.
        """
        if name not in self._versions:
            raise ValueError(f"TicketSwitcher: there is no delta {name!r}; closest: {closest(str(name), self.names)}")
        self._check_stack()
        for held, key, parameter in self._homes:
            tensor = held.get(key)
            if tensor is not self._tensors[parameter] or (tensor.device, tensor.dtype) != self._places[parameter]:
                raise ValueError(
                    f"TicketSwitcher: {parameter!r} was replaced or moved since the switcher was made; make a new one"
                )
        if name == self.active:
            return
        pair = self._pair_of(self.active, name)
        with torch.no_grad(), restoring([partial(self._write, pair, name, self.active)], self._active):
            self._write(pair, self.active, name)
            self._active[:] = [name]

    def _write(self, pair: _Pair, old: str | None, new: str | None) -> None:
        """Writes the new version over the old one: entries of both, base values of whole tensors, and new ones."""
        tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}
        version = self._versions[new]
        for name in self._versions[old].dense.keys() - version.dense.keys():
            tensors[name].copy_(self._base_dense[name])
        for place, union in pair.union.items():
            own = pair.in_union[new].get(place)
            if own is not None and own.table.k == union.table.k:
                slots = version.values[place]
            else:
                slots = pair.in_base[place].gather(self._base, self._room_for(place, union.table.k))
                if own is not None:
                    own.scatter_(union.split(slots), version.values[place])
            union.scatter_(tensors, slots)
        for name, whole in version.dense.items():
            tensors[name].copy_(whole)

    def _room_for(self, place: Place, k: int) -> Tensor:
        """A buffer that is reused, because allocating memory on a CPU takes as long as the copy."""
        if place not in self._room or len(self._room[place]) < k:
            self._room[place] = torch.empty(k, dtype=place[1], device=place[0])
        return self._room[place][:k]

    def _pair_of(self, one: str | None, other: str | None) -> _Pair:
        key = frozenset((one, other))
        if key not in self._pairs:
            sets = _united(self._versions[one].sets, self._versions[other].sets)
            in_union = {
                name: {each: _inside(own, sets[each]) for each, own in self._versions[name].sets.items()}
                for name in (one, other)
            }
            in_base = {each: _inside(index_set, self._union[each]) for each, index_set in sets.items()}
            base = {each: self._base[each] for each in sets}
            self._pairs[key] = _Pair(
                _by_place(entries_of({each: self._tensors[each] for each in sets}, sets)),
                _by_place(entries_of(base, in_base)),
                {
                    name: _by_place(entries_of({each: base[each] for each in own}, own))
                    for name, own in in_union.items()
                },
            )
            if len(self._pairs) > self._kept:
                self._pairs.popitem(last=False)
        self._pairs.move_to_end(key)
        return self._pairs[key]

    def _check_stack(self) -> None:
        if stack := applied_deltas(self._model):
            raise ValueError(
                f"TicketSwitcher: {stack[-1].delta!r} is applied to the model; revert it first, since the "
                "switcher needs the base"
            )


def _version(fitted: Fitted) -> _Version:
    sets = {name: fitted.delta.ticket.sets[name] for name in fitted.delta.ticket.active_names}
    entries = entries_of({name: fitted.tensors[name] for name in sets}, sets)
    values = fitted.delta.values_over(gathered(entries, fitted.tensors))
    dense = {name: tensor.to(fitted.tensors[name], copy=True) for name, tensor in fitted.dense.items()}
    return _Version(sets, {_place(each): each.join(values) for each in entries}, dense)


def _place(entries: Entries) -> Place:
    return entries.device, entries.dtype


def _by_place(entries: list[Entries]) -> dict[Place, Entries]:
    return {_place(each): each for each in entries}


def _united(some: Mapping[str, IndexSet], more: Mapping[str, IndexSet]) -> dict[str, IndexSet]:
    both = {name: some[name].combine(more[name], "|") for name in some if name in more}
    united = {**some, **more, **both}
    return {name: united[name] for name in parameter_order(united)}


def _inside(part: IndexSet, whole: IndexSet) -> IndexSet:
    """The entries of a part as a set over the slots of the whole."""
    if part.k == whole.k:
        return IndexSet.full(whole.k)
    return IndexSet.from_mask(gather(part.mask(), whole)).compact()
