"""`TicketSwitcher`: many deltas over one base, of which one at a time is in the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.delta import Fitted, SparseDelta, applied_deltas
from ltp_sparse.deltas.entries import Entries, entries_of, gather, gather_all
from ltp_sparse.deltas.restoring import restoring
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.digests import fingerprint
from ltp_sparse.weights.names import canonical_buffers, canonical_parameters, homes_of, parameter_order
from ltp_sparse.weights.reading import closest
from ltp_sparse.weights.sharding import is_sharded

Place = tuple[torch.device, torch.dtype]


@dataclass
class _Version:
    """What the model holds under a name: the active entries of a delta, and whole tensors; nothing for the base."""

    sets: dict[str, IndexSet]
    values: dict[Place, Tensor]
    dense: dict[str, Tensor]


@dataclass
class _Pair:
    """Two versions, ready to be exchanged.

    Attributes:
        union: the entries of either, in the model.
        in_base: the same, in the kept base values.
        in_union: version -> its entries among those of the union.
    """

    union: dict[Place, Entries]
    in_base: dict[Place, Entries]
    in_union: dict[str | None, dict[Place, Entries]]


class TicketSwitcher:
    """Many deltas over one base model; `switch` brings another one into the model in one pass.

    switcher = ls.TicketSwitcher(model, {"jv": javanese, "su": sundanese})
    switcher.switch("su")
    ...
    switcher.switch(None)  # the base

    The model then holds the bits that `SparseDelta.apply` gives on the base. A switch reads and writes the entries of
    the old and the new delta together, in one launch per device and dtype, and nothing is added to a forward pass.
    The base is hashed once, when the switcher is made. Use one switcher for a model, and call it between requests: the
    weights change under a forward pass that runs meanwhile. A switch overwrites what others have written to the entries
    of its deltas since the last one, such as a training step, and does not notice it.

    Kept are the values of every delta on the device of the model, the base values of all their entries, a buffer of the
    largest switch, and for the latest pairs of deltas an index. It is made in the first switch between the two, which
    takes longer.

    Args:
        model: the base, without applied deltas.
        deltas: name -> delta of this base.
        dtype, strict, dense: as of `SparseDelta.apply`.
        pairs: how many pairs keep their index.

    Raises:
        ValueError: a delta does not fit the model, or deltas are applied to it; the model is unchanged.
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
            raise ValueError(
                "TicketSwitcher: expected a model that is not sharded; on this one use apply and revert of the deltas"
            )
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
        """The delta in the model; None: the base."""
        return self._active[0]

    @property
    def names(self) -> list[str]:
        """Of the deltas."""
        return [name for name in self._versions if name is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept beside the model: values, base values and indices."""
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
        """Brings a delta into the model in the place of the active one; None returns the bits of the base.

        An interrupted switch leaves the delta that was active.

        Raises:
            ValueError: there is no delta of this name, or the model was moved, or others have changed it: deltas are
                applied to it, or parameters replaced. Nothing is changed then.
        """
        if name not in self._versions:
            raise ValueError(f"TicketSwitcher: there is no delta {name!r}; closest: {closest(str(name), self.names)}")
        self._check_stack()
        for held, key, of in self._homes:
            tensor = held.get(key)
            if tensor is not self._tensors[of] or (tensor.device, tensor.dtype) != self._places[of]:
                raise ValueError(
                    f"TicketSwitcher: {of!r} was replaced or moved since the switcher was made; make another"
                )
        if name == self.active:
            return
        pair = self._pair_of(self.active, name)
        with torch.no_grad(), restoring([_Written(self, pair, name, self.active)], self._active):
            self._write(pair, self.active, name)
            self._active[:] = [name]

    def _write(self, pair: _Pair, old: str | None, new: str | None) -> None:
        """Old and new entries take the values of the new version; whole tensors of the old one are the base's first."""
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
        """A buffer that is used again: new memory costs a CPU as much as the copy."""
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
                f"TicketSwitcher: {stack[-1].delta!r} is applied to the model; revert it, a switcher writes its deltas "
                "over the base alone"
            )


@dataclass
class _Written:
    """A switch from `old` to `new`, to be undone."""

    switcher: TicketSwitcher
    pair: _Pair
    new: str | None
    old: str | None

    def put_back(self) -> None:
        self.switcher._write(self.pair, self.new, self.old)


def _version(fitted: Fitted) -> _Version:
    sets = {name: fitted.delta.ticket.sets[name] for name in parameter_order(fitted.names)}
    entries = entries_of({name: fitted.tensors[name] for name in sets}, sets)
    held: dict[str, Tensor] = {}
    for each in entries:
        held |= each.split(each.gather(fitted.tensors))
    values = fitted.delta.values_over(held)
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
    """The entries of a part among those of the whole, which are counted in slot order."""
    if part.k == whole.k:
        return IndexSet.full(whole.k)
    return IndexSet.from_mask(gather(part.mask(), whole)).compact()
