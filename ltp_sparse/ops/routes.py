"""The routes of `topk_delta`: the exact global top-k of |tuned - initial|, in one or two readings of the weights.

Every entry has a key, the 31 bits of its absolute delta in float32, which are ordered like the delta itself. The k-th
largest key is found by one of three routes, all exact:

* Sample: a million sampled keys give a narrow band that holds the k-th key almost surely. One pass marks the entries
  above it and collects the candidates inside. Its counts show whether the band was right; if not, the next route runs.
* Histogram: one pass counts the keys by their upper 15 bits. The second is the band pass over the bin that holds the
  k-th key.
* Ties: many equal deltas, as of bfloat16 weights, can overflow the room for candidates. Then a second histogram finds
  the exact key, and two band passes give the entries at that key to the earliest: four readings. If the sample shows
  the crowd, a band of its one key is tried first: two readings and no candidates.

A backend runs the passes (`backends/arguments.py` describes them). All counts and bounds stay on the device of the
weights. The host reads them where a route is decided, which is once if the sampled band holds. A backend with
`select_sampled` decides the sampled route on the device, in one call. Temporary memory is the bitmap of the result, n/8
bytes, and at most n/156 candidates of 6 bytes, processed in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import RUN, Above, Band, CandidateBins, Sampled, Tensors, Ties
from ltp_sparse.backends.reference import NONFINITE_KEY, delta_keys
from ltp_sparse.ops.digits import BINS_AT_ONCE, bins_of_orders, digit_pass, joined
from ltp_sparse.ops.ranks import Ranks
from ltp_sparse.ops.samples import SamplePlan, plan_samples, room_for, sampled_bracket, sent
from ltp_sparse.ops.sources import Source, TensorSource
from ltp_sparse.tickets.layout import Layout, tiles_in_order

SAMPLE_FROM = 1 << 24
"""The fewest entries for which a sample pays on a CPU. 2^23 entries took 4.0 ms by histogram and 4.6 ms by sample, 2^26
took 33 and 25 ms."""

SAMPLE_FROM_GPU = 1 << 22
"""The same for Triton on a GPU, where the histogram pass is plain PyTorch."""

_PIECE = 1 << 15  # entries searched at a time for one that is not finite
_CANDIDATE_BITS = 14  # bits of a candidate's key found at a time


class NonFiniteDelta(ValueError):
    """A delta is NaN or infinite.

    Args:
        tensor: the position of its tensor.
        what: the name of the tensor in the message.
        alike: how many entries are the same infinity in both versions, if that is known.
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


@dataclass
class Selection:
    """The result of `topk_delta`, on the device of the weights.

    Attributes:
        words: int32, the bitmaps of all tensors, 2 * ceil(n / 64) words each.
        counts: int64 [T], the number of active entries of every tile.
        thresholds: float32 [G], the smallest selected |delta| of each group; infinite where nothing was selected.
    """

    words: Tensor
    counts: Tensor
    thresholds: Tensor


class _Band:
    """The arrays of a band pass, and what follows from them.

    Attributes:
        wanted: int64 [G], the number of entries to select from each group.
    """

    def __init__(
        self, passes: Backend, source: Source, layout: Layout, groups: list[int], wanted: Tensor, ranks: Ranks
    ) -> None:
        device = source.device
        self.passes, self.source, self.layout, self.ranks = passes, source, layout, ranks
        self.groups, self.wanted = groups, wanted
        tile_tensor, tile_word = tiles_in_order(layout.sizes, layout.word_offsets[:-1])
        self.tile_tensor, self.tile_word = sent(device, tile_tensor), sent(device, tile_word)
        self.tile_group = sent(device, torch.tensor(groups, dtype=torch.int64, device="cpu")[tile_tensor])
        self.first_tile = sent(device, layout.tile_offsets[:-1])
        capacity = room_for(sum(layout.sizes))
        self.words = torch.empty(layout.words, dtype=torch.int32, device=device)
        self.above, self.inside, self.offsets = (
            torch.empty(layout.tiles, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.keys = torch.empty(capacity, dtype=torch.int32, device=device)
        self.positions = torch.empty(capacity, dtype=torch.int16, device=device)
        self.nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        self._candidates = {  # the fields of `Candidates`
            "keys": self.keys,
            "positions": self.positions,
            "offsets": self.offsets,
            "inside": self.inside,
            "tile_groups": self.tile_group,
        }

    def run(self, low: Tensor, high: Tensor, take: Tensor | None = None, store: bool = True) -> None:
        """The band pass over low <= key < high, int64 [G] each: marks, counts and collects."""
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
        """int64 [G]: the sums of a count over the tiles of every group."""
        return self.ranks.sum(torch.zeros_like(self.wanted).index_add_(0, self.tile_group, per_tile))

    def missing(self) -> Tensor:
        """int64 [G]: how many entries of its band each group still has to take.

        A band that starts at the smallest key holds all remaining entries that have moved. If they are too few, all are
        taken.
        """
        missing = self.wanted - self.per_group(self.above)
        return torch.where(self.low == 1, torch.minimum(missing, self.per_group(self.inside)), missing)

    def outcome(self) -> tuple[bool, bool, bool, bool]:
        """Four facts about a band that has run. Waits for the device.

        Returns:
            (a delta is not finite; the k-th largest key of every group lies inside its band; all candidates are stored;
            every band is a single key, so that all its entries are ties)
        """
        missing, inside = self.missing(), self.per_group(self.inside)
        holds = ((self.wanted == 0) | ((missing >= 1) & (missing <= inside))).all()
        stored = (self.cursor <= self.keys.numel()).all()
        one_key = (self.high - self.low == 1).all()
        nonfinite, *rest = torch.stack([self.nonfinite[0] > 0, holds, stored, one_key]).tolist()
        return (nonfinite, *rest)

    def thresholds(self, order: Tensor) -> Tensor:
        """int64 [G]: the key of each group's candidate at an order from 1 for the largest, found digit by digit."""
        groups, device = order.numel(), order.device
        bits = max(1, min(_CANDIDATE_BITS, (BINS_AT_ONCE // groups).bit_length() - 1))
        low, high = self.low, self.high
        for _ in range(-(-31 // bits)):
            last = (high - low - 1).clamp(min=0)
            if device.type == "cpu" and not last.any():  # on a GPU this would wait for the device
                break
            shift = (torch.frexp(last.double()).exponent - bits).clamp(min=0).long()
            histogram = torch.zeros(groups, 1 << bits, dtype=torch.int64, device=device)
            self.passes.candidate_histogram(
                CandidateBins(**self._candidates, low=low, high=high, shift=shift, histogram=histogram)
            )
            digit, of_digit, _ = bins_of_orders(self.ranks.sum(histogram), order[:, None])
            order = of_digit.view(-1)
            low = low + (digit.view(-1) << shift)
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
        """Takes the missing entries from bands of a single key, the earliest first."""
        missing, above = self.missing(), self.above.clone()
        take = self.share_ties(self.inside, missing)
        self.run(self.low, self.high, take=take, store=False)
        self.ranks.sum(self.nonfinite)  # in this sum the others learn of a process that failed to read
        return self.selection(above + take, torch.where(missing > 0, self.low, NONFINITE_KEY))

    def share_ties(self, ties: Tensor, wanted: Tensor) -> Tensor:
        """int64 [T]: how many ties each tile takes if the earliest ties of each group are taken first.

        Args:
            ties: int64 [T], the number of ties in each tile.
            wanted: int64 [G], the number of ties to take in each group.
        """
        per_tensor = torch.zeros(len(self.groups), dtype=torch.int64, device=ties.device)
        before_tensor = self._before_tensors(per_tensor.index_add_(0, self.tile_tensor, ties))
        before_tile = _before(ties)
        of_first_tile = torch.cat([before_tile, before_tile.new_zeros(1)])[self.first_tile]  # the last may be empty
        before = before_tile + (before_tensor - of_first_tile)[self.tile_tensor]
        return torch.minimum((wanted[self.tile_group] - before).clamp(min=0), ties)

    def _before_tensors(self, ties: Tensor) -> Tensor:
        """int64 [P]: the ties of the same group before each piece of this process. `ties`, int64 [P], are inside it."""
        pieces = self.ranks.in_order(ties).to(ties.device)
        group = torch.tensor(self.groups, dtype=torch.int64, device="cpu").repeat_interleave(pieces.shape[1])
        by_group = group.argsort(stable=True)
        first_of_group = sent(ties.device, torch.searchsorted(group[by_group], group[by_group]))
        by_group = sent(ties.device, by_group)
        before = _before(pieces.view(-1)[by_group])
        before_piece = torch.empty_like(before).index_copy_(0, by_group, before - before[first_of_group])
        own = sent(ties.device, self.ranks.places(len(self.groups)))
        return before_piece.view(pieces.shape).gather(1, own[:, None]).view(-1)

    def selection(self, counts: Tensor, cut: Tensor) -> Selection:
        return Selection(self.words, counts, cut.to(torch.int32).view(torch.float32))


def _before(counts: Tensor) -> Tensor:
    """The sum of all earlier items, for each item."""
    return counts.cumsum(0) - counts


def raise_nonfinite(source: Source, ranks: Ranks) -> NoReturn:
    """Raises `NonFiniteDelta` for the first tensor with a delta that is not finite."""
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


def check_finite(nonfinite: Tensor, source: Source, ranks: Ranks) -> None:
    """Raises `NonFiniteDelta` if a pass has set the flag."""
    if int(ranks.sum(nonfinite)):
        raise_nonfinite(source, ranks)


def sampling_pays(source: Source) -> bool:
    """Whether the sampled route, which usually reads the weights once, is the faster one."""
    return source.can_sample and sum(source.sizes) >= (SAMPLE_FROM if source.device.type == "cpu" else SAMPLE_FROM_GPU)


def _decided_on_device(passes: Backend, source: Source, plan: SamplePlan) -> Selection | None:
    """The sampled route, decided on the device, with one wait at its end. None if the samples misled it."""
    assert isinstance(source, TensorSource)
    device, layout, groups = source.device, source.layout, len(plan.wanted)

    def empty(n: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(n, dtype=dtype, device=device)

    samples = RUN * sum(plan.runs)
    words = empty(max(samples, layout.words), torch.int32)  # the samples are no longer needed when words are written
    found = Selection(words[: layout.words], empty(layout.tiles, torch.int64), empty(groups, torch.float32))
    sampled = Sampled(
        initial=Tensors(source.initial),
        tuned=Tensors(source.tuned),
        groups=plan.groups,
        budgets=plan.budgets().to(device, non_blocking=True),
        samples=words[:samples].view(-1, RUN),
        low=empty(groups, torch.int64),
        high=empty(groups, torch.int64),
        words=found.words,
        counts=found.counts,
        thresholds=found.thresholds,
        keys=empty(plan.room, torch.int32),
        positions=empty(plan.room, torch.int16),
        digests=source.digests,
    )
    nonfinite, misled = passes.select_sampled(sampled).tolist()
    if nonfinite:
        raise_nonfinite(source, Ranks())
    return None if misled else found


def _by_samples(passes: Backend, source: Source, plan: SamplePlan) -> Selection | None:
    """The sampled route. None if the samples misled it."""
    low, high = sampled_bracket(passes, source, plan)
    band = _Band(passes, source, Layout(source.sizes), plan.groups, sent(source.device, plan.wanted), Ranks())
    band.run(low, high)
    nonfinite, holds, stored, one_key = band.outcome()
    if nonfinite:
        raise_nonfinite(source, Ranks())
    if holds and stored:
        return band.finish()
    return band.finish_ties() if holds and one_key else None


def _by_histogram(passes: Backend, source: Source, groups: list[int], ks: list[int], ranks: Ranks) -> Selection:
    """The histogram route, or the ties route if the candidates have no room."""
    wanted = sent(source.device, ks)
    band = _Band(passes, source, Layout(source.sizes), groups, wanted, ranks)
    upper = digit_pass(passes, source, groups, wanted, None, ranks, band.nonfinite)
    band.wanted = upper.asked
    overflows = upper.own.sum().view(1) > band.keys.numel()
    nonfinite, overflowing = ranks.sum(torch.cat([band.nonfinite, overflows.long()])).tolist()
    if nonfinite:
        raise_nonfinite(source, ranks)
    if not overflowing:
        band.run((upper.digit << 16).clamp(min=1), (upper.digit + 1) << 16)
        return band.finish()

    lower = digit_pass(passes, source, groups, upper.order, upper.digit, ranks, band.nonfinite)
    thresholds = joined(upper, lower)
    band.run(thresholds, thresholds + 1, store=False)
    return band.finish_ties()


def _has_entries(source: Source, ranks: Ranks | None) -> bool:
    """Whether any process has an entry in its pieces."""
    here = any(source.sizes)
    return here if ranks is None else bool(ranks.sum(torch.tensor([int(here)], dtype=torch.int64, device="cpu")))


def _none_selected(source: Source, groups: int) -> Selection:
    """The result for a source without entries, or without groups."""
    layout, device = Layout(source.sizes), source.device
    words = torch.zeros(layout.words, dtype=torch.int32, device=device)
    counts = torch.zeros(layout.tiles, dtype=torch.int64, device=device)
    return Selection(words, counts, torch.full((groups,), torch.inf, dtype=torch.float32, device=device))


def select_topk(
    passes: Backend,
    source: Source,
    groups: list[int],
    ks: list[int],
    *,
    route: str = "auto",
    ranks: Ranks | None = None,
) -> Selection:
    """The `ks[g]` entries of largest |tuned - initial| of every group of tensors, exactly; of ties the earliest first.

    Entries whose delta is zero are never selected, so that a group may get fewer than its k.

    Args:
        passes: the backend.
        source: the pairs of tensors.
        groups: the group of every tensor.
        ks: number of entries wanted from every group.
        route: "sample", "histogram" or "auto". All give the same bits.
        ranks: the processes that select together, by the histogram route. The source of each has its pieces of all
            tensors, and `ks` are the numbers for all processes.

    Raises:
        NonFiniteDelta: a delta is NaN or infinite.
    """
    if ranks is not None and route != "histogram":
        raise ValueError(f'select_topk: several processes take the route "histogram", got {route!r}')
    if not ks or not _has_entries(source, ranks):
        return _none_selected(source, len(ks))
    whole = isinstance(source, TensorSource) and source.contiguous
    decides = route != "histogram" and whole and passes.decides(len(ks))
    plan = None
    if route == "sample" or (route == "auto" and (decides or sampling_pays(source))):
        plan = plan_samples(source.sizes, groups, ks, more=decides)
    if plan is not None:
        selection = (_decided_on_device if decides else _by_samples)(passes, source, plan)
        if selection is not None:
            return selection
    return _by_histogram(passes, source, groups, ks, Ranks() if ranks is None else ranks)
