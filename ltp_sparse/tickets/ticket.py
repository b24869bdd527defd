"""`Ticket`: which entries of a model are active."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from ltp_sparse.tickets.counts import as_share
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.random_sets import random_sets
from ltp_sparse.weights import file_shards, files
from ltp_sparse.weights.digests import fingerprint, is_known
from ltp_sparse.weights.hub import OnHub
from ltp_sparse.weights.names import (
    Named,
    bare_names,
    canonical_tensors,
    layer_of,
    match_names,
    matches,
    module_of,
    parameter_order,
)
from ltp_sparse.weights.reading import closest, reader
from ltp_sparse.weights.tensors import check_plain_tensor
from ltp_sparse.weights.versions import Weights, open_weights

_MOST_ENTRIES = 1 << 40  # of all parameters in a file: a larger number is an error, not an allocation

Pool = Callable[[str], bool] | str | Iterable[str] | None
"""Which parameters may be selected: a predicate on names, a regular expression or several, or None for all."""


def in_pool(names: Iterable[str], pool: Pool) -> list[str]:
    """The names in a pool, in canonical order. Raises ValueError if there are none."""
    names = list(names)
    if pool is None:
        kept = names
    elif callable(pool):
        kept = [name for name in names if pool(name)]
    else:
        patterns = [pool] if isinstance(pool, str) else list(pool)
        kept = [name for name in names if matches(name, patterns)]
    if not kept:
        raise ValueError(f"the pool holds none of the {len(names)} parameters, e.g. {names[:3]}; check its names")
    return parameter_order(kept)


class Ticket(OnHub):
    """Which entries of which parameters are active, with metadata about their origin.

    A ticket lists all parameters of its pool, also those without active entries, under canonical names and in canonical
    order. Make one with `select`, `Ticket.random`, `Ticket.full`, `Ticket.from_masks` or
    `Ticket.from_indices`; combine tickets with ``&``, ``|``, ``-``, ``^`` and ``~``.

    Args:
        sets: index set of every parameter.
        shapes: shape of every parameter.
        metadata: JSON values: method, density, requested k, threshold, ...
        fingerprint: name -> digest of the base model's tensor, for parameters with active entries; may be empty.
    """

    _kind = "ticket"

    def __init__(
        self,
        sets: Mapping[str, IndexSet],
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, Any] | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        self.sets = {name: sets[name] for name in parameter_order(sets)}
        self.shapes = {name: Size(shapes[name]) for name in self.sets}
        self.metadata = files.checked_metadata("Ticket", metadata)
        self.fingerprint = dict(fingerprint or {})
        for name, index_set in self.sets.items():
            if index_set.n != self.shapes[name].numel():
                raise ValueError(
                    f"Ticket: {name!r} has shape {list(self.shapes[name])}, its index set covers {index_set.n} entries"
                )

    @classmethod
    def full(cls, model: Weights, pool: Pool = None) -> Ticket:
        """A ticket of all entries of the pool.

        Args:
            model: a module, a file or folder of a checkpoint, or a mapping from names to tensors or shapes.
            pool: the parameters to include.
        """
        shapes = _shapes(model, pool)
        return cls({name: IndexSet.full(shape.numel()) for name, shape in shapes.items()}, shapes, {"method": "full"})

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Ticket:
        """A ticket from masks.

        Args:
            masks: name -> bool tensor in the parameter's shape, True for active entries.
            metadata: JSON values.

        Raises:
            TypeError: a mask is not a bool tensor.
        """
        named = canonical_tensors(masks)
        for name, mask in named.items():
            check_plain_tensor(mask, f"Ticket.from_masks: the mask of {name!r}")
            if mask.dtype != torch.bool:
                raise TypeError(f"Ticket.from_masks: the mask of {name!r} must be bool, got {mask.dtype}")
        sets = {name: IndexSet.from_mask(mask.cpu()).compact() for name, mask in named.items()}
        return cls(sets, {name: mask.shape for name, mask in named.items()}, metadata)

    @classmethod
    def from_indices(
        cls,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        metadata: Mapping[str, Any] | None = None,
    ) -> Ticket:
        """A ticket from flat positions.

        Args:
            indices: name -> integers [k], flat row-major positions, unique, in any order.
            shapes: name -> shape of the parameter.
            metadata: JSON values.

        Raises:
            ValueError: a shape is missing, or positions repeat or lie outside their parameter.
        """
        indices, bare = canonical_tensors(indices), bare_names(shapes)
        shapes = {bare[name]: shape for name, shape in shapes.items()}
        if missing := [name for name in indices if name not in shapes]:
            raise ValueError(f"Ticket.from_indices: no shape for {missing[0]!r}")
        sets = {}
        for name, flat in indices.items():
            check_plain_tensor(flat, f"Ticket.from_indices: {name!r}")
            try:
                index_set = IndexSet.from_indices(flat.cpu().sort().values, Size(shapes[name]).numel())
            except ValueError as error:
                raise ValueError(f"Ticket.from_indices: {name!r} of shape {list(shapes[name])}: {error}") from error
            sets[name] = index_set.compact()
        return cls(sets, {name: shapes[name] for name in indices}, metadata)

    @classmethod
    def random(
        cls,
        model: Weights,
        *,
        density: float | None = None,
        k: int | None = None,
        seed: int = 0,
        pool: Pool = None,
        like: Ticket | None = None,
        bernoulli: bool = False,
    ) -> Ticket:
        """A random ticket of exactly k entries, uniform over the pool.

        Args:
            model: a module, a file or folder of a checkpoint, or a mapping from names to tensors or shapes.
            density: active share of the pool.
            k: number of active entries, instead of `density`.
            like: a ticket with the counts per parameter to use, instead of `density` (the layer-matched control).
            seed: the same seed gives the same ticket on every machine.
            pool: the parameters to draw from.
            bernoulli: draw each entry with probability `density` instead (as described in the text of SC-SFT).

        Raises:
            ValueError: the arguments contradict each other or do not fit the pool.
        """
        if like is not None and (density is not None or k is not None or pool is not None or bernoulli):
            raise ValueError(
                "Ticket.random: pool and counts come from like=; leave density=, k=, pool= and bernoulli= out"
            )
        shapes = like.shapes if like is not None else _shapes(model, pool)
        per_parameter = None if like is None else {name: s.k for name, s in like.sets.items()}
        sets = random_sets(shapes, density=density, k=k, seed=seed, per_parameter=per_parameter, bernoulli=bernoulli)
        ticket = cls(sets, shapes)
        ticket.metadata = {
            "method": "random matched" if like is not None else "random bernoulli" if bernoulli else "random",
            "seed": seed,
            "density": ticket.density if density is None else float(as_share(density)),
        }
        return ticket

    def named_as(self, tensors: Mapping[str, Any]) -> Ticket:
        """The same ticket under the canonical names of a model, in place of aliases of tied parameters.

        Args:
            tensors: `canonical_parameters` of the model.

        Raises:
            ValueError: two names of the ticket with different entries are one parameter in the model.
        """
        called = {name: tensors.called(name) or name for name in self.sets} if isinstance(tensors, Named) else {}
        if all(name == canonical for name, canonical in called.items()):
            return self
        sets: dict[str, IndexSet] = {}
        for name, canonical in called.items():
            if self.sets[name].digest() != sets.setdefault(canonical, self.sets[name]).digest():
                names = [other for other, at in called.items() if at == canonical]
                raise ValueError(
                    f"Ticket: {' and '.join(map(repr, names))} are one tied parameter of the model, but the ticket has "
                    "different entries for each; select it from a model, or checkpoints, tied like this one"
                )
        shapes = {canonical: self.shapes[name] for name, canonical in called.items()}
        digests = {called[name]: digest for name, digest in self.fingerprint.items() if name in called}
        return Ticket(sets, shapes, self.metadata, digests)

    @property
    def names(self) -> list[str]:
        """The parameters of the pool, in canonical order."""
        return list(self.sets)

    @property
    def active_names(self) -> list[str]:
        """The parameters with at least one active entry."""
        return [name for name, index_set in self.sets.items() if index_set.k]

    @property
    def n(self) -> int:
        """Entries of the pool."""
        return sum(index_set.n for index_set in self.sets.values())

    @property
    def k(self) -> int:
        """Active entries."""
        return sum(index_set.k for index_set in self.sets.values())

    @property
    def density(self) -> float:
        """Active share of the pool, 0 to 1."""
        return self.k / self.n if self.n else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded index."""
        return sum(index_set.nbytes for index_set in self.sets.values())

    def _set(self, name: str) -> IndexSet:
        if name not in self.sets:
            raise KeyError(f"Ticket: no parameter {name!r}; closest: {closest(name, self.sets)}")
        return self.sets[name]

    def mask(self, name: str) -> Tensor:
        """bool tensor in the parameter's shape, True for active entries."""
        return self._set(name).mask().view(self.shapes[name])

    def indices(self, name: str) -> Tensor:
        """int64 [k], flat row-major positions of the active entries, ascending."""
        return self._set(name).indices()

    def rows(self, name: str, start: int, stop: int) -> IndexSet:
        """The active entries inside rows start..stop of a parameter, for row-sharded parameters."""
        index_set = self._set(name)
        rows, row = self.shapes[name][:1].numel(), self.shapes[name][1:].numel()
        if not 0 <= start <= stop <= rows:
            raise ValueError(
                f"Ticket.rows: {name!r} has {rows} rows, expected 0 <= start <= stop, got {start} to {stop}"
            )
        return index_set.entries(start * row, stop * row).compact()

    def entries(self, name: str, start: int, stop: int) -> IndexSet:
        """The active entries among entries start..stop of a parameter's row-major order, for flat shards."""
        index_set = self._set(name)
        if not 0 <= start <= stop <= index_set.n:
            raise ValueError(
                f"Ticket.entries: {name!r} has {index_set.n} entries, expected 0 <= start <= stop, "
                f"got {start} to {stop}"
            )
        return index_set.entries(start, stop).compact()

    def counts(self, by: str = "layer") -> dict[str, tuple[int, int]]:
        """(active entries, entries) by "layer", "module" (attention, feed-forward, ...) or "parameter"."""
        groups: dict[str, Callable[[str], str]] = {"layer": layer_of, "module": module_of, "parameter": str}
        if (group := groups.get(by) if isinstance(by, str) else None) is None:
            raise ValueError(f"Ticket.counts: by must be layer, module or parameter, got {by!r}")
        counts: dict[str, tuple[int, int]] = {}
        for name, index_set in self.sets.items():
            k, n = counts.get(group(name), (0, 0))
            counts[group(name)] = (k + index_set.k, n + index_set.n)
        return counts

    def digest(self) -> str:
        """A hash of the active entries and shapes, independent of the encoding."""
        return files.checksum_of({name: [list(self.shapes[name]), s.digest()] for name, s in self.sets.items() if s.k})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ticket) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        method = f", {self.metadata['method']}" if self.metadata.get("method") else ""
        return (
            f"Ticket({self.k:,} of {self.n:,} entries active ({100 * self.density:.4g} %) "
            f"in {len(self.active_names)} of {len(self.sets)} parameters{method}, {self.nbytes:,} bytes)"
        )

    def _combine(self, other: Ticket, operation: str) -> Ticket:
        if not isinstance(other, Ticket):
            raise TypeError(f"Ticket: can only be combined with a ticket, got {type(other).__name__}")
        shapes = {**self.shapes, **other.shapes}
        for name in set(self.sets) & set(other.sets):
            if self.shapes[name] != other.shapes[name]:
                raise ValueError(
                    f"Ticket: {name!r} has shape {list(self.shapes[name])} in one ticket and "
                    f"{list(other.shapes[name])} in the other; they belong to different models"
                )
        empty = {name: IndexSet.empty(shape.numel()) for name, shape in shapes.items()}
        sets = {
            name: self.sets.get(name, empty[name]).combine(other.sets.get(name, empty[name]), operation)
            for name in shapes
        }
        # Digests that both tickets share, or that only one has. Of different bases, or kinds of digests, none is kept.
        known = {**self.fingerprint, **other.fingerprint}
        digests = {n: d for n, d in known.items() if self.fingerprint.get(n, d) == d and n in sets and sets[n].k}
        return Ticket(sets, shapes, {"method": f"({self._method()} {operation} {other._method()})"}, digests)

    def _method(self) -> str:
        return str(self.metadata.get("method") or "ticket")

    def __and__(self, other: Ticket) -> Ticket:
        return self._combine(other, "&")

    def __or__(self, other: Ticket) -> Ticket:
        return self._combine(other, "|")

    def __sub__(self, other: Ticket) -> Ticket:
        return self._combine(other, "-")

    def __xor__(self, other: Ticket) -> Ticket:
        return self._combine(other, "^")

    def __invert__(self) -> Ticket:
        sets = {name: index_set.complement() for name, index_set in self.sets.items()}
        return Ticket(sets, self.shapes, {"method": f"~{self._method()}"}, self.fingerprint)

    def jaccard(self, other: Ticket) -> float:
        """The overlap: active entries of both divided by active entries of either; 1 for two empty tickets."""
        union = (self | other).k
        return (self & other).k / union if union else 1.0

    def fingerprinted(self, model: nn.Module | Mapping[str, Tensor]) -> Ticket:
        """The same ticket with the fingerprint of a base model."""
        tensors = canonical_tensors(model)
        names = match_names(self.active_names, tensors, what="Ticket.fingerprinted", where="the model")
        return Ticket(self.sets, self.shapes, self.metadata, fingerprint({name: tensors[name] for name in names}))

    def restrict(self, pool: Pool) -> Ticket:
        """The same ticket over fewer parameters."""
        names = in_pool(self.sets, pool)
        fingerprint = {name: self.fingerprint[name] for name in names if name in self.fingerprint}
        return Ticket({n: self.sets[n] for n in names}, self.shapes, self.metadata, fingerprint)

    def save(
        self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = file_shards.MAX_SHARD_SIZE
    ) -> None:
        """Writes a safetensors file atomically, each parameter in its smallest encoding.

        Args:
            path: the file.
            max_shard_size: bytes, or text such as "500MB" or "5GB". A larger ticket becomes shards
                `PATH-TAG-00001-of-00002` and their index `PATH.index.json`, written last. None: always one file.
        """
        file_shards.save(path, "ticket", *self._packed(), max_shard_size)

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes with `max_shard_size=None`."""
        return files.to_bytes("ticket", *self._packed())

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, description = pack_sets(self.sets, self.shapes)
        facts = {"parameters": description, "fingerprint": self.fingerprint, "metadata": self.metadata}
        return tensors, {**facts, "k": self.k, "n": self.n}

    @classmethod
    @reader("ticket")
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Reads and verifies a ticket that `save` has written.

        Args:
            path: the path that was given to `save`, an index of shards, or a folder with one ticket.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is damaged or of another kind.
        """
        return cls._unpacked(path, *file_shards.load(path, "ticket"))

    @classmethod
    def from_bytes(cls, content: bytes, path: str | os.PathLike[str]) -> Ticket:
        """The ticket in a file with this content. `path`: its name, for messages."""
        return cls._unpacked(path, *files.from_bytes(content, path, "ticket"))

    @classmethod
    def _unpacked(
        cls, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> Ticket:
        with files.understanding(path, "ticket"):
            sets, shapes = unpack_sets(tensors, metadata["parameters"])
            ticket = cls(sets, shapes, metadata["metadata"], checked_fingerprint(metadata["fingerprint"], sets))
            if (ticket.k, ticket.n) != (metadata["k"], metadata["n"]):
                raise ValueError(
                    f"it holds {ticket.k:,} of {ticket.n:,} entries, but its metadata says {metadata['k']} of "
                    f"{metadata['n']}"
                )
            return ticket


def _shapes(model: Weights, pool: Pool) -> dict[str, Size]:
    """Shapes of the weights of the pool."""
    if not isinstance(model, Mapping) or isinstance(next(iter(model.values()), None), Tensor):
        weights = open_weights(model)
        return {name: weights[name].shape for name in in_pool(weights, pool)}
    shapes: Mapping[str, Any] = model
    return {name: Size(getattr(shapes[name], "shape", shapes[name])) for name in in_pool(shapes, pool)}


def pack_sets(sets: Mapping[str, IndexSet], shapes: Mapping[str, Size]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and a JSON description of index sets, for a file."""
    tensors, description = {}, {}
    for name, index_set in sets.items():
        index_set = index_set.compact()
        description[name] = {"shape": list(shapes[name]), "encoding": index_set.encoding.name.lower(), "k": index_set.k}
        if index_set.encoding is Encoding.BITMAP:
            tensors[f"{name}.bitmap"] = index_set.data
        elif index_set.encoding is Encoding.LIST16 and index_set.k:
            tensors[f"{name}.list16"] = index_set.data.view(torch.uint16)
            tensors[f"{name}.tile_counts"] = index_set.tile_counts.to(torch.int32)
    return tensors, description


def unpack_sets(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> tuple[dict[str, IndexSet], dict[str, Size]]:
    """The inverse of `pack_sets`. All indices are checked, since kernels rely on them."""
    sets: dict[str, IndexSet] = {}
    shapes: dict[str, Size] = {}
    total = 0
    for name, entry in description.items():
        shapes[name] = Size(entry["shape"])
        n, k, encoding = math.prod(shapes[name]), entry["k"], entry["encoding"]  # numel() would wrap around
        # memory for tile counts follows the claimed shapes, not the size of the file: limit it
        total += n
        if any(size < 0 for size in shapes[name]) or total > _MOST_ENTRIES:
            raise ValueError(
                f"{name!r} cannot have the shape {list(shapes[name])}: at most {_MOST_ENTRIES:,} entries in all"
            )
        if encoding == "full":
            sets[name] = IndexSet.full(n)
        elif encoding == "bitmap":
            sets[name] = IndexSet.from_bitmap(tensors[f"{name}.bitmap"], n)
        elif encoding == "list16" and k == 0:
            sets[name] = IndexSet.empty(n)
        elif encoding == "list16":
            sets[name] = IndexSet.from_list16(
                tensors[f"{name}.list16"].view(torch.int16), tensors[f"{name}.tile_counts"].to(torch.int64), n
            )
        else:
            raise ValueError(f"{name!r} has the unknown encoding {encoding!r}")
        if sets[name].k != k:
            raise ValueError(f"the index of {name!r} holds {sets[name].k} entries, but its description says {k}")
    return sets, shapes


def checked_fingerprint(fingerprint: Any, sets: Mapping[str, IndexSet]) -> dict[str, str]:
    """The fingerprint in a file. Raises ValueError unless it has digests of parameters in the file."""
    if not isinstance(fingerprint, dict) or not all(map(is_known, fingerprint.values())):
        raise ValueError("the fingerprint is not a mapping from names to digests of a known kind")
    if foreign := [name for name in fingerprint if name not in sets]:
        raise ValueError(f"the fingerprint names {foreign[0]!r}, which is not a parameter of the file")
    return fingerprint
