"""`Snapshot`: what a model was before a training run: the entries that train, and digests of the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.delta import SparseDelta, base_fingerprint, read_entries
from ltp_sparse.deltas.entries import entries_of, scatter_
from ltp_sparse.deltas.ranks import own_entries
from ltp_sparse.deltas.restoring import Write, copies, put_back, restoring
from ltp_sparse.optim.frozen import check_unchanged
from ltp_sparse.optim.members import ParameterHome, active_names, dense_parameters, ticket_for
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.sharded_digests import whole_fingerprint
from ltp_sparse.weights.sharding import Cut, local, reshard, whole
from ltp_sparse.weights.tensors import bits


class Snapshot:
    """The trained entries of a model before training, for making deltas and for restoring the initial weights.

    It takes O(k) memory on the host, one pass over the names of the model, and one digest per parameter. It belongs to
    the present parameters of the model, also after they are sharded; if others replace them, a new snapshot is needed.
    For a sharded model, each rank holds the values of all entries of the ticket and writes those of its own shards. All
    ranks must make the same calls.

    Args:
        model: a model at its initial weights, which may include deltas of earlier runs.
        ticket: the entries that train. Its names can be those of another wrapping of the model.
        dense: a module, parameters or parameter groups that train in full.
        frozen: whether to digest the parameters outside the ticket as well, for `check_frozen`.
        what: the caller's name, for messages.

    Attributes:
        selected_elsewhere: names of parameters that differ from the base on which the ticket was selected.
        parameters: canonical name -> parameter.
        ticket: the given ticket under these names, with the fingerprint of this base.
        originals: name -> [k] values of the ticket's entries, on the CPU.
        dense: name -> values of the parameters that train in full, on the CPU.

    Raises:
        ValueError: a parameter of the ticket or of `dense` is not in the model, has another shape, or no gradient.
        TypeError: a parameter of the ticket is quantised.
    """

    def __init__(
        self, model: nn.Module, ticket: Ticket, dense: Any = (), *, frozen: bool = False, what: str = "Snapshot"
    ) -> None:
        self._what = what
        reshard(model)
        self.parameters = parameters = canonical_parameters(model)
        ticket = ticket_for(parameters, ticket, what=what)
        names = active_names(parameters, ticket, what=what)
        in_full = self._names_of(dense_parameters(dense, what=what))
        if untrained := [name for name in [*names, *in_full] if not parameters[name].requires_grad]:
            raise ValueError(
                f"{what}: {untrained[0]!r} is to be trained but has requires_grad off ({len(untrained)} parameters in "
                "all); turn it on, or leave the parameter out of the ticket and of dense"
            )
        self._home = ParameterHome(model, {name: parameters[name] for name in [*names, *in_full]})
        watched = {*names, *(parameters if frozen else ())}.difference(in_full)
        self._digests = whole_fingerprint({name: parameters[name].detach() for name in parameters if name in watched})
        base = base_fingerprint(model, names, parameters, self._digests)
        self.ticket = Ticket(ticket.sets, ticket.shapes, ticket.metadata, base)
        self.originals = read_entries(parameters, self.ticket, names)
        self.dense = {name: _copied(parameters[name]) for name in in_full}
        self._model = model
        recorded = {name: ticket.fingerprint[name] for name in names if name in ticket.fingerprint}
        self.selected_elsewhere = [name for name, digest in recorded.items() if not self._is_of_base(name, digest)]

    def _names_of(self, wanted: Iterable[nn.Parameter]) -> list[str]:
        name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        wanted = list(wanted)
        if foreign := [parameter for parameter in wanted if id(parameter) not in name_of]:
            raise ValueError(
                f"{self._what}: {len(foreign)} parameters of dense are not part of the model, the first of shape "
                f"{list(foreign[0].shape)}; make their module a submodule of the model"
            )
        return list(dict.fromkeys(name_of[id(parameter)] for parameter in wanted))

    def share(self, held: Mapping[nn.Parameter, Tensor]) -> None:
        """Drops its own initial values where an optimizer holds the same bits on the host, and uses those.

        Otherwise the host would hold them twice.

        Args:
            held: parameter -> [k] initial values, as `MaskedAdamW.initial_values` returns.
        """
        for name, own in self.originals.items():
            other = held.get(self.parameters[name])
            if other is not None and other.is_cpu and other.dtype == own.dtype and torch.equal(bits(other), bits(own)):
                self.originals[name] = other

    def delta(self, metadata: Mapping[str, Any] | None = None, *, originals: bool = True) -> SparseDelta:
        """The changes of training so far: entries of the ticket, and whole tensors of `dense`.

        Args:
            metadata: for the delta.
            originals: whether the delta keeps the initial values.
        """
        entries, dense = self._now()
        return SparseDelta(self.ticket, entries, self.originals if originals else None, dense, metadata)

    def restore(self, delta: SparseDelta) -> None:
        """Writes a delta of the same run over the present values of the model, completely or not at all.

        Args:
            delta: an earlier result of `delta`.

        Raises:
            ValueError: the delta has another ticket, base or set of dense parameters.
        """
        recorded = delta.ticket.fingerprint
        same_base = recorded.keys() == self.ticket.fingerprint.keys() and all(
            self._is_of_base(name, digest) for name, digest in recorded.items()
        )
        if delta.ticket != self.ticket or not same_base:
            raise ValueError(
                f"{self._what}: {delta!r} was saved for another ticket or another base model; "
                "resume with those of the interrupted run"
            )
        if set(delta.dense) != set(self.dense):
            raise ValueError(
                f"{self._what}: expected the dense parameters {sorted(self.dense)}, but the saved run has "
                f"{sorted(delta.dense)}; resume with those of the interrupted run"
            )
        with restoring(self._writes(*self._now())):
            for write in self._writes(delta.values, delta.dense):
                write()

    def put_back(self) -> None:
        """Writes the initial values into the model. An interrupt is raised only after all of them are written."""
        self._settle()
        put_back(self._writes(self.originals, self.dense))

    def check_frozen(self) -> dict[str, str]:
        """Compares everything that a run must not change with the digests from before; call it after `put_back`.

        Returns:
            Name -> present digest of every compared parameter.

        Raises:
            RuntimeError: a parameter has changed; the message names the first.
        """
        self._settle()
        after = whole_fingerprint({name: self.parameters[name].detach() for name in self._digests})
        check_unchanged(self._digests, after, what=self._what)
        return after

    def _settle(self) -> None:
        """Finds the parameters again if the model was sharded meanwhile. Raises ValueError if others replaced them."""
        if self._home.sharded(self._model, what=self._what):
            self.parameters = canonical_parameters(self._model)
            trained = {name: self.parameters[name] for name in [*self.originals, *self.dense]}
            self._home = ParameterHome(self._model, trained)

    def _is_of_base(self, name: str, digest: str) -> bool:
        """Whether a parameter of the base has this digest, which can be by another hash function."""
        if digest == self.ticket.fingerprint[name]:
            return True
        initial = self.parameters[name].detach().clone()
        own, slots = self._own(name)
        scatter_(local(initial), own, self.originals[name][slots])
        return base_fingerprint(self._model, [name], {name: initial}, like={name: digest})[name] == digest

    def _own(self, name: str) -> tuple[IndexSet, slice | Tensor]:
        """The active entries that this rank holds of a parameter, and their slots among all."""
        return own_entries(self.ticket.sets[name], self._cut(name))

    def _cut(self, name: str) -> Cut:
        return Cut.of(self.parameters[name], f"{self._what}: {name!r}")

    def _writes(self, entries: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> list[Write]:
        """The writes of these values into the model."""
        held = {name: local(self.parameters[name]) for name in [*entries, *dense]}
        own = {name: self._own(name) for name in entries}
        places = entries_of({name: held[name] for name in entries}, {name: part for name, (part, _) in own.items()})
        values = {name: entries[name][slots] for name, (_, slots) in own.items()}
        return [
            *(partial(each.scatter_, held, each.join(values)) for each in places),
            *copies({name: self._cut(name).taken_from(tensor) for name, tensor in dense.items()}, held),
        ]

    def _now(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies on the CPU of everything that training changes: entries and whole tensors."""
        self._settle()
        entries = read_entries(self.parameters, self.ticket, self.originals)
        return entries, {name: _copied(self.parameters[name]) for name in self.dense}


def _copied(parameter: nn.Parameter) -> Tensor:
    return whole(parameter.detach()).cpu().clone()
