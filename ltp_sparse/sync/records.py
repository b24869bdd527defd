"""The files of a store. Each is verified when it is read.

    ticket-DIGEST.safetensors       the ticket, once
    v000000000012-changes-0.safetensors   a process's part of version 12: the changes since the version before
    v000000000012-anchor-0.safetensors    a process's part of an anchor: all slots, and a description of the base model
    v000000000012.json              the marker, written last: version, base, and the parts with their digests

A version without its marker does not exist, even if its parts are there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltp_sparse.sync.encoding import decode, encode
from ltp_sparse.sync.stores import Store
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights import files
from ltp_sparse.weights.digests import BYTES, Hash, is_known
from ltp_sparse.weights.reading import FileFormatError, decoded, parse_json, reader

_KIND = "version of ltp_sparse"
_MARKER = re.compile(r"v(\d{12})\.json")
_PART = re.compile(r"v(\d{12})-(changes|anchor)-\d+\.safetensors")

CHANGES, ANCHOR = "changes", "anchor"


class Range(NamedTuple):
    """Slots `first` to `first + k` of a parameter of the ticket."""

    name: str
    first: int
    k: int


@dataclass(frozen=True)
class PartFile:
    """A file of a version, as listed in its marker.

    Attributes:
        name: its name in the store.
        nbytes: its size.
        digest: the digest of its content.
    """

    name: str
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Marker:
    """The marker that commits a version.

    Attributes:
        version: its number.
        base: the version to which its changes apply; None if it has no changes, only an anchor.
        ticket: the digest of the ticket.
        changes: the files of its changes, one per process.
        anchor: the files of its anchor; empty for most versions.
        run: a random string that is drawn with the first version of a store and kept in all later ones.
    """

    version: int
    base: int | None
    ticket: str
    changes: tuple[PartFile, ...]
    anchor: tuple[PartFile, ...]
    run: str = ""

    def nbytes(self, kind: str) -> int:
        """Bytes of the files of its `CHANGES` or of its `ANCHOR`."""
        return sum(part.nbytes for part in (self.changes if kind == CHANGES else self.anchor))


# --- names ------------------------------------------------------------------------------------------------------------


def marker_name(version: int) -> str:
    """The name of a version's marker."""
    return f"v{version:012d}.json"


def part_name(version: int, kind: str, rank: int) -> str:
    """The name of the file with the `CHANGES` or the `ANCHOR` of one process."""
    return f"v{version:012d}-{kind}-{rank}.safetensors"


def ticket_name(digest: str) -> str:
    """The name of the ticket with this digest."""
    return f"ticket-{digest.rpartition(':')[2]}.safetensors"


def versions(names: set[str]) -> list[int]:
    """The numbers of committed versions, ascending."""
    return sorted(int(found[1]) for name in names if (found := _MARKER.fullmatch(name)))


def outdated(names: set[str], keep: int) -> list[str]:
    """The files to remove: those of versions before the `keep` newest anchors, and parts without a marker.

    Markers come first, so that an interruption leaves no marker without its parts.
    """
    committed = set(versions(names))
    parts = {name: (int(found[1]), found[2]) for name in names if (found := _PART.fullmatch(name))}
    anchored = sorted({version for version, kind in parts.values() if kind == ANCHOR} & committed)
    oldest = anchored[-keep] if len(anchored) >= keep else -1
    gone = sorted(version for version in committed if version < oldest)
    left = committed.difference(gone)
    return [*map(marker_name, gone), *sorted(name for name, (version, _) in parts.items() if version not in left)]


# --- markers ----------------------------------------------------------------------------------------------------------


def write_marker(store: Store, marker: Marker) -> None:
    """Commits a version, whose parts must be in the store."""
    facts = {"kind": _KIND, **asdict(marker)}
    store.write(marker_name(marker.version), json.dumps({**facts, "checksum": files.checksum_of(facts)}).encode())


@reader("marker of a version")
def read_marker(store: Store, version: int) -> Marker:
    """The marker of a version.

    Raises:
        FileNotFoundError: there is none.
        FileFormatError: it is damaged.
    """
    name = marker_name(version)
    facts = parse_json(decoded(store.read(name), name), name)
    with files.understanding(name, _KIND):
        if facts.pop("checksum") != files.checksum_of(facts) or facts.pop("kind") != _KIND:
            raise FileFormatError(name, "damaged: its content does not match its own checksum")
        changes, anchor = (tuple(PartFile(**part) for part in facts.pop(kind)) for kind in (CHANGES, ANCHOR))
        marker = Marker(**facts, changes=changes, anchor=anchor)
        if marker.version != version or not is_known(marker.ticket):
            raise ValueError(f"it is of version {marker.version}")
        return marker


def write_ticket(store: Store, ticket: Ticket) -> None:
    """Writes a ticket unless the store has it."""
    if (name := ticket_name(ticket.digest())) not in store.names():
        store.write(name, ticket.to_bytes())


@reader("ticket of a store")
def read_ticket(store: Store, digest: str) -> Ticket:
    """The ticket with this digest.

    Raises:
        FileNotFoundError: the store has none.
        FileFormatError: its file is damaged or holds another ticket.
    """
    name = ticket_name(digest)
    ticket = Ticket.from_bytes(store.read(name), name)
    if ticket.digest() != digest:
        raise FileFormatError(name, f"the ticket in it has the digest {ticket.digest()}, not {digest}")
    return ticket


# --- parts ------------------------------------------------------------------------------------------------------------


def write_part(
    store: Store,
    name: str,
    names: Sequence[str],
    groups: Sequence[tuple[Sequence[Range], Tensor]],
    earlier: Sequence[Tensor] | None,
    base: Mapping[str, Any] | None = None,
    digests: Sequence[str] = (),
) -> PartFile:
    """Writes a process's part of a version.

    Args:
        store: the store.
        name: the name of the file.
        names: the ticket's active parameters. A range is stored with the position of its name in this list.
        groups: for each dtype, the ranges of this process and their slots.
        earlier: for each group, the slots of the version before; None for an anchor.
        base: for an anchor, the description of the base model (JSON values, see `sync.base.described`).
        digests: the digests that belong to `base`.

    Returns:
        The file, for the marker.
    """
    place = {parameter: position for position, parameter in enumerate(names)}
    tensors: dict[str, Tensor] = {}
    facts = []
    for number, (ranges, slots) in enumerate(groups):
        planes, how = encode(slots, None if earlier is None else earlier[number])
        tensors |= {f"{number}.{key}": plane for key, plane in planes.items()}
        facts.append({"dtype": str(slots.dtype).removeprefix("torch."), "ranges": len(ranges), **how})
    rows = [(place[one.name], one.first, one.k) for ranges, _ in groups for one in ranges]
    tensors["ranges"] = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 3)
    pieces = [piece for ranges, slots in groups for piece in slots.split([one.k for one in ranges])]
    tensors["digests"] = _packed(map(digest_of, pieces))
    if base is not None:
        tensors["base"] = _packed(digests)
    content = files.to_bytes("part of a version", tensors, {"groups": facts, "base": base})
    store.write(name, content)
    return PartFile(name, len(content), Hash().update(content).digest())


class Part(NamedTuple):
    """A part that was read, whose slots `fill` decodes.

    Attributes:
        name: the name of its file.
        groups: for each dtype, the number of ranges and how their slots are encoded.
        ranges: the ranges of all groups.
        digests: the digest of each range after decoding.
        tensors: the encoded slots, by "GROUP.KEY".
        base: the description of the base model (see `sync.base.described`); None unless the part is an anchor's.
        base_digests: the digests that belong to `base`.
    """

    name: str
    groups: list[dict[str, Any]]
    ranges: list[Range]
    digests: list[str]
    tensors: dict[str, Tensor]
    base: dict[str, Any] | None
    base_digests: list[str]

    def fill(self, slots: dict[str, Tensor], names: Mapping[str, str]) -> None:
        """Writes the decoded slots into name -> [k], which holds those of the base version, and compares digests.

        Args:
            slots: the slots of whole parameters.
            names: parameter of the ticket -> its key in `slots`.

        Raises:
            FileFormatError: the part is damaged, or was made for other parameters.
            WrongBase: the slots were not those of the base version.
        """
        at = 0
        for number, facts in enumerate(self.groups):
            ranges = self.ranges[at : at + facts["ranges"]]
            digests = self.digests[at : at + facts["ranges"]]
            at += facts["ranges"]
            if not ranges:
                continue
            with files.understanding(self.name, "part of a version"):
                targets = [slots[names[r.name]][r.first : r.first + r.k] for r in ranges]
                if any(len(target) != r.k for target, r in zip(targets, ranges, strict=True)):
                    raise ValueError("a range past the slots of its parameter")
                if {str(target.dtype) for target in targets} != {f"torch.{facts['dtype']}"}:
                    raise ValueError(f"slots in {facts['dtype']} for {ranges[0].name!r} in {targets[0].dtype}")
                values = _one_block(targets)
                planes = {key.partition(".")[2]: t for key, t in self.tensors.items() if key.startswith(f"{number}.")}
                decode(planes, facts, values, values)
            for target, one, digest, new in zip(
                targets, ranges, digests, values.split([r.k for r in ranges]), strict=True
            ):
                if digest_of(new) != digest:
                    raise WrongBase(one.name)
                if new.data_ptr() != target.data_ptr():
                    target.copy_(new)


def _one_block(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces in one tensor: a view if they follow each other in one buffer, else a copy."""
    after = pieces[0].data_ptr()
    for piece in pieces:
        if piece.data_ptr() != after or piece.untyped_storage().data_ptr() != pieces[0].untyped_storage().data_ptr():
            return torch.cat(list(pieces))
        after += piece.nbytes
    return pieces[0].as_strided((sum(map(len, pieces)),), (1,))


class WrongBase(ValueError):
    """The decoded slots do not match the published digests."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@reader("part of a version")
def read_part(store: Store, part: PartFile, ticket: Ticket) -> Part:
    """Reads a part and compares it with the digest in its marker.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is damaged.
    """
    content = store.read(part.name)
    if len(content) != part.nbytes or Hash(part.digest).update(content).digest() != part.digest:
        raise FileFormatError(
            part.name, f"its {len(content):,} bytes are not the {part.nbytes:,} bytes that its marker lists"
        )
    tensors, facts = files.from_bytes(content, part.name, "part of a version")
    with files.understanding(part.name, "part of a version"):
        names, rows = ticket.active_names, tensors.pop("ranges")
        if rows.dtype != torch.int64 or rows.dim() != 2 or rows.shape[1] != 3:
            raise ValueError(f"ranges of {rows.dtype} {list(rows.shape)}")
        ranges = []
        for place, first, k in rows.tolist():
            if not 0 <= place < len(names) or first < 0 or k < 0:
                raise ValueError(f"the range {(place, first, k)}")
            ranges.append(Range(names[place], first, k))
        digests, base = _unpacked(tensors.pop("digests")), facts["base"]
        base_digests = [] if base is None else _unpacked(tensors.pop("base"))
        if base is not None:
            _check_described(base, len(base_digests))
        counts = [group["ranges"] for group in facts["groups"]]
        if sum(counts) != len(ranges) or min(counts, default=0) < 0 or len(digests) != len(ranges):
            raise ValueError(f"{len(ranges)} ranges, {len(digests)} digests, groups of {counts}")
        return Part(part.name, facts["groups"], ranges, digests, tensors, base, base_digests)


def _check_described(base: Mapping[str, Any], digests: int) -> None:
    """Raises ValueError, KeyError or TypeError unless `base` has the form that `sync.base.described` gives it."""
    sizes = {name: math.prod(shape) for name, _, shape in base["weights"]}
    if len(base["inactive"]) != digests:
        raise ValueError(f"{digests} digests of {len(base['inactive'])} parts outside the ticket")
    for name, start, stop in base["inactive"]:
        if not 0 <= start <= stop <= sizes[name]:
            raise ValueError(f"entries {start} to {stop} of {name!r}, which has {sizes[name]}")


def digest_of(slots: Tensor) -> str:
    """The digest of the slots of a range."""
    return Hash().update(slots).digest()


def _packed(digests: Iterable[str]) -> Tensor:
    raw = b"".join(bytes.fromhex(digest.rpartition(":")[2]) for digest in digests)
    return torch.tensor(list(raw), dtype=torch.uint8, device="cpu")


def _unpacked(packed: Tensor) -> list[str]:
    raw = packed.numpy().tobytes()
    if len(raw) % BYTES:
        raise ValueError(f"digests of {len(raw)} bytes")
    return ["xxh3:" + raw[at : at + BYTES].hex() for at in range(0, len(raw), BYTES)]
