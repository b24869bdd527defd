"""The bracket: two keys between which the k-th largest key of each group lies almost surely, from a million samples.

Samples decide the route of a selection, never its result. They are read in runs of 16 neighbours, since a cache line
costs as much as one entry. Their places come from a hashed counter, the same on every backend and in every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

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
"""The number of sampled keys; at most one entry in `_SAMPLE_SHARE` is sampled."""

DEVIATIONS = 8.0
"""Half the width of a bracket, in standard deviations of independent samples. Neighbours are not independent: some rows
move more than others, or not at all. With made-up rows of this kind in the shapes of XLM-R-base, samples deviated 1.6
to 2.8 times as far."""

_SAMPLE_SHARE = 32
_FEWEST_DEVIATIONS = 3.0  # a bracket that must be narrower to fit the room for candidates is not tried
_SPARE_CANDIDATES = 1 << 18


def room_for(n: int) -> int:
    """How many candidates a selection from n entries has room for."""
    return n // 156 + _SPARE_CANDIDATES


@dataclass(frozen=True)
class SamplePlan:
    """How many runs are sampled from each group, and which of its sorted samples bound the bracket.

    Attributes:
        sizes: number of entries of every tensor.
        groups: group of every tensor.
        wanted: number of entries to select from each group.
        entries: number of entries of each group.
        runs: number of runs sampled from each group, one from each of that many equal parts of it.
        orders: (top, centre, bottom) of each group. 1 is the largest sample; 0 stands for a key above it.
    """

    sizes: list[int]
    groups: list[int]
    wanted: list[int]
    entries: list[int]
    runs: list[int]
    orders: list[tuple[int, int, int]]

    @property
    def room(self) -> int:
        """How many candidates all brackets together may hold."""
        return room_for(sum(self.sizes))

    def budgets(self) -> Tensor:
        """int64 [G, 8] on the CPU: the `budgets` of a `Sampled`."""
        first_entry, first_run = ([0, *accumulate(counts)][:-1] for counts in (self.entries, self.runs))
        columns = (self.wanted, self.entries, first_entry, self.runs, first_run, *zip(*self.orders, strict=True))
        return torch.tensor(list(columns), dtype=torch.int64, device="cpu").t().contiguous()

    def places(self) -> tuple[Tensor, Tensor]:
        """The tensor of every run, and its number there: int64 [R] on the CPU. As `sampled_key` in csrc/cuda."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64, device="cpu")
        groups = torch.tensor(self.groups, dtype=torch.int64, device="cpu")
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
    """The plan of a sampled selection; None if brackets that fit the room for candidates would often miss.

    Args:
        sizes: number of entries of every tensor.
        groups: group of every tensor.
        ks: number of entries to select from each group.
        more: takes more samples than `SAMPLES` if the brackets are too wide otherwise, as with many groups.
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
    orders = []
    for k, n, count, deviation in zip(ks, entries, runs, deviations, strict=True):
        order, margin = k * RUN * count / max(n, 1), factor * deviation + 2
        centre = min(max(round(order), 1), max(RUN * count, 1))
        orders.append((max(0, math.floor(order - margin)), centre, math.ceil(order + margin)))
    return SamplePlan(list(sizes), list(groups), list(ks), entries, runs, orders)


def _spread(ks: Sequence[int], entries: Sequence[int], samples: int) -> tuple[list[int], list[float], float]:
    """What a number of samples gives: runs of each group, standard deviation of its order, entries in all brackets."""
    total = max(sum(entries), 1)
    runs = [max(1, samples * n // (total * RUN)) if n else 0 for n in entries]
    deviations, width = [], 0.0
    for k, n, count in zip(ks, entries, runs, strict=True):
        share = k / max(n, 1)
        deviations.append(math.sqrt(max(RUN * count * share * (1 - share), 1)))
        width += 2 * DEVIATIONS * deviations[-1] * n / (RUN * count) if k and n else 0
    return runs, deviations, width


def sampled_bracket(passes: Backend, source: Source, plan: SamplePlan) -> tuple[Tensor, Tensor]:
    """A band low <= key < high for each group, int64 [G], that holds the k-th largest key almost surely.

    If many keys are equal, so that the bands would overflow the room for candidates, each band is a single key: the
    k-th largest in the sample, which is probably the right one.
    """
    device = source.device
    keys = torch.empty(sum(plan.runs), RUN, dtype=torch.int32, device=device)
    tensors, runs = plan.places()
    source.sample(passes, sent(device, tensors), sent(device, runs), keys)
    # the keys at three orders of the samples of each group, all [G, 3] from here on
    wanted, unset = sent(device, plan.orders), torch.zeros(1, dtype=torch.int64, device=device)  # samples are finite
    of_group = keys.view(torch.float32).view(-1).split([RUN * count for count in plan.runs])
    upper = digit_pass(passes, TensorSource([], of_group), list(range(len(of_group))), wanted, None, Ranks(), unset)
    thrice = TensorSource([], [part for part in of_group for _ in range(3)])
    rows, digits, orders = list(range(3 * len(of_group))), upper.digit.view(-1), upper.order.view(-1)
    lower = digit_pass(passes, thrice, rows, orders, digits, Ranks(), unset)
    lower = Digits(*(column.view(-1, 3) for column in (lower.digit, lower.order, lower.asked, lower.count, lower.own)))
    key, asked, larger = joined(upper, lower), upper.asked, upper.asked - lower.order

    # If fewer samples have moved than an order asks for, the top is the smallest of them, the bottom the smallest key.
    top = key[:, 0].masked_fill(asked[:, 0] == 0, 0)
    top = torch.where(wanted[:, 0] == 0, NONFINITE_KEY, top)
    centre, bottom = key.masked_fill(asked < wanted, 0)[:, 1:].unbind(1)

    within = larger[:, 2] + lower.count[:, 2] - larger[:, 0]  # samples in the band, its ends included
    per_sample = [n / (RUN * count) if k and n else 0.0 for k, n, count in zip(plan.wanted, plan.entries, plan.runs)]  # noqa: B905 (of one plan)
    weights = torch.tensor(per_sample, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
    crowd = ((within * weights).sum() > plan.room) & (centre > 0)
    none = sent(device, plan.wanted) == 0
    low = torch.where(crowd, centre, bottom.clamp(min=1)).masked_fill(none, NONFINITE_KEY)
    last = torch.where(crowd, centre, top.clamp(max=NONFINITE_KEY - 1)).masked_fill(none, NONFINITE_KEY)
    return low, torch.maximum(last, low) + 1


def sent(device: torch.device, values: Sequence[Any] | Tensor) -> Tensor:
    """int64 values on the device, copied without waiting."""
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.int64, device="cpu")
    return values.to(device, torch.int64, non_blocking=True)
