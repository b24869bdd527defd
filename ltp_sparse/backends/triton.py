"""The backend `triton`: the kernels of `kernels/`, for GPU tensors; CPU tensors under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import os
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends import addresses, capability
from ltp_sparse.backends.arguments import Norm, Pack, Step, Total, Update

NAME = "triton"
NEEDS_RANKS = NEEDS_PREPARED = True
SUMS_PER_TILE = 4
"""Programs a tile that sum squares; as in kernels/ltp_kernels/masked_adamw.py."""
# `delta_histogram` is the reference's: Triton has none that beats torch's at 32,768 bins; the sampled route avoids it


@cache
def kernels() -> Any:
    """The Triton kernels, or why they are missing."""
    try:
        return importlib.import_module("ltp_sparse.kernels")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}); pip install triton"


def probe(device: torch.device) -> str | None:
    """Why it cannot serve tensors on the device; None if it can."""
    if isinstance(reason := kernels(), str):
        return reason
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton serves GPU tensors; on the CPU only in its interpreter (TRITON_INTERPRET=1, for tests)"
    return capability.too_old(device) if device.type == "cuda" else None


def prepare_step(step: Step) -> None:
    kernels().prepare_step(step, addresses.of_update(step, step.steps.device))


def _prepared(norm: Norm) -> Tensor:
    """What the kernels read of the parameters: what is there, or made for the call."""
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
    single = len(pack.grads) == 1
    kernels().masked_pack_(pack, pack.grads.addresses[0] if single else addresses.of_pack(pack))


def _launch(name: str, record: Any) -> None:
    getattr(kernels(), name)(record)


sample_keys = partial(_launch, "sample_keys")
delta_band = partial(_launch, "delta_band")
candidate_histogram = partial(_launch, "candidate_histogram")
take_above = partial(_launch, "take_above")
take_ties = partial(_launch, "take_ties")
