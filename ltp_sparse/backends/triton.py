"""The backend `triton`: the kernels in `kernels/`, for GPU tensors, and for CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import os
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends import addresses, capability
from ltp_sparse.backends.arguments import Gather, Norm, Pack, Scatter, Step, Swap, Total, Update

NAME = "triton"
NEEDS_RANKS = NEEDS_PREPARED = True
SUMS_PER_TILE = 4
"""Programs that sum the squares of one tile, as in kernels/ltp_kernels/masked_adamw.py."""
# There is no `delta_histogram`: a Triton kernel is not faster than torch at 32,768 bins. The sampled route needs none.


@cache
def kernels() -> Any:
    """The module of Triton kernels, or the reason why it is missing."""
    try:
        return importlib.import_module("ltp_sparse.kernels")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}); pip install triton"


def probe(device: torch.device) -> str | None:
    """The reason why it cannot serve tensors on the device; None if it can."""
    if isinstance(reason := kernels(), str):
        return reason
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton serves GPU tensors; on the CPU only in its interpreter (TRITON_INTERPRET=1, for tests)"
    return capability.too_old(device) if device.type == "cuda" else None


def prepare_step(step: Step) -> None:
    kernels().prepare_step(step, addresses.of_update(step, step.steps.device))


def _prepared(norm: Norm) -> Tensor:
    """The rows that the kernels read; they are made here if no step has prepared them."""
    if norm.prepared is not None:
        return norm.prepared
    return kernels().prepared_of(norm, addresses.of_update(norm, norm.tiles.device))


def masked_adamw_(update: Update) -> None:
    kernels().masked_adamw_(update, _prepared(update))


def masked_sum_squares(norm: Norm) -> Tensor:
    return kernels().masked_sum_squares(norm, _prepared(norm))


def gradient_norm(norm: Norm, total: Total) -> None:
    kernels().gradient_norm(norm, _prepared(norm), total)


def masked_pack_(pack: Pack) -> None:
    found = pack.grads.addresses
    kernels().masked_pack_(pack, found[0] if len(found) == 1 else addresses.address_table(found, pack.tiles.device))


def _copy(name: str, copy: Gather | Scatter | Swap) -> None:
    getattr(kernels(), name)(copy, addresses.address_table(copy.tensors.addresses, copy.tiles.device))


masked_gather_ = partial(_copy, "masked_gather_")
masked_scatter_ = partial(_copy, "masked_scatter_")
masked_swap_ = partial(_copy, "masked_swap_")


def _launch(name: str, record: Any) -> None:
    getattr(kernels(), name)(record)


sample_keys = partial(_launch, "sample_keys")
delta_band = partial(_launch, "delta_band")
candidate_histogram = partial(_launch, "candidate_histogram")
take_above = partial(_launch, "take_above")
take_ties = partial(_launch, "take_ties")
