"""`SparseDelta`: the changes of a training run on a ticket, to apply, compose and revert bit for bit."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.entries import Entries, entries_of, gather, gather_all, same_places, scatter_
from ltp_sparse.deltas.ranks import entries_equal, gather_from_ranks, own_entries
from ltp_sparse.deltas.restoring import Exchange, copies, restoring
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket, checked_fingerprint, pack_sets, unpack_sets
from ltp_sparse.weights import file_shards, files
from ltp_sparse.weights.checkpoints import Readable, pairs_of_pieces, read_piece
from ltp_sparse.weights.hub import OnHub
from ltp_sparse.weights.names import Named, bare_names, canonical_buffers, canonical_parameters, match_names, unwrapped
from ltp_sparse.weights.reading import closest, reader
from ltp_sparse.weights.sharded_digests import whole_fingerprint
from ltp_sparse.weights.sharding import Cut, is_sharded, local, reshard, spread, sum_over, whole
from ltp_sparse.weights.tensors import bits, check_plain_tensor
from ltp_sparse.weights.versions import Weights, open_weights, own_block, side_by_side

_PARTS = ("values", "originals", "dense")  # in a file their tensors are called part/name, next to those of the ticket


@dataclass
class Applied:
    """An item in a model's stack of applied deltas, with everything that `revert` needs.

    All names are canonical names of the model, even if the delta uses another name of a tied parameter.

    Attributes:
        delta: the delta.
        displaced: name -> values of this rank's active entries before the delta was applied.
        dense: name -> whole tensors before it was applied.
        sets: name -> active entries.
        own: name -> active entries that this rank holds; equal to `sets` if the model is not sharded.
    """

    delta: SparseDelta
    displaced: dict[str, Tensor]
    dense: dict[str, Tensor]
    sets: dict[str, IndexSet]
    own: dict[str, IndexSet]


class Fitted(NamedTuple):
    """A delta and the tensors of a model that it changes.

    Attributes:
        delta: the delta under the canonical names of the model.
        own: this rank's part of the delta; the same if the model is not sharded.
        tensors: name -> parameter or buffer, detached, for active parameters and `dense`; if sharded, what this rank
            holds of it.
        dense: name -> this rank's block of a whole tensor that replaces the model's.
    """

    delta: SparseDelta
    own: SparseDelta
    tensors: dict[str, Tensor]
    dense: dict[str, Tensor]


class SparseDelta(OnHub):
    """The tuned and original values of a ticket's entries, and whole tensors such as a head. LT-SFT calls it an SFT.

    On its own base, `apply` gives the tuned bits. On top of other deltas it adds: an entry that another delta has
    changed becomes current + (tuned - original), computed in float32 (LT-SFT's composition). `revert` restores the
    previous bits.

    Args:
        ticket: the active entries, with the fingerprint of the base.
        values: name -> [k] tuned values in slot order, in the dtype of the model.
        originals: name -> [k] values of the base. Without them, the delta cannot be composed with overlapping ones.
        dense: name -> whole tensors that replace the model's.
        metadata: JSON values.

    Raises:
        ValueError: values or originals do not fit the ticket.
    """

    _kind = "delta"

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
        self._known: list[Entries] = []  # the places of the latest `apply` or `revert`
        self._known_sets: Mapping[str, IndexSet] = {}
        for what, packed in (("values", self.values), ("originals", self.originals)):
            for name, tensor in packed.items():
                if name not in ticket.sets or tensor.shape != (ticket.sets[name].k,):
                    raise ValueError(f"SparseDelta: {what} of {name!r} do not fit the ticket, got {list(tensor.shape)}")
        if missing := [name for name in ticket.active_names if name not in self.values]:
            raise ValueError(f"SparseDelta: no values for {missing[0]!r}, which has active entries")

    @classmethod
    def between(
        cls,
        initial: Weights,
        tuned: Weights,
        ticket: Ticket,
        *,
        dense: Mapping[str, Tensor] | None = None,
        originals: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> SparseDelta:
        """Makes the delta from one version of a model to another, on the entries of a ticket.

        For sharded models, every rank gets the same whole delta, and all ranks must call this method.

        Args:
            initial: the base: a module, a mapping from names to tensors, or a safetensors checkpoint. If deltas are
                applied to a module, the delta starts from its present values, and the fingerprint is that of the model
                without them, or of the present values where the ticket was selected on these.
            tuned: the tuned version, in any of these forms.
            ticket: the entries to keep. Other changes are ignored.
            dense: whole tensors to include, e.g. a task head or a prompt.
            originals: keep the base's values of these entries, which doubles the size and allows composition.
            metadata: JSON values.

        Warns:
            UserWarning: zeros outside the ticket changed their sign, which `apply` will not reproduce: their delta is
                0, so that no ticket of |tuned - initial| includes them.

        Raises:
            TypeError: `ticket` is no `Ticket`.
            ValueError: a parameter of the ticket is missing on one side, or its shape differs.
        """
        if not isinstance(ticket, Ticket):
            advice = "; pass its gather()" if hasattr(ticket, "gather") else ""
            raise TypeError(f"SparseDelta.between: expected a Ticket, got a {type(ticket).__name__}{advice}")
        base, after = side_by_side(open_weights(initial), open_weights(tuned))
        ticket = ticket.named_as(base)
        names = ticket.active_names
        for side, tensors in (("the initial model", base), ("the tuned model", after)):
            match_names(names, tensors, what="SparseDelta.between", where=side)
            _check_shapes(ticket, tensors, side)
        recorded = ticket.fingerprint  # of the base on which the ticket was selected, which may be another one
        digests = whole_fingerprint({name: base[name] for name in names}, like=recorded)
        if isinstance(initial, nn.Module):
            others = [name for name in names if digests[name] != recorded.get(name)]
            digests |= base_fingerprint(initial, others, digests=digests, like=recorded)
        if flipped := sum(
            _flipped_zeros(base[n], after[n], s) for n, s in ticket.sets.items() if n in base and n in after
        ):
            warnings.warn(
                f"SparseDelta.between: {flipped:,} zeros outside the ticket changed only their sign, and a ticket of "
                "moved entries does not include them: the delta gives the tuned values, but not the tuned bits",
                UserWarning,
                stacklevel=2,
            )
        bare = bare_names(dense or ())
        return cls(
            Ticket(ticket.sets, ticket.shapes, ticket.metadata, digests),
            read_entries(after, ticket, names),
            read_entries(base, ticket, names) if originals else None,
            {bare[name]: whole(tensor).detach().cpu().clone() for name, tensor in (dense or {}).items()},
            metadata,
        )

    def named_as(self, tensors: Mapping[str, Any]) -> SparseDelta:
        """The same delta under the canonical names of a model, see `Ticket.named_as`; dense tensors keep theirs."""
        ticket = self.ticket.named_as(tensors)
        if ticket is self.ticket:
            return self
        assert isinstance(tensors, Named)

        def renamed(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name, values in packed.items():
                canonical = tensors.called(name) or name
                if not torch.equal(bits(found.setdefault(canonical, values)), bits(values)):
                    raise ValueError(
                        f"SparseDelta: {name!r} and another name of the delta are one tied parameter of the model, but "
                        "the delta has different values for each; it was made from a model in which they are not tied"
                    )
            return found

        return SparseDelta(ticket, renamed(self.values), renamed(self.originals), self.dense, self.metadata)

    def followed_by(self, later: SparseDelta) -> SparseDelta:
        """Joins two consecutive deltas into one, which starts from the base of this one.

        Args:
            later: a delta with originals that was made from the result of this one, under the same names.

        Returns:
            The joined delta.

        Raises:
            ValueError: `later` was made from other values than the result of this delta, or one of them has no
                originals.
        """
        for delta, what in ((self, "the first"), (later, "the later")):
            if missing := [name for name in delta.values if name not in delta.originals]:
                raise ValueError(
                    f"SparseDelta.followed_by: {what} delta has no originals of {missing[0]!r}, so its base is "
                    "unknown; make it with originals=True"
                )
        union = self.ticket | later.ticket
        values, originals = {}, {}
        for name in union.active_names:
            indices = union.indices(name)
            halves = [delta for delta in (self, later) if name in delta.values and len(delta.values[name])]
            if len(dtypes := {str(delta.values[name].dtype) for delta in halves}) > 1:
                raise ValueError(
                    f"SparseDelta.followed_by: the deltas hold {name!r} in {' and '.join(sorted(dtypes))}; make both "
                    "from weights of one dtype"
                )
            places = [torch.searchsorted(indices, delta.ticket.indices(name)) for delta in halves]
            values[name] = halves[0].values[name].new_zeros(len(indices))
            originals[name] = values[name].clone()
            for delta, at in zip(halves[::-1], places[::-1], strict=True):
                originals[name][at] = delta.originals[name]
            values[name][places[0]] = halves[0].values[name]
            if len(halves) == 2:
                known = torch.isin(places[1], places[0])
                if not torch.equal(bits(values[name][places[1]][known]), bits(later.originals[name][known])):
                    raise ValueError(
                        f"SparseDelta.followed_by: {name!r} has other values after the first delta than the later one "
                        "was made from; a delta between them is missing, or they belong to different runs"
                    )
                values[name][places[1]] = later.values[name]
        digests = {**later.ticket.fingerprint, **self.ticket.fingerprint}
        ticket = Ticket(union.sets, union.shapes, later.ticket.metadata, digests)
        dense = {**self.dense, **later.dense}
        return SparseDelta(ticket, values, originals, dense, {**self.metadata, **later.metadata})

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

    def apply(
        self,
        model: nn.Module,
        *,
        dtype: str = "same",
        strict: bool = True,
        dense: bool = True,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Writes the delta into the model's parameters, in place. If the model is sharded, each rank writes its shards.

        Args:
            model: the base model, with or without other deltas that this method has applied.
            dtype: "same", or "cast" to accept the same base in another dtype. The base is then compared by the delta's
                original values, because a fingerprint is valid for one dtype only.
            strict: False accepts, with a warning, any base with fitting names and shapes.
            dense: False leaves out the delta's whole tensors, e.g. the LM head of a language delta for a classifier.
            digests: name -> present digest of the model's parameters, if the caller has them.

        Raises:
            ValueError: names, shapes, dtypes or the base do not fit. The model is unchanged then.
        """
        found = self.fitted_to(model, dtype=dtype, strict=strict, dense=dense, digests=digests)
        mine, own, tensors, stack = found.delta, found.own, found.tensors, applied_deltas(model)
        without = [name for name in mine.ticket.active_names if name not in mine.originals]
        if clash := [name for name in without if any(_touches(a, name, mine.ticket.sets[name]) for a in stack)]:
            raise ValueError(
                f"SparseDelta.apply: this delta overlaps another one in {clash[0]!r} and was made without originals; "
                "make it with originals=True to compose them"
            )
        sets = own.ticket.sets
        entry = Applied(self, {}, {name: tensors[name].clone() for name in found.dense}, mine.ticket.sets, sets)
        places = self._places({name: tensors[name] for name in mine.ticket.active_names}, sets)
        exchanges = [Exchange(entries, tensors, own.values) for entries in places]
        undo = [*(exchange.put_back for exchange in exchanges), *copies(entry.dense, tensors)]
        with torch.no_grad(), restoring(undo, stack):
            for exchange in exchanges:
                exchange.run()
                entry.displaced |= exchange.entries.split(exchange.displaced)
            new = own.values_over(entry.displaced)
            composed = {name: values for name, values in new.items() if values is not own.values[name]}
            for entries in entries_of({name: tensors[name] for name in composed}, sets):
                entries.scatter_(tensors, entries.join(composed))
            for name, tensor in found.dense.items():
                tensors[name].copy_(tensor)
            stack.append(entry)

    def fitted_to(
        self,
        model: nn.Module,
        *,
        dtype: str = "same",
        strict: bool = True,
        dense: bool = True,
        digests: Mapping[str, str] | None = None,
    ) -> Fitted:
        """Finds the tensors of the delta in a model and compares the base. Writes nothing.

        Args:
            model, dtype, strict, dense, digests: as for `apply`.

        Returns:
            The delta under the model's names, and the tensors that it changes.

        Raises:
            ValueError: as for `apply`.
        """
        if dtype not in ("same", "cast"):
            raise ValueError(f'SparseDelta.apply: dtype must be "same" or "cast", got {dtype!r}')
        stack = applied_deltas(model)
        reshard(model)
        parameters = canonical_parameters(model)
        tensors = _everything(model, parameters)
        match_names(self.ticket.active_names, parameters, what="SparseDelta.apply", where="the model")
        mine = self.named_as(parameters)
        names = mine.ticket.active_names
        _check_shapes(mine.ticket, parameters, "the model")
        whole = self.dense if dense else {}
        for name, tensor in whole.items():
            if tensors.called(name) is None or tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"SparseDelta.apply: the model has no tensor {name!r} of shape {list(tensor.shape)}; "
                    f"closest: {closest(name, tensors)}. Pass dense=False to leave the {len(self.dense)} whole tensors "
                    "of this delta out"
                )
            if strict and dtype == "same" and tensors[name].dtype != tensor.dtype:
                raise ValueError(
                    f"SparseDelta.apply: {name!r} is {tensors[name].dtype} in the model, {tensor.dtype} in the delta; "
                    'pass dtype="cast" to convert it'
                )
        if strict:
            mine._check_base({name: parameters[name].detach() for name in names}, stack, dtype, digests or {})
        else:
            warnings.warn("SparseDelta.apply: strict=False, the base model is not compared", UserWarning, stacklevel=3)
        replaced = {tensors.called(name) or name: tensor for name, tensor in whole.items()}
        blocks = {name: own_block(tensor, Cut.of(tensors[name], f"{name!r}")) for name, tensor in replaced.items()}
        held = {name: local(tensors[name]).detach() for name in [*names, *replaced]}
        return Fitted(mine, mine._own_part(parameters), held, blocks)

    def _own_part(self, tensors: Mapping[str, Tensor]) -> SparseDelta:
        """The part of the delta that lies in this rank's shards."""
        names = self.ticket.active_names
        if not any(is_sharded(tensors[name]) for name in names):
            return self
        cuts = {name: Cut.of(tensors[name], f"SparseDelta: {name!r}") for name in names}
        found = {name: own_entries(self.ticket.sets[name], cut) for name, cut in cuts.items()}
        ticket = Ticket({name: own for name, (own, _) in found.items()}, {n: cut.sizes for n, cut in cuts.items()})
        values, originals = (
            {name: packed[name][slots] for name, (_, slots) in found.items() if name in packed}
            for packed in (self.values, self.originals)
        )
        return SparseDelta(ticket, values, originals)

    def values_over(self, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> [k] values that `apply` writes over the current ones.

        They are the tuned values, or `current + delta` where the current bits are not the original ones.

        Args:
            current: name -> [k] present values.

        Returns:
            `values[name]` itself where all current bits are the original ones.
        """
        return {name: self._over(name, held) for name, held in current.items()}

    def _places(self, tensors: Mapping[str, Tensor], sets: Mapping[str, IndexSet]) -> list[Entries]:
        """The active entries in a model. They are reused for models with the same devices and dtypes."""
        if self._known_sets is not sets or not same_places(self._known, tensors):
            self._known, self._known_sets = entries_of(tensors, sets), sets
        return self._known

    def _over(self, name: str, current: Tensor) -> Tensor:
        """[k] the tuned bits where the current bits are the original ones, else the current value plus the delta."""
        if name not in self.originals:
            return self.values[name]
        originals = self.originals[name].to(current.device)
        now, base = bits(current), bits(originals.to(current.dtype))
        if torch.equal(now, base):
            return self.values[name]
        values = self.values[name].to(current.device)
        added = (current.float() + (values.float() - originals.float())).to(current.dtype)
        return torch.where(now == base, values.to(current.dtype), added)

    def _check_base(
        self, tensors: Mapping[str, Tensor], stack: list[Applied], dtype: str, digests: Mapping[str, str]
    ) -> None:
        """Raises ValueError unless the model without its applied deltas is the base of this one."""
        wanted, changed = self.ticket.fingerprint, _changed(stack)
        unread = {
            name: tensor
            for name, tensor in tensors.items()
            if wanted.get(name) not in (None, digests.get(name))
            and name not in changed
            and tensor.dtype == self._dtype_of_base(name)
        }
        digests = {**digests, **whole_fingerprint(unread, like=wanted)}
        for name, tensor in tensors.items():
            own = self.values[name].dtype, self._dtype_of_base(name)
            if dtype == "same" and (other := [each for each in own if each != tensor.dtype]):
                raise ValueError(
                    f"SparseDelta.apply: {name!r} is {tensor.dtype} in the model, {other[0]} in the "
                    'delta; pass dtype="cast" if it is the same base in another dtype'
                )
            cast = tensor.dtype != self._dtype_of_base(name)
            if cast and name not in self.originals:
                raise ValueError(
                    f"SparseDelta.apply: {name!r} in {tensor.dtype} cannot be compared with the base of this delta, "
                    "which was made without originals; strict=False applies it without comparing"
                )
            before = _before(name, tensor, stack)
            if cast:
                # fingerprints are of one dtype, so only the original values can be compared
                same = entries_equal(before, self.ticket.sets[name], self.originals[name].to(before.dtype))
            else:
                found = digests if before is tensor else whole_fingerprint({name: before}, like=wanted)
                same = name not in wanted or found[name] == wanted[name]
            if not same:
                raise ValueError(
                    f"SparseDelta.apply: {name!r} is not the tensor this delta was made from. Load the base model; "
                    'dtype="cast" accepts it in another dtype, strict=False any model'
                )

    def _dtype_of_base(self, name: str) -> torch.dtype:
        """The dtype of a parameter of the base; without originals that of the values, which is mostly the same."""
        return self.originals.get(name, self.values[name]).dtype

    def advance(self, model: nn.Module) -> SparseDelta:
        """Applies this delta on top of the latest one of a model and joins the two, so that chains build no stack.

        first.apply(model)
        latest = second.advance(model)  # `second` was made from the weights with `first`
        latest = third.advance(model)   # `third` was made from the weights with `second`
        latest.revert(model)            # back to the base

        Args:
            model: a model with a delta applied, whose present weights are the base of this delta.

        Returns:
            The joined delta, which is now applied in place of the latest one.

        Raises:
            ValueError: no delta is applied, or this delta has another base. Nothing has changed then.
        """
        stack = applied_deltas(model)
        if not stack:
            raise ValueError("SparseDelta.advance: no delta is applied to the model; use apply for the first one")
        reshard(model)
        parameters = canonical_parameters(model)
        mine, below, with_dense = self.named_as(parameters), stack[-1].delta, bool(stack[-1].dense)
        names = match_names(mine.ticket.active_names, parameters, what="SparseDelta.advance", where="the model")
        _check_shapes(mine.ticket, parameters, "the model")
        first = below.named_as(parameters)
        if not with_dense:  # it was applied without its whole tensors
            first = SparseDelta(first.ticket, first.values, first.originals, None, first.metadata)
        both = first.followed_by(mine)
        wanted, now = mine.ticket.fingerprint, {name: parameters[name].detach() for name in names}
        found = whole_fingerprint({name: tensor for name, tensor in now.items() if name in wanted}, like=wanted)
        others = [name for name in found if found[name] != wanted[name]]
        # `between` on a module with deltas records the fingerprint of the model without them
        found |= base_fingerprint(model, others, parameters, like=wanted)
        for name, tensor in now.items():
            originals = mine.originals[name]
            if tensor.dtype != originals.dtype or not entries_equal(tensor, mine.ticket.sets[name], originals):
                found[name] = "other entries"
            if name in found and found[name] != wanted.get(name):
                raise ValueError(
                    f"SparseDelta.advance: {name!r} is not the tensor that this delta was made from; apply the deltas "
                    "of a chain in their order, each once"
                )
        if lower := [n for n in names if n not in first.values and n in _changed(stack[:-1])]:
            # for these, only this delta has a fingerprint, and that of weights with the lower deltas of the stack
            digests = {**both.ticket.fingerprint, **base_fingerprint(model, lower, parameters, like=wanted)}
            both.ticket = Ticket(both.ticket.sets, both.ticket.shapes, both.ticket.metadata, digests)
        try:
            below.revert(model)
            both.apply(model)
        except BaseException:
            if not stack or stack[-1].delta not in (below, both):
                with warnings.catch_warnings(action="ignore"):  # the warning that the base is not compared
                    below.apply(model, strict=False, dense=with_dense)
            raise
        return both

    def revert(self, model: nn.Module) -> None:
        """Undoes the latest `apply` of this delta, bit for bit.

        Raises:
            ValueError: it is not applied, or a later delta overlaps it and must be reverted first.
        """
        stack = applied_deltas(model)
        at = next((i for i in reversed(range(len(stack))) if stack[i].delta is self), None)
        if at is None:
            raise ValueError("SparseDelta.revert: this delta is not applied to the model")
        entry = stack[at]
        for later in stack[at + 1 :]:
            shared = [n for n in entry.displaced if _touches(later, n, entry.sets[n])]
            shared += [name for name in entry.dense if name in _changed([later])]
            if shared:
                raise ValueError(
                    f"SparseDelta.revert: {later.delta!r} was applied later and overlaps in {shared[0]!r}; "
                    "revert that one first"
                )
        reshard(model)
        tensors = _everything(model, canonical_parameters(model))
        written = {name: local(tensors[name]).detach() for name in [*entry.displaced, *entry.dense]}
        places = self._places({name: written[name] for name in entry.displaced}, entry.own)
        exchanges = [Exchange(entries, written, entry.displaced) for entries in places]
        now = {name: written[name].clone() for name in entry.dense}
        undo = [*(exchange.put_back for exchange in exchanges), *copies(now, written)]
        with torch.no_grad(), restoring(undo, stack):
            for exchange in exchanges:
                exchange.run()
            for name, tensor in entry.dense.items():
                written[name].copy_(tensor)
            del stack[at]

    def save(
        self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = file_shards.MAX_SHARD_SIZE
    ) -> None:
        """Writes a safetensors file atomically, or several shards and an index.

        Args:
            path: the file.
            max_shard_size: bytes, or text such as "5GB", from which on shards are written; None: never.
        """
        _check_keys(self.ticket)
        tensors, description = pack_sets(self.ticket.sets, self.ticket.shapes)
        for part in _PARTS:
            tensors |= {f"{part}/{name}": tensor for name, tensor in getattr(self, part).items()}
        file_shards.save(
            path,
            "delta",
            tensors,
            {
                "parameters": description,
                "fingerprint": self.ticket.fingerprint,
                "ticket": self.ticket.metadata,
                "metadata": self.metadata,
            },
            max_shard_size,
        )

    @classmethod
    @reader("delta")
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Reads and verifies a delta that `save` has written.

        Args:
            path: the path that was given to `save`, an index of shards, or a folder with one delta.

        Raises:
            FileFormatError: the file is damaged or of another kind.
        """
        tensors, metadata = file_shards.load(path, "delta")
        parts = {
            part: {n.removeprefix(f"{part}/"): t for n, t in tensors.items() if n.startswith(f"{part}/")}
            for part in _PARTS
        }
        with files.understanding(path, "delta"):
            sets, shapes = unpack_sets(tensors, metadata["parameters"])
            ticket = Ticket(sets, shapes, metadata["ticket"], checked_fingerprint(metadata["fingerprint"], sets))
            _check_keys(ticket)
            return cls(ticket, parts["values"], parts["originals"], parts["dense"], metadata["metadata"])


_applied: weakref.WeakKeyDictionary[nn.Module, list[Applied]] = weakref.WeakKeyDictionary()


def applied_deltas(model: nn.Module) -> list[Applied]:
    """The stack of deltas applied to a model, earliest first.

    It is the list itself, not a copy, and shared by all wrappers of one base model. A copy of a model has an empty one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model that deltas are applied to, got a {type(model).__name__}; pass the module")
    model = unwrapped(model)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "roberta", model)
    return _applied.setdefault(base if isinstance(base, nn.Module) else model, [])


def base_fingerprint(
    model: nn.Module,
    names: Iterable[str],
    parameters: Mapping[str, Tensor] | None = None,
    digests: Mapping[str, str] | None = None,
    like: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Name -> digest of a model's parameters without the applied deltas.

    Args:
        model: a model with or without applied deltas.
        names: canonical names of parameters.
        parameters: `canonical_parameters(model)`, if the caller has them.
        digests: present digests of these parameters, if the caller has them.
        like: name -> digest to compare with (`weights.digests.fingerprint`).
    """
    stack, known = applied_deltas(model), digests or {}
    if parameters is None:
        reshard(model)
    parameters = canonical_parameters(model) if parameters is None else parameters
    changed = _changed(stack)
    taken = {name: known[name] for name in names if name in known and name not in changed}
    rest = {name: _before(name, parameters[name].detach(), stack) for name in names if name not in taken}
    return {**taken, **whole_fingerprint(rest, like)}


def _changed(stack: list[Applied]) -> set[str]:
    """The names of all tensors that the deltas of the stack have changed."""
    return {name for applied in stack for name in (*applied.displaced, *applied.dense)}


def _before(name: str, tensor: Tensor, stack: list[Applied]) -> Tensor:
    """The tensor without the deltas of the stack."""
    for applied in reversed(stack):
        if name in applied.displaced:
            tensor = tensor.clone()
            scatter_(local(tensor), applied.own[name], applied.displaced[name])
        if name in applied.dense:
            tensor = tensor.clone()
            local(tensor).copy_(applied.dense[name])
    return tensor


def _touches(applied: Applied, name: str, index_set: IndexSet) -> bool:
    entries = name in applied.displaced and applied.sets[name].combine(index_set, "&").k > 0
    return entries or name in applied.dense


def read_entries(tensors: Mapping[str, Readable], ticket: Ticket, names: Iterable[str]) -> dict[str, Tensor]:
    """Name -> [k] values of the active entries, on the CPU. Tensors of a checkpoint are read one at a time."""
    held = {n: tensor for n in names if isinstance(tensor := tensors[n], Tensor) and not is_sharded(tensor)}
    found = {name: values.cpu() for name, values in gather_all(held, ticket.sets).items()}
    for name in names:
        if is_sharded(tensors[name]):
            found[name] = gather_from_ranks(tensors[name], ticket.sets[name]).cpu()
        elif name not in held:
            found[name] = gather(read_piece(tensors[name], 0, tensors[name].numel()), ticket.sets[name])
    return {name: found[name] for name in names}


def _flipped_zeros(base: Readable, after: Readable, index_set: IndexSet) -> int:
    """The number of entries outside the set that are zeros of different sign."""
    if base.dtype != after.dtype:
        return 0
    sharded = next((tensor for tensor in (base, after) if is_sharded(tensor)), None)
    if sharded is not None:
        cut = Cut.of(sharded, "SparseDelta.between")
        own, _ = own_entries(index_set, cut)
        found = _flipped_zeros(own_block(base, cut), own_block(after, cut), own)
        count = torch.tensor([found], dtype=torch.int64, device=local(sharded).device)
        return int(sum_over(spread(sharded), count))
    found = start = 0
    for one, other in pairs_of_pieces(base, after):
        stop = start + one.numel()
        flipped = (one == other) & (bits(one) != bits(other))
        if bool(flipped.any()):
            found += int((flipped & ~index_set.entries(start, stop).mask().cpu()).sum())
        start = stop
    return found


def _everything(model: nn.Module, parameters: Named[nn.Parameter]) -> Named[Tensor]:
    """Canonical name -> parameter or buffer."""
    buffers = canonical_buffers(model)
    return Named({**buffers, **parameters}, {**buffers.aliases, **parameters.aliases})


def _check_keys(ticket: Ticket) -> None:
    for name in ticket.sets:
        if name.startswith(tuple(f"{part}/" for part in _PARTS)):
            raise ValueError(
                f"SparseDelta: in a file the indices of {name!r} would be taken for {name.partition('/')[0]}; "
                "rename the parameter"
            )


def _check_shapes(ticket: Ticket, tensors: Mapping[str, Any], where: str) -> None:
    for name in ticket.active_names:
        if isinstance(tensors[name], Tensor) and tensors[name].is_meta:
            check_plain_tensor(tensors[name], f"{where}: {name!r}")
        if tensors[name].shape != ticket.shapes[name]:
            raise ValueError(
                f"{where}: {name!r} has shape {list(tensors[name].shape)}, "
                f"the ticket was made for {list(ticket.shapes[name])}"
            )
