"""The backend `compiled` for CPU tensors, in C++ (`csrc/cpu`). The extension reads the fields of records by name."""

from __future__ import annotations

import ctypes
import importlib
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends.arguments import Norm, Step
from ltp_sparse.tickets import bits
from ltp_sparse.weights.tensors import LOWEST_ADDRESS

NAME = "compiled"
NEEDS_RANKS = NEEDS_PREPARED = False
SUMS_PER_TILE = 1


@cache
def extension() -> ModuleType | str:
    """The compiled module, or the reason why it is missing."""
    try:
        found = importlib.import_module("ltp_sparse._C")
    except ImportError as error:
        return f"ltp_sparse._C is not built ({error}); install with a C++ compiler, LTP_SPARSE_EXT=cpu says what fails"
    found.use_openmp(gomp_parallel())
    return found


def gomp_parallel() -> int:
    """The address of GOMP_parallel in torch's own OpenMP runtime; 0 if torch was built without OpenMP."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def probe(device: torch.device) -> str | None:
    """The reason why it cannot serve tensors on the device; None if it can."""
    if device.type != "cpu":
        return f"it serves CPU and CUDA tensors, not {device.type}"
    return reason if isinstance(reason := extension(), str) else None


def isa() -> str | None:
    """The instruction set in use, such as "avx512"; None without the extension."""
    found = extension()
    return found.isa() if isinstance(found, ModuleType) else None


def describe(tensors: list[Any]) -> tuple[bytes, tuple[int, ...]] | None:
    """Layouts and addresses of tensors, some of which may be None, to compare with those of another call.

    Returns:
        (layouts, addresses). None if a tensor needs a closer look, or without the extension.
    """
    found = extension()
    return None if isinstance(found, str) else found.describe(tensors, LOWEST_ADDRESS)


def list_positions(words: Tensor, positions: Tensor) -> bool:
    """See `tickets.bits.position_listers`. Returns False without the extension."""
    found = extension()
    if isinstance(found, str):
        return False
    found.list_positions(words.contiguous(), positions)
    return True


bits.position_listers["cpu"] = list_positions


def _run(name: str, *arguments: Any) -> None:
    getattr(extension(), name)(*arguments, torch.get_num_threads())


def prepare_step(step: Step) -> None:
    extension().prepare_step(step)  # type: ignore[union-attr]


def masked_sum_squares(norm: Norm) -> Tensor:
    out = torch.zeros(norm.tiles.shape[0], dtype=torch.float64, device="cpu")
    _run("masked_sum_squares", norm, out)
    return out


gradient_norm = partial(_run, "gradient_norm")
masked_adamw_ = partial(_run, "masked_adamw_")
masked_pack_ = partial(_run, "masked_pack_")
masked_gather_ = partial(_run, "masked_gather_")
masked_scatter_ = partial(_run, "masked_scatter_")
masked_swap_ = partial(_run, "masked_swap_")
delta_histogram = partial(_run, "delta_histogram")
sample_keys = partial(_run, "sample_keys")
delta_band = partial(_run, "delta_band")
candidate_histogram = partial(_run, "candidate_histogram")
take_above = partial(_run, "take_above")
take_ties = partial(_run, "take_ties")
