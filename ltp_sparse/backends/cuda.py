"""The backend `compiled` for CUDA tensors (`csrc/cuda`), which reads the records by the names of their fields.

Its kernels read addresses from device memory: the tables are compared with the live tensors in every call.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends import addresses, digests
from ltp_sparse.backends.arguments import Band, Candidates, Histogram, Norm, Pack, Pairs, Sample, Update
from ltp_sparse.tickets.bits import tiles_of

NAME = "compiled"
NEEDS_RANKS = True

_SUM_PARTS = 16
"""Thread blocks a tile that sum squares."""


@cache
def extension() -> ModuleType | str:
    """The compiled CUDA module, or why it is missing."""
    try:
        return importlib.import_module("ltp_sparse._C_cuda")
    except ImportError as error:
        return f"ltp_sparse._C_cuda is not built ({error}); LTP_SPARSE_EXT=cuda builds it, or says why not"


def probe(device: torch.device) -> str | None:
    """Why it cannot serve tensors on the device; None if it can."""
    return reason if isinstance(reason := extension(), str) else None


def parts(active: int, tiles: int) -> int:
    """Thread blocks a tile: each has some hundred active entries to work on."""
    return max(1, min(16, -(-active // (512 * tiles))))


def _launch(name: str, device: torch.device, *arguments: Any) -> None:
    getattr(extension(), name)(*arguments, torch.cuda.current_stream(device).cuda_stream)


def masked_adamw_(update: Update) -> None:
    if not (tiles := len(update.tiles)):
        return
    with addresses.on_device_of(update.tiles):
        table = addresses.of_update(update)
        _launch("masked_adamw_", update.tiles.device, update, table, parts(update.exp_avg.numel(), tiles))


def masked_sum_squares(norm: Norm) -> Tensor:
    out = torch.empty(len(norm.tiles), _SUM_PARTS, dtype=torch.float64, device=norm.tiles.device)
    if len(norm.tiles):
        with addresses.on_device_of(norm.tiles):
            _launch("masked_sum_squares", out.device, norm, addresses.of_update(norm), out, _SUM_PARTS)
    return out.sum(1)


def masked_pack_(pack: Pack) -> None:
    if not (tiles := len(pack.tiles)):
        return
    with addresses.on_device_of(pack.tiles):
        _launch("masked_pack_", pack.tiles.device, pack, addresses.of_pack(pack), parts(pack.out.numel(), tiles))


def _launch_pairs(name: str, pairs: Pairs, device: torch.device, groups: list[int], word_offsets: list[int]) -> None:
    """A launch for each pair of dtypes."""
    tiles = sum(map(tiles_of, pairs.tuned.sizes))
    if not tiles:
        return
    table = addresses.of_pairs(pairs, groups, word_offsets, device)
    kinds = zip(pairs.initial.codes or [-1] * len(pairs.tuned), pairs.tuned.codes, strict=True)
    with addresses.on_device_of(table):
        for kind in sorted(set(kinds)):
            _launch(name, device, pairs, table, len(table), tiles, *kind)


def delta_histogram(histogram: Histogram) -> None:
    nowhere = [0] * len(histogram.tuned)
    _launch_pairs("delta_histogram", histogram, histogram.histogram.device, histogram.groups, nowhere)


def sample_keys(sample: Sample) -> None:
    nowhere = [0] * len(sample.tuned)
    _launch_pairs("sample_keys", sample, sample.keys.device, nowhere, nowhere)


def delta_band(band: Band) -> None:
    _launch_pairs("delta_band", band, band.words.device, band.groups, band.word_offsets)
    if band.digests is not None:
        digests.on_gpu(band.initial.present, band.digests)


def _launch_candidates(name: str, candidates: Candidates) -> None:
    with addresses.on_device_of(candidates.keys):
        _launch(name, candidates.keys.device, candidates)


candidate_histogram = partial(_launch_candidates, "candidate_histogram")
take_above = partial(_launch_candidates, "take_above")
take_ties = partial(_launch_candidates, "take_ties")
