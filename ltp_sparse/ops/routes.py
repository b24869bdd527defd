"""The routes of `topk_delta`: exact global top-k of |tuned - initial|, in one or two readings of the weights where no
crowd of equal deltas is in the way.

Every entry has a key, the 31 bits of its absolute delta in float32, which order like the delta itself. The k-th largest
key is found in one of three ways, each exact:

* sampled bracket: a million sampled keys give a narrow band that holds the k-th key almost surely; one pass marks
  what lies above it and collects the candidates inside. The counts verify it; otherwise
* histogram: one pass counts the keys by their upper 15 bits, the second is the band pass over the bin that holds the
  k-th key;
* ties: where the band overflows the room for candidates (many equal deltas, as of bfloat16 weights), a second histogram
  gives the exact key, and two band passes give the entries at that key to the earliest: four readings. Where the
  sample shows the crowd, a band of its key alone is tried first: two readings, and no candidates.

The passes are a backend's (`backends/arguments.py` says what they do). All counts and bounds stay on the device of the
weights; the host reads where a route is decided, once if the sampled band holds. Temporary memory: the bitmap that is
the result (n/8 bytes), and candidates of at most n/156 entries at 6 bytes, worked off in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import RUN, Above, Band, CandidateBins, Histogram, Tensors, Ties
from ltp_sparse.backends.reference import NONFINITE_KEY, delta_keys
from ltp_sparse.ops.sources import Source, TensorSource
from ltp_sparse.tickets.bits import WORDS_PER_TILE
from ltp_sparse.tickets.layout import Layout

SAMPLES = 1 << 20
"""Sampled keys, in runs of neighbours; at most one entry in `_SAMPLE_SHARE`."""

DEVIATIONS = 8.0
"""Half the width of a bracket, in standard deviations of independent samples. Neighbours are alike, as rows move more
than others, or not at all: with such rows, made up for XLM-R-base, samples deviated 1.6 to 2.8 times as far."""

SAMPLE_FROM = 1 << 24
"""Entries from which on the sample pays on a CPU (2^23: 4.0 ms by histogram, 4.6 by sample; 2^26: 33 and 25)."""

SAMPLE_FROM_GPU = 1 << 22
"""The same on a GPU, where Triton's histogram pass is plain PyTorch."""

_SAMPLE_SHARE = 32
_FEWEST_DEVIATIONS = 3.0  # a bracket that must be narrower, to fit the room, is not tried
_SPARE_CANDIDATES = 1 << 18
_PIECE = 1 << 15  # entries looked at at a time for one that is not finite
_HISTOGRAMS = 1 << 18  # bins held at a time, of as many groups as they serve
_CANDIDATE_BITS = 14  # of a candidate's key, found at a time


class NonFiniteDelta(ValueError):
    """A delta is NaN or infinite.

    Args:
        tensor: the position of its tensor.
        what: how the tensor is called.
        alike: entries that are the same infinity in both versions, if that is known.
    """

    def __init__(self, tensor: int, what: str, alike: int = 0) -> None:
        message = f"topk_delta: the delta of {what} holds NaN or infinite values; a ranking needs finite weights"
        if alike:
            message += (
                f". {alike:,} entries are the same infinity in both versions, and the difference of those is NaN: "
                "write torch.finfo(dtype).min or max in their place in both, or leave the parameter out with pool="
            )
        super().__init__(message)
        self.tensor = tensor


class Ranks:
    """The processes that select together, each from its own pieces of the tensors: here, one that has them whole.

    `selection.distributed` knows the others. Every process takes the same route, so these calls pair up.
    """

    def sum(self, counts: Tensor) -> Tensor:
        """Sums over the processes, on the same device."""
        return counts

    def in_order(self, counts: Tensor) -> Tensor:
        """int64 [P] of every process -> [P, R], each tensor's pieces in the order of their entries."""
        return counts[:, None]

    def places(self, tensors: int) -> Tensor:
        """int64 [P]: the columns of `in_order` that are this process's."""
        return torch.zeros(tensors, dtype=torch.int64, device="cpu")


@dataclass
class Selection:
    """The result of `topk_delta`.

    words:      int32, the bitmaps of all tensors, 2 * ceil(n / 64) words each
    counts:     int64 [T], active entries of every tile
    thresholds: float32 [G], the smallest selected |delta| of each group; infinite where nothing was selected

    All on the device of the weights.
    """

    words: Tensor
    counts: Tensor
    thresholds: Tensor


def _on(device: torch.device, values: Sequence[int] | Tensor) -> Tensor:
    """int64 [len(values)] on `device`; torch does not wait for it."""
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.int64, device="cpu")
    return values.to(device, torch.int64, non_blocking=True)


class _Band:
    """The arrays of a band pass, and what can be told from them.

    wanted: int64 [G], entries to be selected from each group
    """

    def __init__(
        self, passes: Backend, source: Source, layout: Layout, groups: list[int], wanted: Tensor, ranks: Ranks
    ) -> None:
        device = source.device
        self.passes, self.source, self.layout, self.ranks = passes, source, layout, ranks
        self.groups, self.wanted = groups, wanted
        tile_offsets, word_offsets = (
            torch.tensor(layout.tile_offsets, dtype=torch.int64, device="cpu"),
            torch.tensor(layout.word_offsets, dtype=torch.int64, device="cpu"),
        )
        tile_tensor = torch.repeat_interleave(
            torch.arange(len(groups), dtype=torch.int64, device="cpu"), tile_offsets.diff()
        )
        tile_word = word_offsets[tile_tensor] + WORDS_PER_TILE * (
            torch.arange(layout.tiles, dtype=torch.int64, device="cpu") - tile_offsets[tile_tensor]
        )
        self.tile_tensor, self.tile_word = _on(device, tile_tensor), _on(device, tile_word)
        self.tile_group = _on(device, torch.tensor(groups, dtype=torch.int64, device="cpu")[tile_tensor])
        self.first_tile = _on(device, tile_offsets[:-1])
        capacity = room_for(sum(layout.sizes))
        self.words = torch.empty(layout.words, dtype=torch.int32, device=device)
        self.above, self.inside, self.offsets = (
            torch.empty(layout.tiles, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.keys = torch.empty(capacity, dtype=torch.int32, device=device)
        self.positions = torch.empty(capacity, dtype=torch.int16, device=device)
        self.nonfinite = torch.zeros(1, dtype=torch.int64, device=device)

    def run(self, low: Tensor, high: Tensor, take: Tensor | None = None, store: bool = True) -> None:
        """Marks, counts and collects. low, high: int64 [G]"""
        self.low, self.high = low, high
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.words.device)
        capacity = self.keys.numel() if store else 0
        for chunk in self.source.chunks(range(len(self.groups))):
            band = Band(
                initial=Tensors(chunk.initial),
                tuned=Tensors(chunk.tuned),
                groups=[self.groups[t] for t in chunk.tensors],
                low=low,
                high=high,
                words=self.words,
                word_offsets=chunk.word_offsets,
                above=self.above[chunk.tiles],
                inside=self.inside[chunk.tiles],
                take=None if take is None else take[chunk.tiles],
                keys=self.keys[:capacity],
                positions=self.positions[:capacity],
                offsets=self.offsets[chunk.tiles],
                cursor=self.cursor,
                nonfinite=self.nonfinite,
                digests=chunk.digests if take is None else None,
            )
            self.passes.delta_band(band)

    def per_group(self, per_tile: Tensor) -> Tensor:
        """int64 [G]: sums of a count over the tiles of every group."""
        sums = torch.zeros_like(self.wanted)
        return self.ranks.sum(sums.index_add_(0, self.tile_group, per_tile))

    def missing(self) -> Tensor:
        """int64 [G]: how many entries of its band each group still has to take.

        A band that starts at the smallest key holds all there is: then fewer entries than wanted may have moved, and
        all are taken.
        """
        missing = self.wanted - self.per_group(self.above)
        return torch.where(self.low == 1, torch.minimum(missing, self.per_group(self.inside)), missing)

    def outcome(self) -> tuple[bool, bool, bool, bool]:
        """Of a band that has run. Waits for the device.

        (a delta is not finite, the k-th largest key of every group lies inside its band, all candidates are stored,
        every band is a single key, so that its entries differ in nothing but their place)
        """
        missing, inside = self.missing(), self.per_group(self.inside)
        holds = ((self.wanted == 0) | ((missing >= 1) & (missing <= inside))).all()
        stored = (self.cursor <= self.keys.numel()).all()
        one_key = (self.high - self.low == 1).all()
        nonfinite, *rest = torch.stack([self.nonfinite[0] > 0, holds, stored, one_key]).tolist()
        return (nonfinite, *rest)

    @property
    def _candidates(self) -> dict[str, Tensor]:
        """The fields of `Candidates`."""
        return {
            "keys": self.keys,
            "positions": self.positions,
            "offsets": self.offsets,
            "inside": self.inside,
            "tile_groups": self.tile_group,
        }

    def thresholds(self, rank: Tensor) -> Tensor:
        """int64 [G]: the key of each group's candidate of this rank (1: the largest), digit by digit; no rank: 0."""
        groups, device = rank.numel(), rank.device
        bits = max(1, min(_CANDIDATE_BITS, (_HISTOGRAMS // groups).bit_length() - 1))
        low, high = self.low, self.high
        for _ in range(-(-31 // bits)):
            last = (high - low - 1).clamp(min=0)
            if device.type == "cpu" and not last.any():  # where looking is free
                break
            shift = (torch.frexp(last.double()).exponent - bits).clamp(min=0).long()
            histogram = torch.zeros(groups, 1 << bits, dtype=torch.int64, device=device)
            self.passes.candidate_histogram(
                CandidateBins(**self._candidates, low=low, high=high, shift=shift, histogram=histogram)
            )
            digit, rank, _ = _bins_of_ranks(self.ranks.sum(histogram), rank)
            low = low + (digit << shift)
            high = torch.minimum(high, low + (1 << shift))
        return low

    def finish(self) -> Selection:
        """Takes the missing entries from the candidates: larger keys first, then the earliest at the threshold."""
        missing = self.missing()
        cut = torch.where(missing > 0, self.thresholds(missing), NONFINITE_KEY)
        taken, ties = (torch.empty_like(self.above) for _ in range(2))
        marks = {**self._candidates, "cut": cut, "words": self.words, "tile_words": self.tile_word}
        self.passes.take_above(Above(**marks, taken=taken, ties=ties))
        take = self.share_ties(ties, missing - self.per_group(taken))
        self.passes.take_ties(Ties(**marks, take=take))
        return self.selection(self.above + taken + take, cut)

    def finish_ties(self) -> Selection:
        """Takes the missing entries of bands of a single key, the earliest first."""
        missing, above = self.missing(), self.above.clone()
        take = self.share_ties(self.inside, missing)
        self.run(self.low, self.high, take=take, store=False)
        self.ranks.sum(self.nonfinite)  # where the others hear of an error in this reading
        return self.selection(above + take, torch.where(missing > 0, self.low, NONFINITE_KEY))

    def share_ties(self, ties: Tensor, wanted: Tensor) -> Tensor:
        """int64 [T]: how many ties each tile takes when the earliest tiles of a group are served first."""
        device, tensors = ties.device, len(self.groups)
        per_tensor = torch.zeros(tensors, dtype=torch.int64, device=device).index_add_(0, self.tile_tensor, ties)
        pieces = self.ranks.in_order(per_tensor)
        # ties of the group in earlier tensors, and in earlier pieces of the tensor
        group = torch.tensor(self.groups, dtype=torch.int64, device="cpu").repeat_interleave(pieces.shape[1])
        order = group.argsort(stable=True)
        first = _on(device, torch.searchsorted(group[order], group[order]))
        order = _on(device, order)
        before = _before(pieces.to(device).view(-1)[order])
        earlier = torch.empty_like(before).index_copy_(0, order, before - before[first]).view(pieces.shape)
        earlier = earlier.gather(1, _on(device, self.ranks.places(tensors)[:, None])).view(-1)

        before = _before(ties)  # in earlier tiles of this process
        at_start = torch.cat([before, before.new_zeros(1)])[self.first_tile]
        before = before + (earlier - at_start)[self.tile_tensor]
        return torch.minimum((wanted[self.tile_group] - before).clamp(min=0), ties)

    def selection(self, counts: Tensor, cut: Tensor) -> Selection:
        return Selection(self.words, counts, cut.to(torch.int32).view(torch.float32))


def _before(counts: Tensor) -> Tensor:
    """Sums of all earlier items."""
    return counts.cumsum(0) - counts


def _bins_of_ranks(histogram: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [G], three times: the bin of each row that holds the rank-th largest, its rank in the bin, the bin's count.

    histogram: int64 [G, bins]; rank: int64 [G]. Where the rank is 0 or beyond the count of the row, any bin.
    """
    from_top = histogram.flip(1).cumsum(1)
    at = torch.searchsorted(from_top, rank[:, None]).clamp(max=histogram.shape[1] - 1)
    up_to, bins = from_top.gather(1, at).view(-1), histogram.shape[1] - 1 - at
    count = histogram.gather(1, bins).view(-1)
    return bins.view(-1), rank - (up_to - count), count


def raise_nonfinite(source: Source, ranks: Ranks) -> NoReturn:
    """Raises `NonFiniteDelta` for the first tensor that holds one."""
    found = torch.zeros(len(source.sizes), dtype=torch.int64, device="cpu")
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


def sampled_bracket(passes: Backend, source: Source, groups: list[int], ks: list[int]) -> tuple[Tensor, Tensor] | None:
    """Per group a band [low, high) of keys, int64 [G], that holds the k-th largest key almost surely.

    Where many keys are equal and the bands would overflow the room for candidates, those of the k-th largest key of the
    sample alone: they hold it probably. None where bands that fit the room would hold it hardly.
    """
    total, device = sum(source.sizes), source.device
    entries = [0] * len(ks)
    for n, group in zip(source.sizes, groups, strict=True):
        entries[group] += n
    samples = min(SAMPLES, total // _SAMPLE_SHARE)
    runs = [max(1, samples * n // (total * RUN)) if n else 0 for n in entries]
    drawn = [RUN * count for count in runs]
    margins = _margins(ks, entries, drawn)
    if margins is None:
        return None
    ranks = [k * s / max(n, 1) for k, n, s in zip(ks, entries, drawn, strict=True)]
    wanted = [
        max(0, rank)
        for r, margin, s in zip(ranks, margins, drawn, strict=True)
        for rank in (math.floor(r - margin), min(max(round(r), 1), s), math.ceil(r + margin))
    ]

    keys = _sampled_keys(passes, source, groups, entries, runs).view(torch.float32)
    thrice = [part for part in keys.view(-1).split(drawn) for _ in range(3)]
    of_samples, each = TensorSource([], thrice), list(range(len(thrice)))
    rank, unset = _on(device, wanted), torch.zeros(1, dtype=torch.int64, device=device)  # samples are finite
    upper = digit_pass(passes, of_samples, each, rank, None, Ranks(), unset)
    lower = digit_pass(passes, of_samples, each, upper.rank, upper.digit, Ranks(), unset)
    found, beyond = joined(upper, lower).view(-1, 3), (upper.asked < rank).view(-1, 3)
    none_moved = (beyond & (upper.asked.view(-1, 3) == 0))[:, 0]
    top = found[:, 0].masked_fill(none_moved, 0)  # beyond what has moved: the smallest key of all that has
    centre, bottom = found.masked_fill(beyond, 0)[:, 1:].unbind(1)
    larger = (upper.asked - lower.rank).view(-1, 3)
    within = larger[:, 2] + lower.count.view(-1, 3)[:, 2] - larger[:, 0]  # samples, of all equal to an end too
    per_sample = torch.tensor(
        [n / s if k and n else 0.0 for k, n, s in zip(ks, entries, drawn, strict=True)],
        dtype=torch.float32,
        device="cpu",
    )
    fits = (within * per_sample.to(device, non_blocking=True)).sum() <= room_for(total)

    one_key, no_budget = ~fits & (centre > 0), _on(device, ks) == 0
    low = torch.where(one_key, centre, bottom.clamp(min=1)).masked_fill(no_budget, NONFINITE_KEY)
    high = torch.where(one_key, centre, top.clamp(max=NONFINITE_KEY - 1)).masked_fill(no_budget, NONFINITE_KEY) + 1
    return low, torch.maximum(high, low + 1)


def _margins(ks: list[int], entries: list[int], drawn: list[int]) -> list[float] | None:
    """Per group half the width of its bracket, in samples: `DEVIATIONS`, or as many as fit the room for candidates.

    None if that is too few.
    """
    deviations, width = [], 0.0  # the width is that of all brackets, in entries
    for k, n, samples in zip(ks, entries, drawn, strict=True):
        share = k / max(n, 1)
        deviations.append(math.sqrt(max(samples * share * (1 - share), 1)))
        width += 2 * DEVIATIONS * deviations[-1] * n / samples if k and n else 0
    factor = min(DEVIATIONS, DEVIATIONS * 0.9 * room_for(sum(entries)) / max(width, 1))
    return None if factor < _FEWEST_DEVIATIONS else [factor * deviation + 2 for deviation in deviations]


def _sampled_keys(passes: Backend, source: Source, groups: list[int], entries: list[int], runs: list[int]) -> Tensor:
    """int32 [R, RUN]: the keys of a random run out of each of `runs[g]` equal parts of the entries of every group."""
    device, generator = source.device, np.random.default_rng(0)  # chooses the route only, never the result
    order = sorted(range(len(groups)), key=groups.__getitem__)
    sizes = np.array([source.sizes[tensor] for tensor in order])
    starts = sizes.cumsum() - sizes  # of the tensors, group after group
    first, per_run = np.cumsum(entries) - entries, np.array(entries) / np.maximum(runs, 1)
    entry = np.concatenate(
        [at + width * (np.arange(n) + generator.random(n)) for at, width, n in zip(first, per_run, runs, strict=True)]
    ).astype(np.int64)
    at = np.searchsorted(starts, entry, side="right") - 1
    run = np.minimum((entry - starts[at]) // RUN, np.maximum(sizes[at] // RUN - 1, 0))
    keys = torch.empty(len(entry), RUN, dtype=torch.int32, device=device)
    tensors, runs_there = (_on(device, torch.from_numpy(chosen)) for chosen in (np.array(order)[at], run))
    source.sample(passes, tensors, runs_there, keys)
    return keys


@dataclass
class Digits:
    """Of the key of a certain rank, int64 [G] each, on the device of the weights.

    digit: its upper 15 bits, or its lower 16; where the rank is 0, that of no finite key
    rank:  its rank among the keys of that digit
    asked: the rank that was asked for; where a group has fewer keys, their number
    count: the keys of that digit
    own:   those of this process
    """

    digit: Tensor
    rank: Tensor
    asked: Tensor
    count: Tensor
    own: Tensor


def digit_pass(
    passes: Backend,
    source: Source,
    groups: list[int],
    wanted: Tensor,
    prefixes: Tensor | None,
    ranks: Ranks,
    nonfinite: Tensor,
) -> Digits:
    """Per group the upper 15 bits of the key of rank `wanted` or, given these as `prefixes`, the lower 16.

    nonfinite: int64 [1], set to 1 if an infinity or a NaN was seen
    """
    bins = 1 << (15 if prefixes is None else 16)
    at_once = _HISTOGRAMS // bins
    found = []
    for first in range(0, wanted.numel(), at_once):
        batch = range(first, min(first + at_once, wanted.numel()))
        histogram = torch.zeros(len(batch), bins, dtype=torch.int64, device=source.device)
        upper = None if prefixes is None else prefixes[first : batch.stop]
        for chunk in source.chunks([tensor for tensor, group in enumerate(groups) if group in batch]):
            of_batch = [groups[t] - first for t in chunk.tensors]
            sides = Tensors(chunk.initial), Tensors(chunk.tuned)
            passes.delta_histogram(Histogram(*sides, of_batch, upper, histogram, nonfinite))
        total = ranks.sum(histogram)
        asked = torch.minimum(wanted[first : batch.stop], total.sum(1))
        digit, rank, count = _bins_of_ranks(total, asked)
        own = histogram.gather(1, digit[:, None]).view(-1)
        none = asked == 0
        digit = digit.masked_fill(none, NONFINITE_KEY >> 16)
        found.append((digit, *(t.masked_fill(none, 0) for t in (rank, asked, count, own))))
    return Digits(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def joined(upper: Digits, lower: Digits) -> Tensor:
    """int64 [G]: the keys that have these digits; where the rank is 0, that of no finite one."""
    keys = ((upper.digit << 16) + lower.digit).clamp(min=1)
    return torch.where(lower.rank > 0, keys, NONFINITE_KEY)


def check_finite(nonfinite: Tensor, source: Source, ranks: Ranks) -> None:
    """Raises `NonFiniteDelta` if a pass has set the flag."""
    if int(ranks.sum(nonfinite)):
        raise_nonfinite(source, ranks)


def sampling_pays(source: Source) -> bool:
    """Whether the sampled route, of one reading as a rule, is the faster one."""
    return source.can_sample and sum(source.sizes) >= (SAMPLE_FROM if source.device.type == "cpu" else SAMPLE_FROM_GPU)


def select_topk(
    passes: Backend,
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
    if not ks or not ranks.sum(torch.tensor([layout.tiles], dtype=torch.int64, device="cpu")).any():
        counts = torch.zeros(layout.tiles, dtype=torch.int64, device=source.device)
        none = torch.full((len(ks),), torch.inf, device=source.device, dtype=torch.float32)
        return Selection(torch.zeros(layout.words, dtype=torch.int32, device=source.device), counts, none)
    wanted = _on(source.device, ks)
    sampled = route == "sample" or route == "auto" and sampling_pays(source)
    bracket = sampled_bracket(passes, source, groups, ks) if sampled else None
    band = _Band(passes, source, layout, groups, wanted, ranks)  # its arrays come when the samples have gone
    if bracket is not None:
        band.run(*bracket)
        nonfinite, holds, stored, one_key = band.outcome()
        if nonfinite:
            raise_nonfinite(source, ranks)
        if holds and stored:
            return band.finish()
        if holds and one_key:
            return band.finish_ties()

    upper = digit_pass(passes, source, groups, wanted, None, ranks, band.nonfinite)
    band.wanted = upper.asked
    overflows = upper.own.sum().view(1) > band.keys.numel()
    nonfinite, overflowing = ranks.sum(torch.cat([band.nonfinite, overflows.long()])).tolist()
    if nonfinite:
        raise_nonfinite(source, ranks)
    if not overflowing:
        band.run((upper.digit << 16).clamp(min=1), (upper.digit + 1) << 16)
        return band.finish()

    lower = digit_pass(passes, source, groups, upper.rank, upper.digit, ranks, band.nonfinite)
    thresholds = joined(upper, lower)
    band.run(thresholds, thresholds + 1, store=False)
    return band.finish_ties()
