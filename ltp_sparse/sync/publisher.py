"""`Publisher`: writes versions of a model to a store, as the changes of a ticket's entries since the last version."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from operator import index
from typing import Any

from torch import Tensor, distributed

from ltp_sparse.optim.masked_adamw import MaskedAdamW
from ltp_sparse.selection.team import Team
from ltp_sparse.sync import records
from ltp_sparse.sync.base import described, inactive_digests
from ltp_sparse.sync.local import ActiveEntries, Homes, Local, Model, have_moved, local_part, model_of, weights_of
from ltp_sparse.sync.records import ANCHOR, CHANGES, Marker, PartFile, Range
from ltp_sparse.sync.stores import Store, open_store
from ltp_sparse.sync.version import Version
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import match_names
from ltp_sparse.weights.sharding import is_sharded


class Publisher:
    """Publishes versions of a model during training, for any number of followers.

    publisher = ls.sync.Publisher(model, ticket, "weights/")
    for step, batch in enumerate(batches):
        ...
        publisher.publish(step)

    With a ticket, which is written once, a version has only the changes of the ticket's entries: no copy of the model
    and no indices, and publishing takes time in proportion to the ticket. Without a ticket, every weight is compared
    with a copy of the last version, which the publisher holds on the host. Bits are compared, so 0 and -0 differ.

    Every `anchor_every`-th version is also an anchor version, which has all active values and with which new followers
    begin. The first version of every publisher is one, too, so that a restarted trainer need not read the store.
    Weights outside the ticket are digested when the publisher is made, and compared at every anchor version.

    For an FSDP2 model, each process publishes its own rows, and all processes must make the same calls. A version is
    committed when all of its parts are in the store.

    Args:
        model: a module, a mapping from names to tensors, or the MaskedAdamW that trains it. Nothing outside the ticket
            may train, which is checked for an optimizer. `ticket | Ticket.full(model, pool=r"^head\\.")` adds a head.
        ticket: the entries that change; None: any weight can change.
        store: a folder, a URL of fsspec, or a store (`ltp_sparse.sync.stores`).
        anchor_every: the number of versions from one anchor version to the next.
        keep: the number of anchor versions to keep. Versions before the oldest of them are removed.
        group: the process group of a sharded model; None: the default one.

    Attributes:
        version: the latest version of this publisher, or the newest in the store before; None if there is none.

    Raises:
        ValueError: the store has another ticket, the ticket does not fit the model, or a weight is sharded, but not by
            rows.
    """

    def __init__(
        self,
        model: Model | MaskedAdamW,
        ticket: Ticket | None,
        store: Store | str | os.PathLike[str],
        *,
        anchor_every: int = 100,
        keep: int = 2,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        for what, value in (("anchor_every", anchor_every), ("keep", keep)):
            if value < 1:
                raise ValueError(f"Publisher: {what} must be at least 1, got {value}")
        source = model_of(model)
        weights = weights_of(source, "Publisher")
        self._team = Team(group, "Publisher", "") if any(map(is_sharded, weights.values())) else None
        self._rank = 0 if self._team is None else self._team.rank
        ticket = Ticket.full(weights) if ticket is None else ticket.named_as(weights)
        if self._team is None:
            match_names(ticket.active_names, weights, what="Publisher", where="the model")
        if isinstance(model, MaskedAdamW):
            _check_trained(model.named_members(), ticket)
        self._store, self._ticket, self._digest = open_store(store), ticket, ticket.digest()
        self._names = ticket.active_names
        self._anchor_every, self._keep = anchor_every, keep
        self._weights, self._homes = weights, Homes(source, weights, "Publisher")
        self._locate()
        self._inactive = inactive_digests(self._parts, ticket)
        self._since = 0  # versions since the last anchor
        self.version, self._run = self._together(self._open)[0]

    def __repr__(self) -> str:
        return f"Publisher({self._ticket!r}, {self._store!r}, version {self.version})"

    def _locate(self) -> None:
        """Notes the places of the weights in memory."""
        parts = [local_part(name, weight, "Publisher") for name, weight in self._weights.items()]
        self._parts = [part for part in parts if part is not None]
        self._active = _active(self._parts, self._ticket)
        self._ranges = [[self._range(name) for name in group.names] for group in self._active.groups]
        self._earlier: list[Tensor] | None = None

    def _range(self, name: str) -> Range:
        start, k = self._active.parts[name].start, self._active.sets[name].k
        return Range(name, self._ticket.entries(name, 0, start).k if start else 0, k)

    def _follow_moves(self) -> bool:
        """Whether the weights have moved in memory; if so, notes their new places."""
        self._homes.check()
        if moved := have_moved(self._weights, self._parts):
            self._locate()
        return moved

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """The results of `work` on all processes. An error on one is raised on all of them."""
        return [work()] if self._team is None else self._team.every(work, lambda result: result)[1]

    def _open(self) -> tuple[int | None, str]:
        """Removes the leftovers of a killed publisher. Returns (newest version, its run or a new one)."""
        names = self._store.names()
        versions, run = records.versions(names), secrets.token_hex(8)
        if versions:
            newest = records.read_marker(self._store, versions[-1])
            run = newest.run
            if newest.ticket != self._digest:
                raise ValueError(
                    f"Publisher: {self._store!r} has versions of another ticket ({newest.ticket}, this one is "
                    f"{self._digest}); publish to a new store"
                )
        if self._rank == 0:
            for name in records.outdated(names, self._keep):
                self._store.remove(name)
            records.write_ticket(self._store, self._ticket)
        return versions[-1] if versions else None, run

    def publish(self, version: int | None = None) -> Version:
        """Writes the present weights as the next version. Followers can read it as soon as this method returns.

        Args:
            version: its number, which must be above the last one; None: the next number.

        Returns:
            The changes; for a sharded model, those of this process.

        Raises:
            ValueError: the number is not above the last one, another publisher has written to the store, or a weight of
                the model was replaced.
            RuntimeError: a weight outside the ticket has changed, which is checked for anchor versions. Nothing is
                published then.
        """
        number = (-1 if self.version is None else self.version) + 1 if version is None else int(index(version))
        moved, numbers = zip(*self._together(lambda: (self._follow_moves(), number)), strict=True)
        if any(moved):
            self._earlier = None
        if len(set(numbers)) > 1:
            raise ValueError(f"Publisher: the processes publish the versions {numbers}, expected one number for all")
        anchor = self._earlier is None or self._since + 1 >= self._anchor_every
        slots: list[Tensor] = []

        def write() -> tuple[int, list[PartFile], list[PartFile]]:
            self._check(number)
            slots.extend(self._active.gather())
            return (sum(map(len, slots)), *self._write(number, slots, anchor))

        written = self._together(write)
        marker = Marker(
            version=number,
            base=None if self._earlier is None else self.version,
            ticket=self._digest,
            changes=tuple(part for _, changes, _ in written for part in changes),
            anchor=tuple(part for _, _, anchors in written for part in anchors),
            run=self._run,
        )

        def commit() -> None:
            if (found := sum(count for count, _, _ in written)) != self._ticket.k:
                raise ValueError(
                    f"Publisher: the processes have {found:,} of the {self._ticket.k:,} entries of the ticket; but "
                    "for replicas, each must be on exactly one process"
                )
            if self._rank == 0:
                self._check_parts(marker)
                records.write_marker(self._store, marker)

        self._together(commit)
        earlier, self._earlier = self._earlier, slots
        base, self.version = marker.base, number
        self._since = 0 if anchor else self._since + 1
        if anchor and self._rank == 0:
            for name in records.outdated(self._store.names(), self._keep):
                self._store.remove(name)
        _, changes, anchors = written[self._rank]
        return Version(number, base, sum(part.nbytes for part in (*changes, *anchors)), self._active, slots, earlier)

    def _check(self, number: int) -> None:
        newest = max(records.versions(self._store.names()), default=None) if self._rank == 0 else self.version
        if newest != self.version:
            raise ValueError(
                f"Publisher: the newest version in {self._store!r} is {newest}, but this publisher's is {self.version}"
                ": another one has written to the store, or the last call was interrupted; make a new Publisher"
            )
        if not 0 <= number < 10**12 or (newest is not None and number <= newest):
            raise ValueError(
                f"Publisher: expected a version above {newest}, the newest in the store, got {number}; a trainer that "
                "was resumed from an older step publishes again once it is past that version"
            )

    def _check_parts(self, marker: Marker) -> None:
        if self._team is None:
            return
        names = self._store.names()
        if missing := [part.name for part in (*marker.changes, *marker.anchor) if part.name not in names]:
            raise ValueError(
                f"Publisher: process 0 does not see {missing[0]} of another process in {self._store!r}; all processes "
                "must publish to one store, not to folders of their machines"
            )

    def _write(self, number: int, slots: list[Tensor], anchor: bool) -> tuple[list[PartFile], list[PartFile]]:
        groups = list(zip(self._ranges, slots, strict=True))
        changes, anchors = [], []
        if self._earlier is not None:
            name = records.part_name(number, CHANGES, self._rank)
            changes.append(records.write_part(self._store, name, self._names, groups, self._earlier))
        if anchor:
            inactive = inactive_digests(self._parts, self._ticket)
            if changed := [name for (name, first), digest in inactive.items() if digest != self._inactive[name, first]]:
                raise RuntimeError(
                    f"Publisher: entries of {changed[0]!r} outside the ticket have changed ({len(changed)} weights in "
                    "all), which followers would not see; publish ticket | Ticket.full(model, pool=...)"
                )
            base, digests = described(self._parts, inactive)
            name = records.part_name(number, ANCHOR, self._rank)
            anchors.append(records.write_part(self._store, name, self._names, groups, None, base, digests))
        return changes, anchors


def _active(parts: list[Local], ticket: Ticket) -> ActiveEntries:
    held = [local for local in parts if local.name in ticket.sets]
    for local in held:
        if local.shape != ticket.shapes[local.name]:
            raise ValueError(
                f"Publisher: {local.name!r} has shape {list(local.shape)} in the model, "
                f"{list(ticket.shapes[local.name])} in the ticket"
            )
    sets = {local.name: ticket.entries(local.name, local.start, local.stop) for local in held}
    sets = {name: index_set for name, index_set in sets.items() if index_set.k}
    return ActiveEntries([local for local in held if local.name in sets], sets)


def _check_trained(weights: Mapping[str, Any], ticket: Ticket) -> None:
    outside = [name for name in weights if name not in ticket.sets or not ticket.sets[name].k]
    if outside:
        raise ValueError(
            f"Publisher: the optimizer trains {outside[0]!r} in full, but it is not in the ticket ({len(outside)} "
            "weights in all); publish ticket | Ticket.full(model, pool=...)"
        )
