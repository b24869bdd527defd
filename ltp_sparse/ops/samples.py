"""Between which two keys the k-th largest of each group lies, almost surely: what a million sampled keys say.

Samples choose the route of a selection, never its result. They are runs of 16 neighbours, since a cache line costs what
one entry would, at places that a counter hashes to: the same on every backend and in every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import RUN
from ltp_sparse.backends.reference import NONFINITE_KEY
from ltp_sparse.backends.rounding import mix32
from ltp_sparse.ops.digits import Digits, digit_pass, joined
from ltp_sparse.ops.ranks import Ranks
from ltp_sparse.ops.sources import Source, TensorSource

SAMPLES = 1 << 20
"""Sampled keys, in runs of neighbours; at most one entry in `_SAMPLE_SHARE`."""

DEVIATIONS = 8.0
"""Half the width of a bracket, in standard deviations of independent samples. Neighbours are alike, as rows move more
than others, or not at all: with such rows, made up for XLM-R-base, samples deviated 1.6 to 2.8 times as far."""

_SAMPLE_SHARE = 32
_FEWEST_DEVIATIONS = 3.0  # a bracket that must be narrower, to fit the room, is not tried
_SPARE_CANDIDATES = 1 << 18


def room_for(n: int) -> int:
    """Candidates that there is room for in a selection from n entries."""
    return n // 156 + _SPARE_CANDIDATES


@dataclass(frozen=True)
class SamplePlan:
    """How many runs are sampled from each group, and which ranks among the samples bound its bracket.

    sizes, groups: entries and group of every tensor
    wanted:        entries to select from each group
    entries:       those of each group
    runs:          sampled from each group: one out of each of so many equal parts of it
    ranks:         (top, centre, bottom) of each group: 1 is the largest sample, 0 is beyond it
    """

    sizes: list[int]
    groups: list[int]
    wanted: list[int]
    entries: list[int]
    runs: list[int]
    ranks: list[tuple[int, int, int]]

    @property
    def room(self) -> int:
        """Candidates that all brackets together may hold."""
        return room_for(sum(self.sizes))

    def budgets(self) -> Tensor:
        """int64 [G, 8] on the CPU: the rows of `Bracket.budgets`."""
        first_entry, first_run = ([0, *accumulate(counts)][:-1] for counts in (self.entries, self.runs))
        columns = (self.wanted, self.entries, first_entry, self.runs, first_run, *zip(*self.ranks, strict=True))
        return torch.tensor(list(columns), dtype=torch.int64, device="cpu").t().contiguous()

    def places(self) -> tuple[Tensor, Tensor]:
        """int64 [R] on the CPU, twice: the tensor of every run, and its number there. As `sampled_key` of csrc/cuda."""
        sizes, groups = (torch.tensor(of, dtype=torch.int64, device="cpu") for of in (self.sizes, self.groups))
        order = groups.argsort(stable=True)  # tensors, group after group
        starts = sizes[order].cumsum(0) - sizes[order]
        places, first_run, first_entry = [], 0, 0
        for runs, entries in zip(self.runs, self.entries, strict=True):
            number = torch.arange(first_run, first_run + runs, dtype=torch.int64, device="cpu")
            ends = torch.arange(runs + 1, dtype=torch.int64, device="cpu") * entries // max(runs, 1)  # of equal parts
            places.append(first_entry + ends[:-1] + (mix32(number) * ends.diff() >> 32))
            first_run, first_entry = first_run + runs, first_entry + entries
        entry = torch.cat(places)
        at = torch.searchsorted(starts, entry, right=True) - 1
        last_run = (sizes[order] // RUN - 1).clamp(min=0)
        return order[at], torch.minimum((entry - starts[at]) // RUN, last_run[at])


def plan_samples(
    sizes: Sequence[int], groups: Sequence[int], ks: Sequence[int], more: bool = False
) -> SamplePlan | None:
    """None where brackets that fit the room for candidates would hardly hold what they are to hold.

    more: takes more samples than `SAMPLES` where brackets are too wide otherwise, as those of many groups are
    """
    total, entries = sum(sizes), [0] * len(ks)
    for n, group in zip(sizes, groups, strict=True):
        entries[group] += n
    most = total // _SAMPLE_SHARE
    samples, room = min(SAMPLES, most), 0.9 * room_for(total)
    runs, deviations, width = _spread(ks, entries, samples)
    if more and width > room:
        runs, deviations, width = _spread(ks, entries, min(most, round(samples * (width / room) ** 2)))
    factor = min(DEVIATIONS, DEVIATIONS * room / max(width, 1))
    if factor < _FEWEST_DEVIATIONS:
        return None
    ranks = []
    for k, n, count, deviation in zip(ks, entries, runs, deviations, strict=True):
        rank, margin = k * RUN * count / max(n, 1), factor * deviation + 2
        centre = min(max(round(rank), 1), max(RUN * count, 1))
        ranks.append((max(0, math.floor(rank - margin)), centre, math.ceil(rank + margin)))
    return SamplePlan(list(sizes), list(groups), list(ks), entries, runs, ranks)


def _spread(ks: Sequence[int], entries: Sequence[int], samples: int) -> tuple[list[int], list[float], float]:
    """(runs of each group, standard deviations of its rank in samples, entries in all brackets) of so many samples."""
    total = max(sum(entries), 1)
    runs = [max(1, samples * n // (total * RUN)) if n else 0 for n in entries]
    deviations, width = [], 0.0
    for k, n, count in zip(ks, entries, runs, strict=True):
        share = k / max(n, 1)
        deviations.append(math.sqrt(max(RUN * count * share * (1 - share), 1)))
        width += 2 * DEVIATIONS * deviations[-1] * n / (RUN * count) if k and n else 0
    return runs, deviations, width


def sampled_bracket(passes: Backend, source: Source, plan: SamplePlan) -> tuple[Tensor, Tensor]:
    """Per group a band [low, high) of keys, int64 [G], that holds the k-th largest key almost surely.

    Where many keys are equal and the bands would overflow the room for candidates, those of the k-th largest key of the
    sample alone: they hold it probably.
    """
    device = source.device
    keys = torch.empty(sum(plan.runs), RUN, dtype=torch.int32, device=device)
    tensors, runs = plan.places()
    source.sample(passes, _sent(device, tensors), _sent(device, runs), keys)
    found = _keys_of_ranks(passes, keys, plan)

    # Beyond what has moved in the sample, the top is the smallest key that has, the bottom the smallest there is.
    top = found.key[:, 0].masked_fill(found.asked[:, 0] == 0, 0)
    top = torch.where(found.wanted[:, 0] == 0, NONFINITE_KEY, top)
    beyond = found.asked < found.wanted
    centre, bottom = found.key.masked_fill(beyond, 0)[:, 1:].unbind(1)

    within = found.larger[:, 2] + found.count[:, 2] - found.larger[:, 0]  # samples, of all equal to an end too
    per_sample = [n / (RUN * count) if k and n else 0.0 for k, n, count in zip(plan.wanted, plan.entries, plan.runs)]  # noqa: B905 (of one plan)
    weights = torch.tensor(per_sample, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
    crowd = ((within * weights).sum() > plan.room) & (centre > 0)
    none = _sent(device, torch.tensor(plan.wanted, dtype=torch.int64, device="cpu")) == 0
    low = torch.where(crowd, centre, bottom.clamp(min=1)).masked_fill(none, NONFINITE_KEY)
    last = torch.where(crowd, centre, top.clamp(max=NONFINITE_KEY - 1)).masked_fill(none, NONFINITE_KEY)
    return low, torch.maximum(last, low) + 1


def _sent(device: torch.device, values: Tensor) -> Tensor:
    """On the device; torch does not wait for it."""
    return values.to(device, non_blocking=True)


@dataclass
class _Found:
    """int64 [G, 3] each: keys of the ranks `wanted`, or where fewer have moved, of their number `asked`.

    larger, count: samples above the key, and those equal to it
    """

    wanted: Tensor
    asked: Tensor
    key: Tensor
    larger: Tensor
    count: Tensor


def _keys_of_ranks(passes: Backend, keys: Tensor, plan: SamplePlan) -> _Found:
    """keys: int32 [R, RUN]; of the samples of every group those of its three ranks."""
    of_group = keys.view(torch.float32).view(-1).split([RUN * count for count in plan.runs])
    wanted = _sent(keys.device, torch.tensor(plan.ranks, dtype=torch.int64, device="cpu"))
    unset = torch.zeros(1, dtype=torch.int64, device=keys.device)  # samples are finite
    upper = digit_pass(passes, TensorSource([], of_group), list(range(len(of_group))), wanted, None, Ranks(), unset)
    thrice = TensorSource([], [part for part in of_group for _ in range(3)])
    rows, digits, ranks = list(range(3 * len(of_group))), upper.digit.view(-1), upper.rank.view(-1)
    lower = digit_pass(passes, thrice, rows, ranks, digits, Ranks(), unset)
    lower = Digits(*(column.view(-1, 3) for column in (lower.digit, lower.rank, lower.asked, lower.count, lower.own)))
    return _Found(wanted, upper.asked, joined(upper, lower), upper.asked - lower.rank, lower.count)
