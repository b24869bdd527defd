"""`Follower`: keeps a model at the newest version of a store, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from ltp_sparse.sync import records
from ltp_sparse.sync.base import check_base
from ltp_sparse.sync.local import ActiveEntries, Homes, Model, have_moved, local_part, weights_of
from ltp_sparse.sync.records import ANCHOR, CHANGES, Marker, Part, PartFile, WrongBase
from ltp_sparse.sync.stores import Store, open_store
from ltp_sparse.sync.version import Version
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.digests import Hash
from ltp_sparse.weights.reading import FileFormatError
from ltp_sparse.weights.sharding import is_sharded

_TRIES = 3  # a publisher can remove old versions while they are read


class Follower:
    """Keeps a model at the newest version of a store.

    follower = ls.sync.Follower(model, "weights/")
    while serving:
        if version := follower.follow():
            print(version.number)
        ...

    Load the trainer's initial model first; its values at the ticket's entries do not matter. The first call of `follow`
    reads an anchor version and compares everything outside the ticket. Later calls read changes only. Every value of
    every version is compared with its digest before the model is changed, and either all tensors are written or none.
    The follower holds the ticket and the marker of the present version, and no weights.

    Args:
        model: a module or a mapping from names to tensors. Weights that are not in the store are left as they are.
        store: as for `Publisher`.

    Attributes:
        version: the present version of the model; None before the first one.

    Raises:
        ValueError: a weight of the model is sharded.
    """

    def __init__(self, model: Model, store: Store | str | os.PathLike[str]) -> None:
        self._tensors = weights_of(model, "Follower")
        if sharded := [name for name, tensor in self._tensors.items() if is_sharded(tensor)]:
            raise ValueError(
                f"Follower: {sharded[0]!r} is sharded; expected a model, or a mapping to tensors, that is not"
            )
        self._homes = Homes(model, self._tensors, "Follower")
        self._store = open_store(store)
        self._ticket: Ticket | None = None
        self._digest = ""  # of the ticket
        self._checked = ""  # digest of the part outside the ticket that was compared last
        self._active = ActiveEntries([], {})
        self._marker: Marker | None = None  # that of the present version

    @property
    def version(self) -> int | None:
        """The number of the version that the model has; None before the first `follow`."""
        return None if self._marker is None else self._marker.version

    def __repr__(self) -> str:
        return f"Follower({self._store!r}, version {self.version})"

    def follow(self) -> Version | None:
        """Brings the model to the newest version.

        Returns:
            The changes of the model, or None if there is no new version.

        Raises:
            ValueError: the model is not the published one, other code has changed its active entries or replaced a
                weight, or the store was replaced.
            FileFormatError: a version up to the newest one is missing or damaged.
            Exception: any error of a store that cannot be reached. The model has its previous bits after every error.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._follow()
            except FileNotFoundError as error:
                if not left:
                    raise FileFormatError(
                        str(error.filename or error), "is missing, but another file of the store names it"
                    ) from error
        raise AssertionError

    def _follow(self) -> Version | None:
        versions = records.versions(self._store.names())
        if not versions:
            return None
        newest = records.read_marker(self._store, versions[-1])
        self._check_run(newest)
        if newest.version == self.version:
            return None
        self._homes.check()
        anchor, chain = self._way(versions, newest)
        if self._digest != newest.ticket or have_moved(self._tensors, self._active.parts.values()):
            self._take(newest.ticket)
        before = self._active.gather()
        slots = [values.clone() for values in before]
        if anchor is not None:
            self._fill(anchor, anchor.anchor, slots, check=True)
        for marker in chain:
            self._fill(marker, marker.changes, slots)
        self._active.scatter_(slots, before)
        nbytes = sum(marker.nbytes(CHANGES) for marker in chain) + (anchor.nbytes(ANCHOR) if anchor else 0)
        base, self._marker = self.version, newest
        return Version(newest.version, base, nbytes, self._active, slots, before)

    def _check_run(self, newest: Marker) -> None:
        """Raises ValueError if the store no longer has the present version of the model, but that of another run."""
        at = self._marker
        if at is None:
            return
        problem = ""
        if newest.run != at.run:
            problem = f"the versions in {self._store!r} are of another run than this model's version {at.version}"
        elif newest.version < at.version:
            problem = f"the newest version in {self._store!r} is {newest.version}, this model is at {at.version}"
        elif newest.version == at.version and newest != at:
            problem = f"version {at.version} in {self._store!r} is not the one that this model is at"
        if problem:
            raise ValueError(f"Follower: {problem}: the store was replaced; make a new Follower")

    def _way(self, versions: Sequence[int], newest: Marker) -> tuple[Marker | None, list[Marker]]:
        """(anchor to start from, or None for the present model; versions whose changes follow), in the fewest bytes."""
        there, chain, marker, read = set(versions), list[Marker](), newest, 0
        best: tuple[int, Marker, list[Marker]] | None = None
        while True:
            if marker.anchor and (best is None or read + marker.nbytes(ANCHOR) < best[0]):
                best = read + marker.nbytes(ANCHOR), marker, chain[::-1]
            chain.append(marker)
            read += marker.nbytes(CHANGES)
            if marker.base is not None and marker.base == self.version:
                return (None, chain[::-1]) if best is None or read <= best[0] else best[1:]
            if best is not None and (self.version is None or marker.base not in there or read > best[0]):
                return best[1:]
            if marker.base not in there:
                raise FileFormatError(
                    records.marker_name(marker.version),
                    f"version {marker.version} is based on version {marker.base}, which is missing, and no anchor "
                    "comes later",
                )
            marker = records.read_marker(self._store, marker.base)

    def _take(self, digest: str) -> None:
        """Reads a ticket and finds its entries in the model."""
        ticket = records.read_ticket(self._store, digest)
        if digest != self._digest:
            self._checked = ""
        for name in ticket.active_names:
            if self._tensors.called(name) is None or self._tensors[name].shape != ticket.shapes[name]:
                raise ValueError(f"Follower: the model has no weight {name!r} of shape {list(ticket.shapes[name])}")
        mine = ticket.named_as(self._tensors)
        parts = [local_part(name, self._tensors[name], "Follower") for name in mine.active_names]
        active = ActiveEntries(
            [part for part in parts if part is not None],
            {name: mine.sets[name].to(self._tensors[name].device) for name in mine.active_names},
        )
        self._ticket, self._digest, self._active = ticket, digest, active

    def _fill(self, marker: Marker, files: Sequence[PartFile], slots: Sequence[Tensor], check: bool = False) -> None:
        """Decodes the parts of a version in place, over the slots of its base."""
        assert self._ticket is not None
        if marker.ticket != self._digest:
            raise FileFormatError(records.marker_name(marker.version), "it has another ticket than a later version")
        parts = [records.read_part(self._store, file, self._ticket) for file in files]
        _check_cover(parts, self._ticket)
        if check:
            self._check_base(parts)
        named = self._active.named(slots)
        names = {name: self._tensors.called(name) or name for name in self._ticket.active_names}
        for part in parts:
            try:
                part.fill(named, names)
            except WrongBase as error:
                if check or marker.base != self.version:
                    raise FileFormatError(
                        part.name, f"damaged: the values of {error.name!r} do not match their digests"
                    ) from error
                raise ValueError(
                    f"Follower: active entries of {error.name!r} are not those of version {self.version}: other "
                    "code has changed the model since; make a new Follower, which begins with an anchor"
                ) from error

    def _check_base(self, parts: Sequence[Part]) -> None:
        """Compares the entries outside the ticket, unless the digests are those of the last comparison."""
        assert self._ticket is not None
        known = Hash()
        for part in parts:
            known.update(repr((part.base, part.base_digests)).encode())
        if known.digest() == self._checked:
            return
        for part in parts:
            if part.base is None:
                raise FileFormatError(part.name, "an anchor without a description of its model")
            check_base(self._tensors, part.base, part.base_digests, self._ticket)
        self._checked = known.digest()


def _check_cover(parts: Sequence[Part], ticket: Ticket) -> None:
    """Raises FileFormatError unless the parts have every slot exactly once."""
    at = dict.fromkeys(ticket.active_names, 0)
    for one in sorted((one for part in parts for one in part.ranges), key=lambda one: (one.name, one.first)):
        if one.first != at[one.name]:
            raise FileFormatError(parts[0].name, f"slots of {one.name!r} are missing or come twice at {at[one.name]}")
        at[one.name] += one.k
    if short := [name for name, end in at.items() if end != ticket.sets[name].k]:
        raise FileFormatError(parts[0].name if parts else "the store", f"slots of {short[0]!r} are missing")
