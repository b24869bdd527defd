"""`Follower`: keeps a model at the newest version of a store, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from ltp_sparse.sync import records
from ltp_sparse.sync.base import check_base
from ltp_sparse.sync.local import ActiveEntries, Homes, Model, have_moved, is_sharded, local_part, weights_of
from ltp_sparse.sync.records import ANCHOR, CHANGES, Marker, Part, PartFile, WrongBase
from ltp_sparse.sync.stores import Store, open_store
from ltp_sparse.sync.version import Version
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.digests import Hash
from ltp_sparse.weights.reading import FileFormatError

_TRIES = 3  # a publisher may remove old versions while they are read


class Follower:
    """Brings a model to the newest version of a store, and keeps it there.

    follower = ls.sync.Follower(model, "weights/")
    while serving:
        if version := follower.follow():
            print(version.number)
        ...

    The model begins as the one that the trainer began with; what it holds at the ticket's entries does not matter. The
    first call reads an anchor and compares everything outside the ticket, the next ones read what changed. Every value
    of every version is compared with its digest before the model is touched, and all tensors are written or none.
    The follower itself holds nothing but the ticket and a number.

    Args:
        model: a module, or name -> tensor. Weights that the store does not know stay as they are.
        store: as of `Publisher`.

    Attributes:
        version: that the model is at; None: it has not followed yet
    """

    def __init__(self, model: Model, store: Store | str | os.PathLike[str]) -> None:
        self._tensors = weights_of(model, "Follower")
        if sharded := [name for name, tensor in self._tensors.items() if is_sharded(tensor)]:
            raise ValueError(f"Follower: {sharded[0]!r} is sharded; expected a whole model, or name -> whole tensor")
        self._homes = Homes(model, self._tensors, "Follower")
        self._store = open_store(store)
        self._ticket: Ticket | None = None
        self._digest = ""  # of the ticket
        self._checked = ""  # digest of what was compared outside the ticket
        self._active = ActiveEntries([], {})
        self._marker: Marker | None = None  # of the version that the model is at

    @property
    def version(self) -> int | None:
        return None if self._marker is None else self._marker.version

    def __repr__(self) -> str:
        return f"Follower({self._store!r}, version {self.version})"

    def follow(self) -> Version | None:
        """Brings the model to the newest version.

        Returns:
            What changed in the model; None: there is nothing new.

        Raises:
            ValueError: the model is not the published one, was changed by others at active entries, or a weight was
                replaced in it.
            FileFormatError: a version between here and the newest one is missing or damaged.
            Exception: what a store raises that cannot be reached. The model has its former bits in every case.
        """
        for left in reversed(range(_TRIES)):
            try:
                return self._follow()
            except FileNotFoundError as error:
                if not left:
                    raise FileFormatError(
                        str(error.filename or error), "is missing, and another file of the store names it"
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
        return Version.of(newest.version, base, nbytes, self._active, slots, before)

    def _check_run(self, newest: Marker) -> None:
        """Raises a ValueError if the store has lost the version that the model is at to another one."""
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
        """An anchor to begin with, or None for the model as it is, and the versions whose changes come then.

        Of two ways it is that with fewer bytes.
        """
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
        """Decodes the parts of a version into the slots, which are those of its base."""
        assert self._ticket is not None
        if marker.ticket != self._digest:
            raise FileFormatError(records.marker_name(marker.version), "it is of another ticket than a later version")
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
                        part.name, f"damaged: other values of {error.name!r} than its digests say"
                    ) from error
                raise ValueError(
                    f"Follower: active entries of {error.name!r} are not those of version {self.version}: others have "
                    "written to the model since; a new Follower begins with an anchor"
                ) from error

    def _check_base(self, parts: Sequence[Part]) -> None:
        """Compares what lies outside the ticket, once for each table of digests."""
        assert self._ticket is not None
        known = Hash()
        for part in parts:
            known.update(repr((part.base, part.base_digests)).encode())
        if known.digest() == self._checked:
            return
        for part in parts:
            if part.base is None:
                raise FileFormatError(part.name, "an anchor that does not say which model it is of")
            check_base(self._tensors, part.base, part.base_digests, self._ticket)
        self._checked = known.digest()


def _check_cover(parts: Sequence[Part], ticket: Ticket) -> None:
    """Raises a FileFormatError unless the parts have every slot once."""
    ranges = sorted((one for part in parts for one in part.ranges), key=lambda one: (one.name, one.first))
    at = dict.fromkeys(ticket.active_names, 0)
    for one in ranges:
        if one.first != at[one.name]:
            raise FileFormatError(parts[0].name, f"slots of {one.name!r} are missing or come twice at {at[one.name]}")
        at[one.name] += one.k
    if short := [name for name, end in at.items() if end != ticket.sets[name].k]:
        raise FileFormatError(parts[0].name if parts else "the store", f"slots of {short[0]!r} are missing")
