"""The choice of a backend: the one asked for by name, or the fastest one by the table `backend_choice.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends import arguments as records
from ltp_sparse.backends import checks, compiled, cuda, reference, triton
from ltp_sparse.backends.arguments import RECORDS

ENVIRONMENT = "LTP_SPARSE_BACKEND"
NAMES = ("reference", "compiled", "triton")
OPERATIONS = ("masked_adamw_", "topk_delta", "masked_copy")
"""The operations in the table. All other functions of a step go with its `masked_adamw_`; `masked_copy` are gather,
scatter and swap."""

CHOICES = Path(__file__).with_name("backend_choice.json")
"""Device type -> {"measured": bool, "source": where the order comes from, "rows": [[operation, dtype, density,
{backend: milliseconds or null}], ...]}, the fastest backend first. `benchmarks/choose_backends.py` writes it."""


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot serve the call."""


class Backend:
    """The functions of a backend's module, with the reference's in place of those that it lacks.

    The arguments of the passes of a selection are checked here, all others by the operators.

    Attributes:
        select_sampled: a whole selection in one call, see `Sampled`; only some backends have it. It returns int64 [2]:
            whether an infinity or a NaN was seen, and whether the samples misled it. The selection is void then.
        decides: whether `select_sampled` can be called for that many groups.
    """

    prepare_step: Callable[[records.Step], None]
    gradient_norm: Callable[[records.Norm, records.Total], None]
    masked_adamw_: Callable[[records.Update], None]
    masked_sum_squares: Callable[[records.Norm], Tensor]
    masked_pack_: Callable[[records.Pack], None]
    masked_gather_: Callable[[records.Gather], None]
    masked_scatter_: Callable[[records.Scatter], None]
    masked_swap_: Callable[[records.Swap], None]
    delta_histogram: Callable[[records.Histogram], None]
    sample_keys: Callable[[records.Sample], None]
    delta_band: Callable[[records.Band], None]
    candidate_histogram: Callable[[records.CandidateBins], None]
    take_above: Callable[[records.Above], None]
    take_ties: Callable[[records.Ties], None]
    select_sampled: Callable[[records.Sampled], Tensor]
    decides: Callable[[int], bool]

    def __init__(self, module: ModuleType) -> None:
        self.name: str = module.NAME
        self.needs_ranks: bool = module.NEEDS_RANKS  # its kernels read the directory of a tile table
        self.needs_prepared: bool = module.NEEDS_PREPARED  # its kernels read rows that `prepare_step` writes
        self.sums_per_tile: int = module.SUMS_PER_TILE  # numbers that `gradient_norm` writes for each tile
        for name in ("prepare_step", "gradient_norm", *RECORDS):
            run = getattr(module, name, getattr(reference, name))
            is_pass = name in RECORDS and not name.startswith("masked")
            setattr(self, name, partial(_checked, name, run) if is_pass else run)
        self.decides = getattr(module, "decides", _decides_none)
        if hasattr(module, "select_sampled"):
            self.select_sampled = partial(_checked, "select_sampled", module.select_sampled)


def _decides_none(groups: int) -> bool:  # no lambda, as backends are pickled with an optimizer
    return False


def _checked(op: str, run: Callable[[Any], Any], record: Any) -> Any:
    checks.check_pass(op, record)
    return run(record)


_backend = cache(Backend)


def _module(name: str, device: torch.device) -> ModuleType:
    if name == "compiled":
        return cuda if device.type == "cuda" else compiled
    return {"reference": reference, "triton": triton}[name]


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """The reason why a backend cannot serve tensors on `device`; None if it can."""
    return _module(name, device).probe(device)


@cache
def choices() -> dict[str, dict[str, Any]]:
    """The content of `CHOICES`."""
    return json.loads(CHOICES.read_text())


@cache
def _orders(device_type: str, op: str, dtype: torch.dtype) -> list[tuple[float, tuple[str, ...]]]:
    """(log of the density, backends) of the matching rows; those of all dtypes if this one has none."""
    rows = [row for row in choices()[device_type]["rows"] if row[0] == op]
    rows = [row for row in rows if row[1] == str(dtype).removeprefix("torch.")] or rows
    return [(math.log(density), tuple(found)) for _, _, density, found in rows]


def preferred(device_type: str, op: str, dtype: torch.dtype, density: float) -> tuple[str, ...]:
    """The backends in the order in which `auto` tries them.

    Args:
        device_type: "cpu" or "cuda".
        op: name of the operation.
        dtype: dtype of the weights.
        density: active share. The order of the nearest measured density counts.

    Returns:
        The measured backends, the fastest first, and then "reference".
    """
    if device_type not in choices():
        return ("reference",)
    at = math.log(max(density, 1e-9))
    _, order = min(_orders(device_type, op, dtype), key=lambda row: abs(row[0] - at))
    return (*order, "reference")


_asked_for: str | None = None


def use_backend(name: str | None) -> None:
    """Chooses the backend of all later calls.

    Args:
        name: "reference", "compiled", "triton", or "auto" (also None), which takes the fastest one for each call. The
            environment variable LTP_SPARSE_BACKEND holds where this function has not been called.

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailable: it can serve no device of this machine.
    """
    global _asked_for
    if name not in (None, "auto", *NAMES):
        raise ValueError(f"use_backend: expected one of auto, {', '.join(NAMES)}, got {name!r}")
    if name in NAMES and all(unavailable_reason(name, torch.device(d)) for d in ("cpu", "cuda")):
        raise BackendUnavailable(
            f"use_backend: {name} cannot be used: {unavailable_reason(name, torch.device('cuda'))}"
        )
    _asked_for = None if name == "auto" else name


def chosen() -> str:
    """The name given to `use_backend`, or by the environment, or "auto".

    Raises:
        ValueError: the environment gives no name of a backend.
    """
    name = _asked_for or os.environ.get(ENVIRONMENT) or "auto"
    if name not in ("auto", *NAMES):
        raise ValueError(f"{ENVIRONMENT}: expected one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


def resolve(
    device: torch.device, op: str = "masked_adamw_", dtype: torch.dtype = torch.float32, density: float = 0.2
) -> Backend:
    """The backend that serves a call on tensors on `device`.

    Args:
        device: where the tensors are.
        op: one of `OPERATIONS`.
        dtype: dtype of the parameters.
        density: share of the entries that are active.

    Raises:
        BackendUnavailable: the backend chosen by name cannot serve this device.
    """
    name = chosen()
    if name == "auto":
        name = next(n for n in preferred(device.type, op, dtype, density) if unavailable_reason(n, device) is None)
    elif reason := unavailable_reason(name, device):
        raise BackendUnavailable(
            f'the backend {name} was asked for and cannot serve {device}: {reason}. use_backend("auto") falls back'
        )
    return _backend(_module(name, device))


def named(name: str, device: torch.device) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailable: it cannot serve tensors on `device`.
    """
    if name not in NAMES:
        raise ValueError(f"expected one of the backends {', '.join(NAMES)}, got {name!r}")
    if reason := unavailable_reason(name, device):
        raise BackendUnavailable(f"the backend {name} cannot serve {device}: {reason}")
    return _backend(_module(name, device))


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Backend -> "ok", or the reason why it cannot serve tensors on `device`."""
    return {name: unavailable_reason(name, torch.device(device)) or "ok" for name in NAMES}
