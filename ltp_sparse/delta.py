"""`SparseDelta`: what a training run changed on a ticket; applied to a model, composed, taken back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltp_sparse import files
from ltp_sparse.checkpoints import Readable, open_checkpoint, read_piece
from ltp_sparse.encoding import IndexSet
from ltp_sparse.names import applied_deltas, canonical_parameters, canonical_tensors, closest, fingerprint, match_names
from ltp_sparse.reading import reader
from ltp_sparse.ticket import Ticket, checked_fingerprint, pack_sets, unpack_sets


@dataclass
class Applied:
    """One entry of a model's stack of applied deltas: what it needs to be taken back.

    delta:     the delta
    displaced: name -> values of the active entries before it was applied
    dense:     name -> whole tensors before it was applied
    """

    delta: SparseDelta
    displaced: dict[str, Tensor]
    dense: dict[str, Tensor]


class SparseDelta:
    """The new and original values of a ticket's entries (LT-SFT calls it an SFT), and whole tensors such as a head.

    On the base it was made from, `apply` gives the tuned bits. On top of other deltas it adds: an entry that another
    delta has moved becomes current + (tuned - original), in float32 (LT-SFT's composition). `revert` gives back the
    bits of before.

    Args:
        ticket: the active entries, with the fingerprint of the base.
        values: name -> [k] tuned values in slot order, in the dtype of the model.
        originals: name -> [k] values of the base, or empty: the delta can then not be composed with one that overlaps
            it.
        dense: name -> whole tensors that replace the model's.
        metadata: anything JSON can hold.
    """

    def __init__(
        self,
        ticket: Ticket,
        values: Mapping[str, Tensor],
        originals: Mapping[str, Tensor] | None = None,
        dense: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.ticket = ticket
        self.values = dict(values)
        self.originals = dict(originals or {})
        self.dense = dict(dense or {})
        self.metadata = files.checked_metadata("SparseDelta", metadata)
        for what, packed in (("values", self.values), ("originals", self.originals)):
            for name, tensor in packed.items():
                if name not in ticket.sets or tensor.shape != (ticket.sets[name].k,):
                    raise ValueError(f"SparseDelta: {what} of {name!r} do not fit the ticket, got {list(tensor.shape)}")
        if missing := [name for name in ticket.active_names if name not in self.values]:
            raise ValueError(f"SparseDelta: no values for {missing[0]!r}, which has active entries")

    @classmethod
    def between(
        cls,
        initial: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str],
        tuned: nn.Module | Mapping[str, Tensor],
        ticket: Ticket,
        *,
        dense: Mapping[str, Tensor] | None = None,
        originals: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> SparseDelta:
        """The delta from one version of a model to another, on the ticket's entries.

        Args:
            initial: the base: a module, name -> tensor, or a safetensors checkpoint. Deltas that are applied to a
                module belong to it; the fingerprint is that of the model below them.
            tuned: the tuned version.
            ticket: the entries to keep; what moved outside it is not looked at.
            dense: whole tensors to carry along, e.g. a task head or a prompt.
            originals: keep the base's values of these entries, which doubles the size and allows composing.
            metadata: anything JSON can hold.
        """
        base: Mapping[str, Readable] = (
            open_checkpoint(initial) if isinstance(initial, str | os.PathLike) else canonical_tensors(initial)
        )
        after = canonical_tensors(tuned)
        names = ticket.active_names
        for side, tensors in (("the initial model", base), ("the tuned model", after)):
            match_names(names, tensors, what="SparseDelta.between", where=side)
            _check_shapes(ticket, tensors, side)
        digests = ticket.fingerprint
        if any(name not in digests for name in names):
            if isinstance(initial, nn.Module):
                digests = base_fingerprint(initial, names)
            else:
                digests = fingerprint({name: _whole(base[name]) for name in names})
        carrier = Ticket(ticket.sets, ticket.shapes, ticket.metadata, digests)
        return cls(
            carrier,
            {name: gather(after[name], ticket.sets[name]).cpu() for name in names},
            {name: gather(_whole(base[name]), ticket.sets[name]).cpu() for name in names} if originals else None,
            {name: tensor.detach().cpu().clone() for name, tensor in (dense or {}).items()},
            metadata,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of index and values."""
        tensors = [*self.values.values(), *self.originals.values(), *self.dense.values()]
        return self.ticket.nbytes + sum(t.nbytes for t in tensors)

    def __repr__(self) -> str:
        dense = f", {len(self.dense)} dense tensors" if self.dense else ""
        return (
            f"SparseDelta({self.ticket.k:,} values in {len(self.values)} parameters{dense}, {self.nbytes:,} bytes, "
            f"{'composable' if self.originals else 'without originals'})"
        )

    def apply(self, model: nn.Module, *, dtype: str = "same", strict: bool = True) -> None:
        """Writes the delta into the model's parameters, in place.

        Args:
            model: the base model, possibly with other deltas applied by this method.
            dtype: "same", or "cast" to accept the same base in another dtype (compared there by the delta's original
                values, since a fingerprint is one of bits).
            strict: False accepts any base whose names and shapes fit, and warns.

        Raises:
            ValueError: names, shapes, dtypes or the base do not fit; nothing has been changed then.
        """
        if dtype not in ("same", "cast"):
            raise ValueError(f'SparseDelta.apply: dtype must be "same" or "cast", got {dtype!r}')
        parameters = canonical_parameters(model)
        names = match_names(self.ticket.active_names, parameters, what="SparseDelta.apply", where="the model")
        _check_shapes(self.ticket, parameters, "the model")
        tensors: Mapping[str, Tensor] = {**parameters, **dict(model.named_buffers())}
        for name, tensor in self.dense.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"SparseDelta.apply: the model has no tensor {name!r} of shape {list(tensor.shape)}; "
                    f"closest: {closest(name, tensors)}"
                )
            if strict and dtype == "same" and tensors[name].dtype != tensor.dtype:
                raise ValueError(
                    f"SparseDelta.apply: {name!r} is {tensors[name].dtype} in the model, {tensor.dtype} in the delta; "
                    'pass dtype="cast" to convert it'
                )
        stack = applied_deltas(model)
        if strict:
            self._check_base({name: parameters[name].detach() for name in names}, stack, dtype)
        else:
            import warnings

            warnings.warn("SparseDelta.apply: strict=False, the base model is not compared", UserWarning, stacklevel=2)

        entry = Applied(self, {}, {})
        updates = {}
        for name in names:
            index_set, parameter = self.ticket.sets[name], parameters[name].detach()
            current = gather(parameter, index_set)
            updates[name] = self._moved(name, current, any(_touches(a, name, index_set) for a in stack))
            entry.displaced[name] = current
        with torch.no_grad():
            for name, update in updates.items():
                scatter_(parameters[name].detach(), self.ticket.sets[name], update)
            for name, tensor in self.dense.items():
                entry.dense[name] = tensors[name].detach().clone()
                tensors[name].detach().copy_(tensor)
        stack.append(entry)

    def _moved(self, name: str, current: Tensor, overlaps: bool) -> Tensor:
        """[k] new values of the active entries, given the current ones.

        They are the tuned bits where the current ones are the original bits, else the current value plus the delta.
        """
        values = self.values[name].to(current.device)
        if name in self.originals:
            originals = self.originals[name].to(current.device)
            added = (current.float() + (values.float() - originals.float())).to(current.dtype)
            return torch.where(current == originals.to(current.dtype), values.to(current.dtype), added)
        if overlaps:
            raise ValueError(
                f"SparseDelta.apply: another delta has moved entries of {name!r} that this one moves too, and this one "
                "was made without originals; make it with originals=True to compose"
            )
        return values.to(current.dtype)

    def _check_base(self, tensors: Mapping[str, Tensor], stack: list[Applied], dtype: str) -> None:
        """Compares the model, as it was before any delta, with the base of this one."""
        for name, tensor in tensors.items():
            cast = tensor.dtype != self.values[name].dtype
            if cast and dtype == "same":
                raise ValueError(
                    f"SparseDelta.apply: {name!r} is {tensor.dtype} in the model, "
                    f"{self.values[name].dtype} in the delta; "
                    'pass dtype="cast" if it is the same base in another dtype'
                )
            if cast and name not in self.originals:
                raise ValueError(
                    f"SparseDelta.apply: {name!r} in {tensor.dtype} cannot be compared with the base of this delta, "
                    "which was made without originals; strict=False applies it all the same"
                )
            tensor = _before(name, tensor, stack)
            if cast:
                # in another dtype only the delta's own original values can be compared
                same = torch.equal(
                    gather(tensor, self.ticket.sets[name]), self.originals[name].to(tensor.device, tensor.dtype)
                )
            else:
                wanted = self.ticket.fingerprint.get(name)
                same = wanted is None or fingerprint({name: tensor})[name] == wanted
            if not same:
                raise ValueError(
                    f"SparseDelta.apply: {name!r} is not the tensor this delta was made from. Load the base model; "
                    'dtype="cast" accepts it in another dtype, strict=False any model'
                )

    def revert(self, model: nn.Module) -> None:
        """Undoes the latest `apply` of this delta, bit for bit.

        Raises:
            ValueError: it is not applied, or a delta applied later overlaps it (revert that one first).
        """
        stack = applied_deltas(model)
        at = next((i for i in reversed(range(len(stack))) if stack[i].delta is self), None)
        if at is None:
            raise ValueError("SparseDelta.revert: this delta is not applied to the model")
        entry = stack[at]
        for later in stack[at + 1 :]:
            shared = [n for n in entry.displaced if _touches(later, n, self.ticket.sets[n])]
            shared += [name for name in entry.dense if name in later.dense]
            if shared:
                raise ValueError(
                    f"SparseDelta.revert: {later.delta!r} was applied later and overlaps in {shared[0]!r}: revert it"
                )
        parameters = canonical_parameters(model)
        tensors = {**parameters, **dict(model.named_buffers())}
        with torch.no_grad():
            for name, values in entry.displaced.items():
                scatter_(parameters[name].detach(), self.ticket.sets[name], values)
            for name, tensor in entry.dense.items():
                tensors[name].detach().copy_(tensor)
        del stack[at]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, atomically."""
        tensors, description = pack_sets(self.ticket.sets, self.ticket.shapes)
        for part in ("values", "originals", "dense"):
            tensors |= {f"{part}/{name}": tensor for name, tensor in getattr(self, part).items()}
        files.save(
            path,
            "delta",
            tensors,
            {
                "parameters": description,
                "fingerprint": self.ticket.fingerprint,
                "ticket": self.ticket.metadata,
                "metadata": self.metadata,
            },
        )

    @classmethod
    @reader("delta")
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Reads and verifies a file written by `save`; a damaged or foreign file is a FileFormatError."""
        tensors, metadata = files.load(path, "delta")
        parts = {
            part: {n.removeprefix(f"{part}/"): t for n, t in tensors.items() if n.startswith(f"{part}/")}
            for part in ("values", "originals", "dense")
        }
        with files.understanding(path, "delta"):
            sets, shapes = unpack_sets(tensors, metadata["parameters"])
            ticket = Ticket(sets, shapes, metadata["ticket"], checked_fingerprint(metadata["fingerprint"], sets))
            return cls(ticket, parts["values"], parts["originals"], parts["dense"], metadata["metadata"])


def gather(tensor: Tensor, index_set: IndexSet) -> Tensor:
    """[k] values of the active entries, in slot order."""
    flat = tensor.detach().reshape(-1)
    packed = flat.new_empty(index_set.k)
    for slot, indices in index_set.to(flat.device).chunks():
        packed[slot : slot + indices.numel()] = flat[indices]
    return packed


def scatter_(tensor: Tensor, index_set: IndexSet, packed: Tensor) -> None:
    """Writes [k] values to the active entries of a tensor, in place."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    packed = packed.to(flat.device)
    for slot, indices in index_set.to(flat.device).chunks():
        flat[indices] = packed[slot : slot + indices.numel()]
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def base_fingerprint(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name -> digest of a model's parameters as they were before any delta was applied."""
    parameters, stack = canonical_parameters(model), applied_deltas(model)
    return fingerprint({name: _before(name, parameters[name].detach(), stack) for name in names})


def _before(name: str, tensor: Tensor, stack: list[Applied]) -> Tensor:
    """The tensor as it was before any delta of the stack was applied."""
    for applied in reversed(stack):
        if name in applied.displaced:
            tensor = tensor.clone()
            scatter_(tensor, applied.delta.ticket.sets[name], applied.displaced[name])
    return tensor


def _touches(applied: Applied, name: str, index_set: IndexSet) -> bool:
    other = applied.delta.ticket.sets.get(name)
    return name in applied.displaced and other is not None and other.combine(index_set, "&").k > 0


def _whole(tensor: Readable) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else read_piece(tensor, 0, tensor.numel()).view(tensor.shape)


def _check_shapes(ticket: Ticket, tensors: Mapping[str, Any], where: str) -> None:
    for name in ticket.active_names:
        if tensors[name].shape != ticket.shapes[name]:
            raise ValueError(
                f"{where}: {name!r} has shape {list(tensors[name].shape)}, "
                f"the ticket was made for {list(ticket.shapes[name])}"
            )
