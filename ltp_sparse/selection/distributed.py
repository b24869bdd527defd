"""`select_sharded`: exact global selection by the ranks of a process group, each from its shard of the weights."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, distributed

from ltp_sparse import backends
from ltp_sparse.ops.routes import NonFiniteDelta, select_topk
from ltp_sparse.ops.sources import Reader, Source, StreamSource, TensorSource
from ltp_sparse.selection import sources
from ltp_sparse.selection.budgets import Budget, share_out
from ltp_sparse.selection.outcome import describe
from ltp_sparse.selection.shards import Part, Shard, TicketShard, assembled, whole_digest
from ltp_sparse.selection.sources import Score, Sides
from ltp_sparse.selection.team import GuardedSource, Team, TeamRanks
from ltp_sparse.tickets.bits import TILE, bitmap_words, tiles_of
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Pool, Ticket
from ltp_sparse.tickets.tile_table import STATE_BLOCK, state_blocks
from ltp_sparse.weights.checkpoints import Readable
from ltp_sparse.weights.digests import digest
from ltp_sparse.weights.names import Named, bare_names
from ltp_sparse.weights.sharding import Cut, is_sharded, local
from ltp_sparse.weights.versions import Missing, Weights

_PIECE = 1 << 18  # entries sent at a time, or words of a bitmap


class _Held(NamedTuple):
    """A shard and the tensor of its entries."""

    shard: Shard
    tensor: Readable

    def reader(self, start: int, stop: int) -> Reader:
        """A reader of entries start..stop of the whole parameter, which must lie in the shard."""
        return Reader.of(self.tensor).part(start - self.shard.start, stop - self.shard.start)


class _Report(NamedTuple):
    """What a rank tells the others about its tensors.

    Attributes:
        initial: name -> shard and dtype of its initial tensors.
        common: name -> the shard that it has on both sides.
        after: the names of its tuned tensors or scores.
        quantised: its number of quantised tensors, which are left out.
    """

    initial: dict[str, tuple[Shard, torch.dtype]]
    common: dict[str, Shard]
    after: list[str]
    quantised: int


def select_sharded(
    initial: Weights,
    tuned: Weights | None = None,
    *,
    shards: Mapping[str, Shard] | None = None,
    group: distributed.ProcessGroup | None = None,
    density: float | None = None,
    k: int | None = None,
    budget: Budget = "global",
    pool: Pool = None,
    allow_missing: Missing = False,
    score: Score | None = None,
    method: str = "delta",
    metadata: Mapping[str, Any] | None = None,
) -> TicketShard:
    """`select` by all ranks of a process group. The ticket is that of `select` for any number of ranks and any
    sharding.

    Each rank counts the keys of its own entries. The ranks then add up their histograms, and exchange their counts at
    the threshold so that the earliest of equal entries are taken. Ranks that hold equal shards divide the work.

    Args:
        initial, tuned, score: as in `select`, on every rank. DTensors must be sharded by rows (FSDP2) or replicated.
            Plain tensors and checkpoints are whole parameters unless `shards` names them.
        shards: name -> (start, stop, whole shape), for plain tensors that are shards. A rank can leave out parameters
            of which it holds nothing. Its part of the ticket covers the entries that it has of both `initial` and
            `tuned`.
        group: the process group; None: the default one. All of its ranks must call this function.
        density, k, budget, pool, allow_missing, method, metadata: as in `select`, equal on every rank.

    Returns:
        This rank's part of the ticket.

    Raises:
        ValueError: on every rank: as in `select`, the arguments differ between ranks, or the shards do not cover a
            parameter.
    """
    team = Team(group)
    (base, after, _), reports = team.every(
        lambda: _sides(initial, tuned, score, shards or {}), lambda held: _report(*held)
    )
    sides = [{name: held.tensor for name, held in side.items()} for side in (base, after or {})]
    device = sources.device_of({**sides[0], **sides[1]}.values())  # that of the tuned weights, where there are two
    options = {"density": density, "budget": budget, "method": method, "metadata": metadata}
    agreed, plans = team.every(
        lambda: {**_plan(reports, sides, score is not None, pool, allow_missing, budget, density, k), **options},
        lambda plan: plan,
    )
    _check_equal(plans)
    passes, _ = team.every(lambda: backends.resolve(device, "topk_delta"))
    names, groups, ks = agreed["names of the pool"], agreed["groups"], agreed["k"]

    common = [report.common for report in reports]
    shapes = {name: next(shards[name].shape for shards in common if name in shards) for name in names}
    held = {name: [shards.get(name, Shard(0, 0, shapes[name])) for shards in common] for name in names}
    work = {name: _shared_out(parts) for name, parts in held.items()}
    mine = {name: pieces[team.rank] for name, pieces in work.items()}
    source = GuardedSource(_source(mine, base, after, score, device))
    starts = torch.tensor([[start for start, _ in pieces] for pieces in work.values()], dtype=torch.int64, device="cpu")
    try:
        with torch.no_grad():
            ranks = TeamRanks(team, starts, source)
            selection = select_topk(passes, source, groups, ks, route="histogram", ranks=ranks)
    except NonFiniteDelta as error:
        raise NonFiniteDelta(error.tensor, repr(names[error.tensor])) from None

    bitmaps = dict(zip(names, selection.words.split([bitmap_words(n) for n in source.sizes]), strict=True))
    parts = {name: _own_part(team, bitmaps[name], held[name], work[name]) for name in names}
    local_sets = {name: part for name, part in parts.items() if name in common[team.rank]}
    of_tensors = [counts.sum() for counts in selection.counts.split([tiles_of(n) for n in source.sizes])]
    counts = dict(zip(names, team.sum(torch.stack(of_tensors)).tolist(), strict=True))
    description = describe(
        ks,
        agreed["labels"],
        selection.thresholds,
        found=sum(counts.values()),
        pool=sum(Size(shape).numel() for shape in shapes.values()),
        density=density,
        budget=budget,
        method=method,
        left_out={**agreed["left out"], "quantised": max(report.quantised for report in reports)},
        metadata=metadata,
    )
    gives = frozenset(name for name in local_sets if _ranges(held[name]).index(held[name][team.rank][:2]) == team.rank)
    return TicketShard(
        Ticket(
            local_sets,
            {name: _local_shape(name, held[name][team.rank], base, after) for name in local_sets},
            description,
        ),
        {name: shards[team.rank] for name, shards in held.items()},
        _parts(team, local_sets, held, gives, counts),
        description,
        _fingerprint(team, [name for name in names if counts[name]], base, [report.initial for report in reports]),
        team,
        gives,
        frozenset(n for n in names if len(set(_ranges(held[n]))) == 1 and all(n in shards for shards in common)),
    )


def _sides(
    initial: Weights, tuned: Weights | None, score: Score | None, shards: Mapping[str, Shard]
) -> tuple[dict[str, _Held], dict[str, _Held] | None, int]:
    """(initial tensors, tuned tensors or scores, number of quantised tensors) of this rank.

    The second is None for a score function, which has scores of all entries.
    """
    sides = Sides.of(initial, tuned, score, what="select_sharded")

    def held(side: Named[Readable]) -> dict[str, _Held]:
        bare = bare_names(shards)
        known = {side.called(name) or bare[name]: Shard(*shard) for name, shard in shards.items()}
        return {name: _held(name, tensor, known) for name, tensor in side.items()}

    return held(sides.base), None if callable(score) else held(sides.after), sides.quantised


def _report(base: dict[str, _Held], after: dict[str, _Held] | None, quantised: int) -> _Report:
    initial = {name: (held.shard, held.tensor.dtype) for name, held in base.items()}
    return _Report(initial, _common(base, after), list(after or base), quantised)


def _plan(
    reports: Sequence[_Report],
    sides: Sequence[Mapping[str, Readable]],
    scored: bool,
    pool: Pool,
    allow_missing: Missing,
    budget: Budget,
    density: float | None,
    k: int | None,
) -> dict[str, Any]:
    """What the ranks select from, and how much. Every rank makes the same plan from the reports of all.

    Args:
        reports: the report of every rank.
        sides: this rank's initial tensors, and its tuned tensors or scores.
        scored: whether the second side has scores.
        pool, allow_missing, budget, density, k: as in `select`.
    """
    here = dict.fromkeys(name for report in reports for name in report.initial)
    there = dict.fromkeys(name for report in reports for name in report.after)
    names, alone = sources.names_in_pool(here, there, pool, allow_missing, what="select_sharded", scored=scored)
    shards = {name: [report.common[name] for report in reports if name in report.common] for name in names}
    shapes = {name: _check_cover(name, held) for name, held in shards.items()}
    sources.check_dtypes(names, *sides[scored:], what="select_sharded")
    if not scored:
        sources.warn_of_dtypes([name for name in names if all(name in side for side in sides)], *sides)
    names, groups, labels, ks = share_out(shapes, budget, density=density, k=k)
    return {
        "names of the pool": names, "left out": alone, "groups": groups, "labels": labels, "k": ks, "score": scored,
    }  # fmt: skip


def _held(name: str, tensor: Any, shards: Mapping[str, Shard]) -> _Held:
    if is_sharded(tensor):
        cut = Cut.of(tensor, f"select_sharded: {name!r}")
        if not cut.by_rows:
            raise ValueError(
                f"select_sharded: {name!r} is placed as {tensor.placements} over its mesh; expected DTensors that are "
                "sharded by rows, Shard(0), or replicated; redistribute() it first"
            )
        shard, tensor = Shard(*cut.entries, tensor.shape), local(tensor).detach()
    elif name in shards and isinstance(tensor, Tensor) and tensor.shape != Size(shards[name].shape):
        shard = shards[name]
    else:
        shard = Shard(0, tensor.numel(), tensor.shape)
    n = Size(shard.shape).numel()
    if not 0 <= shard.start <= shard.stop <= n or tensor.numel() != shard.stop - shard.start:
        raise ValueError(
            f"select_sharded: by shards, {name!r} has the entries {shard.start} to {shard.stop} of {n} here, "
            f"but its tensor has {tensor.numel()} entries"
        )
    return _Held(shard, tensor)


def _common(base: dict[str, _Held], after: dict[str, _Held] | None) -> dict[str, Shard]:
    """The shards that this rank has on both sides."""
    if after is None:
        return {name: held.shard for name, held in base.items()}
    common = {}
    for name in base:
        if name in after:
            one, other = base[name].shard, after[name].shard
            sources.check_shape(name, one.shape, other.shape)
            start = max(one.start, other.start)
            common[name] = Shard(start, max(start, min(one.stop, other.stop)), one.shape)
    return common


def _check_cover(name: str, shards: Sequence[Shard]) -> Size:
    """The whole shape of a parameter. Raises ValueError unless its distinct shards cover it exactly."""
    shape = Size(shards[0].shape)
    for shard in shards:
        if Size(shard.shape) != shape:
            raise ValueError(
                f"select_sharded: {name!r} has shape {list(shape)} on one rank and {list(shard.shape)} on another"
            )
    ranges = sorted({(start, stop) for start, stop in _ranges(shards) if start < stop})
    ends = [0, *(stop for _, stop in ranges)]
    if [start for start, _ in ranges] != ends[:-1] or ends[-1] != shape.numel():
        raise ValueError(
            f"select_sharded: the shards of {name!r} must cover its {shape.numel()} entries without gaps or overlaps "
            f"(several ranks may hold an equal shard), got {reprlib.repr(ranges)}"
        )
    return shape


def _check_equal(plans: Sequence[Mapping[str, Any]]) -> None:
    for key, first in plans[0].items():
        for rank, plan in enumerate(plans):
            if plan[key] != first:
                raise ValueError(
                    f"select_sharded: the arguments must be equal on every rank; {key}: rank 0 has "
                    f"{reprlib.repr(first)}, rank {rank} has {reprlib.repr(plan[key])}"
                )


def _shared_out(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    """The piece of a parameter that each rank works on. Ranks with equal shards divide them in whole tiles."""
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, shard in enumerate(shards):
        holders.setdefault((shard.start, shard.stop), []).append(rank)
    pieces = [(0, 0)] * len(shards)
    for (start, stop), ranks in holders.items():
        tiles = tiles_of(stop - start)
        cuts = [min(stop, start + tiles * i // len(ranks) * TILE) for i in range(len(ranks) + 1)]
        for rank, piece in zip(ranks, zip(cuts, cuts[1:], strict=False), strict=True):
            pieces[rank] = piece
    return pieces


def _source(
    pieces: Mapping[str, tuple[int, int]],
    base: Mapping[str, _Held],
    after: Mapping[str, _Held] | None,
    score: Score | None,
    device: torch.device,
) -> Source:
    """This rank's pieces of all tensors, in memory if they are there, else as a stream."""
    nothing = Reader(0, lambda start, stop: torch.empty(0, device=device, dtype=torch.float32), device, copies=False)

    def readers(side: Mapping[str, _Held]) -> list[Reader]:
        return [side[n].reader(start, stop) if start < stop else nothing for n, (start, stop) in pieces.items()]

    if after is None:
        assert callable(score)
        whole = {name: sources.score_reader(score, name, stop, device) for name, (_, stop) in pieces.items()}
        return StreamSource([], [whole[name].part(*piece) for name, piece in pieces.items()], device)
    initial, tuned = readers(base) if score is None else [], readers(after)
    if any(reader.copies or reader.release or reader.device != device for reader in (*initial, *tuned)):
        return StreamSource(initial, tuned, device)
    return TensorSource([r.read(0, r.n) for r in initial], [r.read(0, r.n) for r in tuned])


def _own_part(team: Team, words: Tensor, held: Sequence[Shard], work: Sequence[tuple[int, int]]) -> IndexSet:
    """The index set of this rank's shard, from the bitmaps of the pieces that the ranks worked on."""
    shard = held[team.rank]
    if work == _ranges(held):
        return IndexSet.from_bitmap(words, shard.stop - shard.start)
    return assembled(team, words, Shard(*work[team.rank], shard.shape)).entries(shard.start, shard.stop)


def _parts(
    team: Team,
    sets: Mapping[str, IndexSet],
    held: Mapping[str, Sequence[Shard]],
    gives: frozenset[str],
    counts: Mapping[str, int],
) -> dict[str, Part]:
    """Name -> place of this rank's active entries among all. `counts`: active entries of the whole parameters."""
    own = [[sets[n].k, int(state_blocks(sets[n].tile_counts).sum())] if n in gives else [0, 0] for n in held]
    table = torch.tensor(own, dtype=torch.int64, device="cpu").reshape(-1)
    of_ranks = team.stack(table).view(len(held), 2, team.size).tolist() if len(held) else []
    parts = {}
    for (name, shards), (ks, blocks) in zip(held.items(), of_ranks, strict=True):
        n, shard = Size(shards[team.rank].shape).numel(), shards[team.rank]
        before = [rank for rank, other in enumerate(shards) if other.start < shard.start]
        unit = STATE_BLOCK if counts[name] == n else TILE
        apart = all(start % unit == 0 and (stop % unit == 0 or stop == n) for start, stop in _ranges(shards))
        digest = whole_digest(team, sets[name].bitmap() if name in gives else None, shard, counts[name])
        if name in sets:
            parts[name] = Part(
                sets[name], sum(ks[rank] for rank in before), counts[name],
                (sum(blocks[rank] for rank in before), sum(blocks)) if apart else None, shard.start, digest,
            )  # fmt: skip
    return parts


def _ranges(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    return [(shard.start, shard.stop) for shard in shards]


def _local_shape(
    name: str, shard: Shard, base: Mapping[str, _Held], after: Mapping[str, _Held] | None
) -> Sequence[int]:
    """The shape of this rank's own tensor if that is exactly the shard, else a flat shape."""
    for side in (after or {}, base):
        if name in side and side[name].shard[:2] == shard[:2]:
            return side[name].tensor.shape
    return (shard.stop - shard.start,)


def _fingerprint(
    team: Team,
    names: Sequence[str],
    base: Mapping[str, _Held],
    of_ranks: Sequence[Mapping[str, tuple[Shard, torch.dtype]]],
) -> dict[str, str]:
    """Digests of the whole initial tensors. The ranks take turns in hashing and receive the entries they lack."""
    own = {}
    for turn, name in enumerate(names):
        to = turn % team.size
        shards = [shards[name][0] if name in shards else Shard(0, 0, ()) for shards in of_ranks]
        shape, dtype = next((shards[name][0].shape, shards[name][1]) for shards in of_ranks if name in shards)
        pieces = _sent(team, to, base.get(name), shards, Size(shape).numel(), dtype)
        if team.rank == to:
            own[name] = digest(dtype, Size(shape), pieces)
        else:
            for _ in pieces:
                pass
    _, parts = team.every(lambda: own, lambda own: own)
    digests = {name: value for part in parts for name, value in part.items()}
    return {name: digests[name] for name in names}


def _sent(
    team: Team, to: int, held: _Held | None, shards: Sequence[Shard], n: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yields the entries of a parameter in order on rank `to`; the other ranks send theirs in turn."""
    at = 0
    while at < n:
        source = max(range(team.size), key=lambda r: (shards[r].start <= at < shards[r].stop, r == to, shards[r].stop))
        end = shards[source].stop
        for start in range(at, end, _PIECE):
            stop = min(start + _PIECE, end)
            if team.rank == source:
                assert held is not None
                reader = held.reader(start, stop)
                piece = reader.read(0, stop - start)
                if source == to:
                    yield piece
                else:
                    team.send(piece.view(torch.uint8), to)
                if reader.release is not None:
                    reader.release(0, stop - start)
            elif team.rank == to:
                yield team.receive((stop - start) * dtype.itemsize, source).view(dtype)
        at = end
