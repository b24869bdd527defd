"""The routes of `topk_delta`: exact global top-k of |tuned - initial|, in one or two readings of the weights where no
crowd of equal deltas is in the way.

Every entry has a key, the 31 bits of its absolute delta in float32, which order like the delta itself. The k-th largest
key is found in one of three ways, each exact:

* sampled bracket: half a million sampled keys give a narrow band that holds the k-th key almost surely; one pass marks
  what lies above it and collects the candidates inside. The counts verify it; otherwise
* histogram: one pass counts the keys by their upper 15 bits, the second is the band pass over the bin that holds the
  k-th key;
* ties: where the band overflows the room for candidates (many equal deltas, as of bfloat16 weights), a second histogram
  gives the exact key, and two band passes give the entries at that key to the earliest: four readings. Where the
  sample shows the crowd, a band of its key alone is tried first: two readings, and no candidates.

The passes are a backend's (`reference.py` says what they do). Temporary memory: the bitmap that is the result (n/8
bytes), and candidates of at most n/156 entries at 6 bytes, worked off in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from ltp_sparse.encoding import TILE, WORDS_PER_TILE, bitmap_words, tiles_of
from ltp_sparse.reference import NONFINITE_KEY, delta_keys

SAMPLES = 1 << 19
"""Sampled keys; a bracket of +-4.5 standard deviations then holds at most 0.62 % of the entries."""

DEVIATIONS = 4.5
SAMPLE_FROM = 1 << 27
"""Entries from which on the sample pays on a CPU (41 ms by histogram, 47 by sample at 86M; 152 and 115 at 278M)."""

SAMPLE_FROM_GPU = 1 << 22
"""The same on a GPU, where the histogram pass is plain PyTorch."""

_SPARE_CANDIDATES = 1 << 18
_PIECE = 1 << 15  # samples worked off at a time
_HISTOGRAMS = 1 << 18  # bins held at a time, of as many groups as they serve


def entries_for(pool: int, *, density: float | None = None, k: int | None = None) -> int:
    """floor(density * pool) in exact decimals (0.2 means one fifth), or k; at most the pool.

    Raises:
        ValueError: neither or both are given, or they do not fit the pool.
    """
    if (density is None) == (k is None):
        raise ValueError(f"give either density= or k=, got density={density} and k={k}")
    if density is not None:
        if not 0 <= density <= 1:
            raise ValueError(f"density must be in [0, 1], got {density}")
        return math.floor(Fraction(str(density)) * pool)
    assert k is not None
    if not 0 <= k <= pool:
        raise ValueError(f"k must be in [0, {pool:,}], the entries of the pool, got {k:,}")
    return k


class Passes(Protocol):
    """What a backend provides; see `reference.py`."""

    @property
    def delta_histogram(self) -> Callable[..., None]: ...
    @property
    def delta_band(self) -> Callable[..., None]: ...
    @property
    def candidate_histogram(self) -> Callable[..., None]: ...
    @property
    def take_above(self) -> Callable[..., None]: ...
    @property
    def take_ties(self) -> Callable[..., None]: ...


class NonFiniteDelta(ValueError):
    """A delta is NaN or infinite. `tensor` is the position of its tensor."""

    def __init__(self, tensor: int, what: str) -> None:
        super().__init__(
            f"topk_delta: the delta of {what} holds NaN or infinite values; a ranking needs finite weights"
        )
        self.tensor = tensor


@dataclass
class Chunk:
    """Whole tiles of consecutive tensors that are in memory at once.

    tensors:      positions of the tensors
    initial:      contiguous pieces, or nothing: zeros
    tuned:        contiguous pieces
    word_offsets: where the bitmap of each piece starts
    tiles:        the tiles of all pieces, in order
    """

    tensors: list[int]
    initial: list[Tensor]
    tuned: list[Tensor]
    word_offsets: list[int]
    tiles: slice


class Source(Protocol):
    """Pairs of tensors to select from, in memory or not."""

    sizes: list[int]
    device: torch.device

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]: ...
    def sample(self, tensor: int, indices: Tensor) -> Tensor: ...


class Layout:
    """Where the tiles and words of tensors of given sizes lie in the flat arrays of a selection."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.tile_offsets = [0]
        self.word_offsets = [0]
        for n in sizes:
            self.tile_offsets.append(self.tile_offsets[-1] + tiles_of(n))
            self.word_offsets.append(self.word_offsets[-1] + bitmap_words(n))

    @property
    def tiles(self) -> int:
        return self.tile_offsets[-1]

    @property
    def words(self) -> int:
        return self.word_offsets[-1]


class TensorSource:
    """Tensors in memory. Those that are not contiguous are copied piece by piece, never whole."""

    PIECE = 8 * TILE

    def __init__(self, initial: Sequence[Tensor], tuned: Sequence[Tensor]) -> None:
        self.initial, self.tuned = list(initial), list(tuned)
        self.sizes = [t.numel() for t in tuned]
        self.device = tuned[0].device if tuned else torch.device("cpu")
        self.layout = Layout(self.sizes)

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        """The given tensors, in ascending order: runs of neighbours at once, strided ones in pieces."""
        run: list[int] = []
        for tensor in tensors:
            sides = (self.initial, self.tuned) if self.initial else (self.tuned,)
            whole = all(side[tensor].is_contiguous() for side in sides)
            if run and not (whole and tensor == run[-1] + 1):
                yield self._whole(run)
                run = []
            if whole:
                run.append(tensor)
            else:
                yield from self._pieces(tensor)
        if run:
            yield self._whole(run)

    def _whole(self, tensors: list[int]) -> Chunk:
        layout = self.layout
        return Chunk(
            tensors,
            [self.initial[t] for t in tensors] if self.initial else [],
            [self.tuned[t] for t in tensors],
            [layout.word_offsets[t] for t in tensors],
            slice(layout.tile_offsets[tensors[0]], layout.tile_offsets[tensors[-1] + 1]),
        )

    def _pieces(self, tensor: int) -> Iterator[Chunk]:
        for start in range(0, self.sizes[tensor], self.PIECE):
            stop = min(start + self.PIECE, self.sizes[tensor])
            initial = [flat_piece(self.initial[tensor], start, stop)] if self.initial else []
            yield piece_of(self.layout, tensor, start, initial, flat_piece(self.tuned[tensor], start, stop))

    def sample(self, tensor: int, indices: Tensor) -> Tensor:
        initial = _at(self.initial[tensor], indices) if self.initial else None
        return delta_keys(initial, _at(self.tuned[tensor], indices))


def piece_of(layout: Layout, tensor: int, start: int, initial: list[Tensor], tuned: Tensor) -> Chunk:
    """The chunk of a piece of one tensor, which starts at entry `start`, a whole number of tiles."""
    first = layout.tile_offsets[tensor] + start // TILE
    words = layout.word_offsets[tensor] + start // TILE * WORDS_PER_TILE
    return Chunk([tensor], initial, [tuned], [words], slice(first, first + tiles_of(tuned.numel())))


def flat_piece(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Entries start..stop of the row-major order of any tensor, contiguous; copies no more than their rows."""
    if tensor.is_contiguous() or tensor.dim() < 2:
        return tensor.reshape(-1)[start:stop].contiguous()  # a strided vector stays strided under reshape
    row = tensor[0].numel()
    first = start // row
    rows = tensor[first : -(-stop // row)].reshape(-1)
    return rows[start - first * row : stop - first * row].contiguous()


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)[indices]
    coordinates: list[Tensor] = []  # torch.unravel_index would import 30 MB of modules
    for size in reversed(tensor.shape):
        coordinates.insert(0, indices % size)
        indices = indices // size
    return tensor[tuple(coordinates)]


class Ranks:
    """The processes that select together, each from its own pieces of the tensors: here, one that has them whole.

    `selection.distributed` knows the others. Every process takes the same route, so these calls pair up.
    """

    def sum(self, counts: Tensor) -> Tensor:
        """Sums over the processes; may be written in place."""
        return counts

    def in_order(self, counts: Tensor) -> Tensor:
        """int64 [P] of every process -> [P, R], each tensor's pieces in the order of their entries."""
        return counts[:, None]

    def places(self, tensors: int) -> Tensor:
        """int64 [P]: the columns of `in_order` that are this process's."""
        return torch.zeros(tensors, dtype=torch.int64)


@dataclass
class Selection:
    """The result of `topk_delta`.

    words:      int32, the bitmaps of all tensors, 2 * ceil(n / 64) words each
    counts:     int64 [T], active entries of every tile
    thresholds: float32 [G], the smallest selected |delta| of each group; infinite where nothing was selected
    """

    words: Tensor
    counts: Tensor
    thresholds: Tensor


class _Band:
    """The arrays of a band pass, and what can be told from them."""

    def __init__(
        self, passes: Passes, source: Source, layout: Layout, groups: list[int], ks: list[int], ranks: Ranks
    ) -> None:
        device = source.device
        self.passes, self.source, self.layout, self.ranks = passes, source, layout, ranks
        self.groups, self.ks = groups, ks
        tiles_of = torch.tensor(layout.tile_offsets).diff()
        self.tile_tensor = torch.repeat_interleave(torch.arange(len(groups)), tiles_of).to(device)
        self.tile_group = torch.tensor(groups, device=device)[self.tile_tensor]
        self.tile_word = torch.tensor(layout.word_offsets[:-1], device=device)[self.tile_tensor] + WORDS_PER_TILE * (
            torch.arange(layout.tiles, device=device)
            - torch.tensor(layout.tile_offsets[:-1], device=device)[self.tile_tensor]
        )
        capacity = room_for(sum(layout.sizes))
        self.words = torch.empty(layout.words, dtype=torch.int32, device=device)
        self.above, self.inside, self.offsets = (
            torch.empty(layout.tiles, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.keys = torch.empty(capacity, dtype=torch.int32, device=device)
        self.positions = torch.empty(capacity, dtype=torch.int16, device=device)
        self.overflowed = False

    def run(self, low: list[int], high: list[int], take: Tensor | None = None, store: bool = True) -> None:
        device = self.words.device
        self.low, self.high = low, high
        bounds = torch.tensor([low, high], dtype=torch.int64, device=device)
        cursor, nonfinite = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        capacity = self.keys.numel() if store else 0
        for chunk in self.source.chunks(range(len(self.groups))):
            self.passes.delta_band(
                chunk.initial,
                chunk.tuned,
                [self.groups[t] for t in chunk.tensors],
                bounds[0],
                bounds[1],
                self.words,
                chunk.word_offsets,
                self.above[chunk.tiles],
                self.inside[chunk.tiles],
                None if take is None else take[chunk.tiles],
                self.keys[:capacity],
                self.positions[:capacity],
                self.offsets[chunk.tiles],
                cursor,
                nonfinite,
            )
        flags = torch.cat([nonfinite, cursor > self.keys.numel()])
        found, overflowed = self.ranks.sum(flags).tolist()
        if found:
            raise_nonfinite(self.source, self.ranks)
        self.overflowed = overflowed > 0

    def per_group(self, per_tile: Tensor) -> list[int]:
        """Sums of a count over the tiles of every group."""
        sums = torch.zeros(len(self.ks), dtype=torch.int64, device=per_tile.device)
        return self.ranks.sum(sums.index_add_(0, self.tile_group, per_tile)).tolist()

    def missing(self) -> list[int]:
        """Per group, how many entries of the band are to be taken.

        A band that starts at the smallest key holds all there is: then fewer than k entries have moved, and all are
        taken.
        """
        above, inside = self.per_group(self.above), self.per_group(self.inside)
        return [
            min(k - a, i) if low == 1 else k - a for k, a, i, low in zip(self.ks, above, inside, self.low, strict=True)
        ]

    def holds(self) -> bool:
        """Whether the k-th largest key of every group lies inside its band."""
        inside = self.per_group(self.inside)
        return all(k == 0 or 1 <= m <= i for k, m, i in zip(self.ks, self.missing(), inside, strict=True))

    @property
    def _candidates(self) -> tuple[Tensor, ...]:
        return self.keys, self.positions, self.offsets, self.inside, self.tile_group

    def threshold(self, group: int, rank: int) -> int:
        """The rank-th largest candidate key of a group (rank >= 1), digit by digit."""
        low, high = self.low[group], self.high[group]
        while high - low > 1:
            shift = max(0, (high - low - 1).bit_length() - 14)
            histogram = torch.zeros(((high - low - 1) >> shift) + 1, dtype=torch.int64, device=self.keys.device)
            self.passes.candidate_histogram(*self._candidates, group, low, high, shift, histogram)
            digit, rank = _bin_of_rank(self.ranks.sum(histogram), rank)
            low, high = low + (digit << shift), min(high, low + ((digit + 1) << shift))
        return low

    def finish(self) -> Selection:
        """Takes the missing entries from the candidates: larger keys first, then the earliest at the threshold."""
        missing = self.missing()
        thresholds = [self.threshold(g, m) if m else NONFINITE_KEY for g, m in enumerate(missing)]
        cut = torch.tensor(thresholds, device=self.words.device)
        taken, ties = (torch.empty_like(self.above) for _ in range(2))
        self.passes.take_above(*self._candidates, cut, self.words, self.tile_word, taken, ties)
        open_ties = [m - t for m, t in zip(missing, self.per_group(taken), strict=True)]
        take = self.share_ties(ties, open_ties)
        self.passes.take_ties(*self._candidates, cut, self.words, self.tile_word, take)
        return self.selection(self.above + taken + take, thresholds)

    @property
    def room(self) -> int:
        """Candidates that all processes together can store."""
        return int(self.ranks.sum(torch.tensor([self.keys.numel()])))

    def holds_one_key(self) -> bool:
        """Whether the band of every group is a single key, so that its entries differ in nothing but their place."""
        return all(high - low == 1 for low, high in zip(self.low, self.high, strict=True))

    def finish_ties(self) -> Selection:
        """Takes the missing entries of bands of a single key, the earliest first."""
        missing, above = self.missing(), self.above.clone()
        take = self.share_ties(self.inside, missing)
        self.run(self.low, self.high, take=take, store=False)
        thresholds = [low if m else NONFINITE_KEY for low, m in zip(self.low, missing, strict=True)]
        return self.selection(above + take, thresholds)

    def share_ties(self, ties: Tensor, open_ties: list[int]) -> Tensor:
        """int64 [T]: how many ties each tile takes when the earliest tiles of a group are served first."""
        tensors = len(self.groups)
        per_tensor = torch.zeros(tensors, dtype=torch.int64, device=ties.device)
        pieces = self.ranks.in_order(per_tensor.index_add_(0, self.tile_tensor, ties)).cpu()
        earlier = torch.empty_like(pieces)  # ties of the group in earlier tensors, and in earlier pieces of the tensor
        for group in range(len(open_ties)):
            mine = torch.tensor([g == group for g in self.groups])
            earlier[mine] = (pieces[mine].view(-1).cumsum(0) - pieces[mine].view(-1)).view(-1, pieces.shape[1])
        earlier = earlier[torch.arange(tensors), self.ranks.places(tensors)]

        before = ties.cumsum(0) - ties  # in earlier tiles of this process
        at_start = torch.cat([before, before.new_zeros(1)])[torch.tensor(self.layout.tile_offsets[:-1])]
        before += (earlier.to(ties.device) - at_start)[self.tile_tensor]
        wanted = torch.tensor(open_ties, device=ties.device)[self.tile_group]
        return torch.minimum((wanted - before).clamp(min=0), ties)

    def selection(self, counts: Tensor, thresholds: list[int]) -> Selection:
        return Selection(self.words, counts, torch.tensor(thresholds, dtype=torch.int32).view(torch.float32))


def _bin_of_rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """(bin that holds the rank-th largest, its rank inside the bin); rank >= 1."""
    from_top = histogram.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_top, rank))
    inside = rank - (int(from_top[at - 1]) if at else 0)
    return histogram.numel() - 1 - at, inside


def raise_nonfinite(source: Source, ranks: Ranks) -> NoReturn:
    """Raises `NonFiniteDelta` for the first tensor that holds one."""
    found = torch.zeros(len(source.sizes), dtype=torch.int64)
    for chunk in source.chunks(range(len(source.sizes))):
        for at, tensor in enumerate(chunk.tensors):
            initial, tuned = chunk.initial[at].view(-1) if chunk.initial else None, chunk.tuned[at].view(-1)
            for start in range(0, tuned.numel(), _PIECE):
                piece = slice(start, start + _PIECE)
                keys = delta_keys(None if initial is None else initial[piece], tuned[piece])
                found[tensor] |= int((keys >= NONFINITE_KEY).any())
    first = int(ranks.sum(found).nonzero()[0])
    raise NonFiniteDelta(first, f"tensor {first}")


def room_for(n: int) -> int:
    """Candidates that there is room for in a selection from n entries."""
    return n // 156 + _SPARE_CANDIDATES


def sampled_bracket(source: Source, groups: list[int], ks: list[int]) -> tuple[list[int], list[int]]:
    """Per group a band [low, high) of keys that holds the k-th largest key almost surely, or, of ties, probably."""
    total = sum(source.sizes)
    generator = torch.Generator().manual_seed(0)  # chooses the route only, never the result
    counts = [min(n, -(-n * SAMPLES // total)) for n in source.sizes]
    drawn = [sum(c for c, g in zip(counts, groups, strict=True) if g == group) for group in range(len(ks))]
    samples = [torch.empty(count, dtype=torch.int32, device=source.device) for count in drawn]
    filled = [0] * len(ks)
    for tensor, (n, count, group) in enumerate(zip(source.sizes, counts, groups, strict=True)):
        for indices in _one_of_each_stratum(n, count, generator):
            start, filled[group] = filled[group], filled[group] + indices.numel()
            samples[group][start : filled[group]] = source.sample(tensor, indices.to(source.device))
    low, high = [], []
    for group, k in enumerate(ks):
        n = sum(size for size, g in zip(source.sizes, groups, strict=True) if g == group)
        keys = samples[group]
        rank = k * keys.numel() / max(n, 1)
        margin = DEVIATIONS * math.sqrt(max(rank * (1 - k / max(n, 1)), 1)) + 2
        top = _kth_largest(keys, math.floor(rank - margin))
        bottom = _kth_largest(keys, math.ceil(rank + margin))
        centre = _kth_largest(keys, min(max(round(rank), 1), keys.numel()))
        if k == 0:
            bottom, top = NONFINITE_KEY, NONFINITE_KEY + 1
        elif centre and int((keys == centre).sum()) * total > room_for(total) * sum(drawn):
            bottom, top = centre, centre + 1  # the ties alone overflow the room: they are not to be stored but counted
        low.append(max(1, bottom))
        high.append(max(low[-1], top) if top > low[-1] else low[-1] + 1)
    return low, high


def _one_of_each_stratum(n: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random index out of each of `count` equal parts of 0..n-1: in memory order, not aligned with rows."""
    for start in range(0, count, _PIECE):
        stratum = torch.arange(start, min(start + _PIECE, count), dtype=torch.float64)
        stratum += torch.rand(stratum.numel(), generator=generator, dtype=torch.float64)
        yield (stratum * (n / count)).long().clamp_(max=n - 1)


def _kth_largest(keys: Tensor, rank: int) -> int:
    """The rank-th largest key; beyond the ends, a key that bounds all finite ones."""
    if rank < 1:
        return NONFINITE_KEY
    if rank > keys.numel():
        return 0
    upper, lower = (torch.zeros(bins, dtype=torch.int64, device=keys.device) for bins in (1 << 15, 1 << 16))
    for piece in keys.split(_PIECE):
        upper += torch.bincount(piece >> 16, minlength=upper.numel())
    digit, rank = _bin_of_rank(upper, rank)
    for piece in keys.split(_PIECE):
        lower += torch.bincount(piece[(piece >> 16) == digit] & 0xFFFF, minlength=lower.numel())
    low, _ = _bin_of_rank(lower, rank)
    return (digit << 16) + low


@dataclass
class Digits:
    """Of the key of a certain rank, per group.

    digit: its upper 15 bits, or its lower 16; where the rank is 0, that of no finite key
    rank:  its rank among the keys of that digit
    asked: the rank that was asked for; where a group has fewer keys, their number
    count: the keys of that digit
    """

    digit: list[int] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    count: list[int] = field(default_factory=list)


def digit_pass(
    passes: Passes, source: Source, groups: list[int], wanted: list[int], prefixes: list[int] | None, ranks: Ranks
) -> Digits:
    """Per group the upper 15 bits of the key of rank `wanted` or, given these as `prefixes`, the lower 16."""
    bins = 1 << (15 if prefixes is None else 16)
    at_once = _HISTOGRAMS // bins
    nonfinite = torch.zeros(1, dtype=torch.int64, device=source.device)
    found = Digits()
    for first in range(0, len(wanted), at_once):
        batch = range(first, min(first + at_once, len(wanted)))
        histogram = torch.zeros(len(batch), bins, dtype=torch.int64, device=source.device)
        upper = None
        if prefixes is not None:
            upper = torch.tensor([prefixes[g] for g in batch], dtype=torch.int64, device=source.device)
        for chunk in source.chunks([tensor for tensor, group in enumerate(groups) if group in batch]):
            of_batch = [groups[t] - first for t in chunk.tensors]
            passes.delta_histogram(chunk.initial, chunk.tuned, of_batch, upper, histogram, nonfinite)
        for group, row in zip(batch, ranks.sum(histogram).cpu(), strict=True):
            asked = min(wanted[group], int(row.sum()))
            digit, rank = _bin_of_rank(row, asked) if asked else (NONFINITE_KEY >> 16, 0)
            found.digit.append(digit)
            found.rank.append(rank)
            found.asked.append(asked)
            found.count.append(int(row[digit]) if asked else 0)
    if int(ranks.sum(nonfinite)):
        raise_nonfinite(source, ranks)
    return found


def joined(upper: Digits, lower: Digits) -> list[int]:
    """The keys that have these digits; where the rank is 0, that of no finite one."""
    each = zip(upper.digit, lower.digit, lower.rank, strict=True)
    return [max(1, (high << 16) + low) if rank else NONFINITE_KEY for high, low, rank in each]


def select_topk(
    passes: Passes,
    source: Source,
    groups: list[int],
    ks: list[int],
    *,
    route: str = "auto",
    ranks: Ranks | None = None,
) -> Selection:
    """The `ks[g]` entries of largest |tuned - initial| of every group of tensors: exact, the earliest first among ties.

    Entries whose delta is zero are never selected: a group may then hold fewer than its k.

    Args:
        passes: the backend.
        source: the pairs of tensors.
        groups: the group of every tensor.
        ks: entries wanted from every group.
        route: "sample", "histogram" or "auto"; all give the same bits.
        ranks: other processes that select together with this one, by the histogram route: the source then has this
            process's pieces of all tensors, the counts asked for are those of all processes.

    Raises:
        NonFiniteDelta: a delta is NaN or infinite.
    """
    layout = Layout(source.sizes)
    if ranks is None:
        ranks = Ranks()
    elif route != "histogram":
        raise ValueError(f'select_topk: several processes take the route "histogram", got {route!r}')
    if not ks or not int(ranks.sum(torch.tensor([layout.tiles]))):
        counts = torch.zeros(layout.tiles, dtype=torch.int64, device=source.device)
        none = torch.full((len(ks),), torch.inf)
        return Selection(torch.zeros(layout.words, dtype=torch.int32, device=source.device), counts, none)
    band = _Band(passes, source, layout, groups, ks, ranks)
    pays_from = SAMPLE_FROM if source.device.type == "cpu" else SAMPLE_FROM_GPU
    if route == "sample" or route == "auto" and sum(source.sizes) >= pays_from:
        band.run(*sampled_bracket(source, groups, ks))
        if band.holds() and not band.overflowed:
            return band.finish()
        if band.holds() and band.holds_one_key():
            return band.finish_ties()

    upper = digit_pass(passes, source, groups, ks, None, ranks)
    band.ks = upper.asked
    if sum(upper.count) <= band.room:
        band.run([max(1, d << 16) for d in upper.digit], [(d + 1) << 16 for d in upper.digit])
        if not band.overflowed:
            return band.finish()

    lower = digit_pass(passes, source, groups, upper.rank, upper.digit, ranks)
    thresholds = joined(upper, lower)
    band.run(thresholds, [t + 1 for t in thresholds], store=False)
    return band.finish_ties()
