"""The backend `compiled` for CUDA tensors (`csrc/cuda`). The extension reads the fields of records by name.

`prepare_step` gets the addresses of parameters and gradients as launch arguments, so that a step copies nothing to the
device.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends import addresses, capability, digests
from ltp_sparse.backends.arguments import Band, Candidates, Histogram, Norm, Pack, Sampled, Step
from ltp_sparse.backends.work_items import WORK_ITEM, work_items
from ltp_sparse.tickets.bits import TILE, bitmap_words, tiles_of

NAME = "compiled"
NEEDS_RANKS = NEEDS_PREPARED = True

_ITEMS_PER_TILE = TILE // WORK_ITEM
SUMS_PER_TILE = _ITEMS_PER_TILE + 1
"""One sum for each work item of the tile, and their total."""

_DIGIT_BITS = (11, 10, 9, 8)
"""How many bits of the keys of samples and candidates are found at a time: fewer for many groups."""

_BINS = 3 << 17
"""Bins of all groups together, 20 bytes each. It allows 11 bits for up to 192 groups."""


@cache
def extension() -> ModuleType | str:
    """The compiled CUDA module, or the reason why it is missing."""
    try:
        return importlib.import_module("ltp_sparse._C_cuda")
    except ImportError as error:
        return f"ltp_sparse._C_cuda is not built ({error}); LTP_SPARSE_EXT=cuda builds it, or says why not"


def probe(device: torch.device) -> str | None:
    """The reason why it cannot serve tensors on the device; None if it can, or if there is no GPU to ask."""
    return found if isinstance(found := extension(), str) else _refusal(found, device)


@cache
def _refusal(module: ModuleType, device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None
    return capability.too_old(device) or module.probe()


def _launch(name: str, near: Tensor, *arguments: Any) -> None:
    """Launches a kernel on the device of a tensor, on its present stream."""
    with torch.cuda.device_of(near):
        getattr(extension(), name)(*arguments, torch.cuda.current_stream(near.device).cuda_stream)


def prepare_step(step: Step) -> None:
    _launch("prepare_step", step.steps, step)


def _launch_items(name: str, norm: Norm, *arguments: Any) -> None:
    """Launches an update or a norm over the work items of its tiles, if there are any."""
    if not len(norm.tiles):
        return
    if norm.prepared is None:  # no step has made the rows that the kernels read
        norm = replace(norm, prepared=norm.coefficients.new_empty(len(norm.params), 8, dtype=torch.int64))
        _launch("prepare_norm", norm.tiles, norm)
    _launch(name, norm.tiles, norm, work_items(norm), *arguments)


masked_adamw_ = partial(_launch_items, "masked_adamw_")
gradient_norm = partial(_launch_items, "gradient_norm")


def masked_sum_squares(norm: Norm) -> Tensor:
    out = torch.zeros(len(norm.tiles), _ITEMS_PER_TILE, dtype=torch.float64, device=norm.tiles.device)
    _launch_items("masked_sum_squares", norm, out)
    return out.sum(1)


def masked_pack_(pack: Pack) -> None:
    if not len(pack.tiles):
        return
    prepared = None
    if len(pack.grads) > 1:
        prepared = torch.empty(len(pack.grads), 8, dtype=torch.int64, device=pack.tiles.device)
        _launch("prepare_pack", prepared, pack, prepared)
    _launch("masked_pack_", pack.tiles, pack, prepared, work_items(pack))


def _launch_pairs(name: str, pairs: Any, word_offsets: Sequence[int], *arguments: Any) -> None:
    """Launches a pass over pairs, unless they are empty. Most kernels are launched once for each pair of dtypes."""
    if not (tiles := sum(map(tiles_of, pairs.tuned.sizes))):
        return
    kinds = sorted({*zip(pairs.initial.codes or [-1] * len(pairs.tuned), pairs.tuned.codes, strict=True)})
    table = addresses.of_pairs(pairs, pairs.groups, word_offsets, pairs.tuned.present[0].device)
    _launch(name, table, pairs, table, len(pairs.tuned), tiles, kinds, *arguments)


def delta_histogram(histogram: Histogram) -> None:
    _launch_pairs("delta_histogram", histogram, [0] * len(histogram.tuned))


def delta_band(band: Band) -> None:
    _launch_pairs("delta_band", band, band.word_offsets)
    if band.digests is not None:
        digests.on_gpu(band.initial.present, band.digests)


def decides(groups: int) -> bool:
    """Whether `select_sampled` can serve this number of groups."""
    return groups << _DIGIT_BITS[-1] <= _BINS


def _digit_bits(groups: int) -> int:
    return next(bits for bits in _DIGIT_BITS if groups << bits <= _BINS)


def select_sampled(sampled: Sampled) -> Tensor:
    """A selection in eight launches. Each further pair of dtypes adds two, and many groups add one."""
    groups, tiles = len(sampled.low), len(sampled.counts)
    bits = _digit_bits(groups)
    nbytes = extension().sampled_bytes(groups, tiles, bits)  # type: ignore[union-attr]
    scratch = torch.zeros(nbytes, dtype=torch.uint8, device=sampled.low.device)
    word_offsets = list(accumulate(map(bitmap_words, sampled.tuned.sizes), initial=0))[:-1]
    _launch_pairs("select_sampled", sampled, word_offsets, bits, scratch)
    if sampled.digests is not None:
        digests.on_gpu(sampled.initial.present, sampled.digests)
    return scratch[:16].view(torch.int64)


def _launch_candidates(name: str, candidates: Candidates) -> None:
    _launch(name, candidates.keys, candidates)


candidate_histogram = partial(_launch_candidates, "candidate_histogram")
take_above = partial(_launch_candidates, "take_above")
take_ties = partial(_launch_candidates, "take_ties")
