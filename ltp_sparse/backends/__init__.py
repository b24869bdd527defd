"""The one door to compiled code and kernels: which backends there are, why one is missing, and which one serves a call.

* ``reference``: plain PyTorch, every device.
* ``compiled``:  C++ for CPU tensors, CUDA for GPU tensors (`csrc/`).
* ``triton``:    Triton kernels (`kernels/`), GPU tensors; CPU tensors under TRITON_INTERPRET=1.

``auto`` takes the fastest that serves the call, by the table in `backend_choice.json`; an explicit choice is obeyed or
refused.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from itertools import accumulate, chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends import checks, reference
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.weights.tensors import DTYPES

ENVIRONMENT = "LTP_SPARSE_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A set of implementations under the signatures of `reference.py`.

    The operators check what update, norm and packing get; the passes of the selection are checked here.
    """

    name: str
    masked_adamw_: Callable[..., None]
    masked_sum_squares: Callable[..., Tensor]
    masked_pack_: Callable[..., None]
    delta_histogram: Callable[..., None]
    delta_band: Callable[..., None]
    sample_keys: Callable[..., None] = reference.sample_keys
    candidate_histogram: Callable[..., None] = reference.candidate_histogram
    take_above: Callable[..., None] = reference.take_above
    take_ties: Callable[..., None] = reference.take_ties
    needs_ranks: bool = False  # reads the rank directory of a tile table

    def __post_init__(self) -> None:
        for name, check in checks.PASSES.items():
            object.__setattr__(self, name, _checked(check, getattr(self, name)))


def _checked(check: Callable[..., None], run: Callable[..., None]) -> Callable[..., None]:
    @wraps(run)
    def checked(*arguments: Any, **named: Any) -> None:
        check(*arguments, **named)
        run(*arguments, **named)

    return checked


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot serve the call."""


@cache
def _extension() -> ModuleType | str:
    """The compiled module, or why it is missing."""
    try:
        extension = importlib.import_module("ltp_sparse._C")
    except ImportError as error:
        return f"ltp_sparse._C is not built ({error}); install with a C++ compiler, LTP_SPARSE_EXT=cpu says what fails"
    extension.use_openmp(_gomp_parallel())
    return extension


def _gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself runs on; 0 if torch was built without."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


@cache
def _cuda_extension() -> ModuleType | str:
    """The compiled CUDA module, or why it cannot serve."""
    try:
        extension = importlib.import_module("ltp_sparse._C_cuda")
    except ImportError as error:
        return f"ltp_sparse._C_cuda is not built ({error}); LTP_SPARSE_EXT=cuda builds it, or says why not"
    # its tables of addresses are made by the launchers of the Triton kernels
    return reason if isinstance(reason := _kernels(), str) else extension


@cache
def _kernels() -> ModuleType | str:
    """The Triton kernels, or why they are missing."""
    try:
        return importlib.import_module("ltp_sparse.kernels")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}); pip install triton"


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.numel, tensors)]


def _grad_code(grads: Sequence[Tensor]) -> int:
    """The code of the dtype of the gradients that there are."""
    return next((DTYPES[grad.dtype] for grad in grads if grad.numel()), 0)


def _codes(tensors: Sequence[Tensor]) -> list[int]:
    return [DTYPES[tensor.dtype] for tensor in tensors]


@cache
def _compiled() -> Backend:
    """`_C` takes addresses and sizes; these adaptors take them from the tensors of the same call.

    The address of a tensor without entries is 0, which says that it is not there.
    """
    c = _extension()
    assert isinstance(c, ModuleType)

    def masked_adamw_(
        params, grads, exp_avg, exp_avg_sq, scales, master,
        tiles, words, ranks, positions, coefficients, anchor, stochastic, packed,
    ):  # fmt: skip
        if not params:
            return
        c.masked_adamw_(
            _addresses(params),
            _addresses(grads),
            _sizes(params),
            DTYPES[params[0].dtype],
            _grad_code(grads),
            packed,
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            exp_avg.numel(),
            scales.data_ptr(),
            len(scales),
            master.data_ptr(),
            tiles.data_ptr(),
            tiles.shape[0],
            words.data_ptr(),
            words.numel(),
            positions.data_ptr(),
            positions.numel(),
            coefficients.data_ptr(),
            anchor.data_ptr(),
            stochastic,
            torch.get_num_threads(),
        )

    def masked_sum_squares(params, grads, master, tiles, words, ranks, positions, coefficients, anchor, packed):
        out = torch.zeros(tiles.shape[0], dtype=torch.float64, device="cpu")
        if not params:
            return out
        c.masked_sum_squares(
            _addresses(params),
            _addresses(grads),
            _sizes(params),
            DTYPES[params[0].dtype],
            _grad_code(grads),
            packed,
            master.data_ptr(),
            max(master.numel(), anchor.numel(), grads[0].numel() if packed else 0),
            tiles.data_ptr(),
            tiles.shape[0],
            words.data_ptr(),
            words.numel(),
            positions.data_ptr(),
            positions.numel(),
            coefficients.data_ptr(),
            anchor.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def masked_pack_(grads, out, tiles, words, ranks, positions, accumulate):
        c.masked_pack_(
            _addresses(grads),
            _sizes(grads),
            _grad_code(grads),
            out.data_ptr(),
            out.numel(),
            tiles.data_ptr(),
            tiles.shape[0],
            words.data_ptr(),
            words.numel(),
            positions.data_ptr(),
            positions.numel(),
            accumulate,
            torch.get_num_threads(),
        )

    def delta_histogram(initial, tuned, groups, prefixes, histogram, nonfinite):
        nonfinite |= c.delta_histogram(
            _addresses(initial),
            _addresses(tuned),
            _codes(initial),
            _codes(tuned),
            _sizes(tuned),
            list(groups),
            [] if prefixes is None else prefixes.tolist(),
            histogram.data_ptr(),
            histogram.shape[0],
            torch.get_num_threads(),
        )

    def delta_band(
        initial, tuned, groups, low, high, words, word_offsets,
        above, inside, take, keys, positions, offsets, cursor, nonfinite,
    ):  # fmt: skip
        nonfinite |= c.delta_band(
            _addresses(initial),
            _addresses(tuned),
            _codes(initial),
            _codes(tuned),
            _sizes(tuned),
            list(groups),
            low.tolist(),
            high.tolist(),
            words.data_ptr(),
            list(word_offsets),
            above.data_ptr(),
            inside.data_ptr(),
            0 if take is None else take.data_ptr(),
            keys.data_ptr(),
            positions.data_ptr(),
            keys.numel(),
            offsets.data_ptr(),
            cursor.data_ptr(),
            torch.get_num_threads(),
        )

    def sample_keys(initial, tuned, tensors, runs, keys):
        c.sample_keys(
            _addresses(initial),
            _addresses(tuned),
            _codes(initial),
            _codes(tuned),
            _sizes(tuned),
            *_addresses([tensors, runs]),
            tensors.numel(),
            keys.data_ptr(),
            torch.get_num_threads(),
        )

    def candidate_histogram(keys, positions, offsets, inside, tile_groups, low, high, shift, histogram):
        c.candidate_histogram(
            *_addresses([keys, positions]),
            keys.numel(),
            *_addresses([offsets, inside, tile_groups]),
            offsets.numel(),
            low.tolist(),
            high.tolist(),
            shift.tolist(),
            histogram.data_ptr(),
            histogram.shape[1],
            torch.get_num_threads(),
        )

    def take_above(keys, positions, offsets, inside, tile_groups, cut, words, tile_words, taken, ties):
        c.take_above(
            *_addresses([keys, positions]),
            keys.numel(),
            *_addresses([offsets, inside, tile_groups]),
            offsets.numel(),
            cut.tolist(),
            words.data_ptr(),
            words.numel(),
            *_addresses([tile_words, taken, ties]),
            torch.get_num_threads(),
        )

    def take_ties(keys, positions, offsets, inside, tile_groups, cut, words, tile_words, take):
        c.take_ties(
            *_addresses([keys, positions]),
            keys.numel(),
            *_addresses([offsets, inside, tile_groups]),
            offsets.numel(),
            cut.tolist(),
            words.data_ptr(),
            words.numel(),
            *_addresses([tile_words, take]),
            torch.get_num_threads(),
        )

    return Backend(
        "compiled",
        masked_adamw_,
        masked_sum_squares,
        masked_pack_,
        delta_histogram,
        delta_band,
        sample_keys=sample_keys,
        candidate_histogram=candidate_histogram,
        take_above=take_above,
        take_ties=take_ties,
    )


@cache
def _compiled_cuda() -> Backend:
    """`_C_cuda` reads addresses from device memory; the table is compared with the live tensors in every call."""
    c = _cuda_extension()
    assert isinstance(c, ModuleType)
    launch = importlib.import_module("ltp_sparse.kernels.launch")

    def stream(device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def parts(active: int, tiles: int) -> int:
        """Thread blocks a tile: each has some hundred active entries to work on."""
        return max(1, min(16, -(-active // (512 * tiles))))

    no_limit = 2**63 - 1

    def room(params, words, positions, slots, blocks=no_limit):
        return [len(params), words.numel(), positions.numel(), slots, blocks]

    def masked_adamw_(
        params, grads, exp_avg, exp_avg_sq, scales, master,
        tiles, words, ranks, positions, coefficients, anchor, stochastic, packed,
    ):  # fmt: skip
        if not len(tiles):
            return
        with launch.on_device_of(exp_avg):
            c.masked_adamw_(
                launch.address_pairs(params, grads, packed, tiles.device).data_ptr(),
                DTYPES[params[0].dtype],
                _grad_code(grads),
                packed,
                exp_avg.data_ptr(),
                exp_avg_sq.data_ptr(),
                scales.data_ptr(),
                master.data_ptr(),
                tiles.data_ptr(),
                tiles.shape[0],
                words.data_ptr(),
                ranks.data_ptr(),
                positions.data_ptr(),
                coefficients.data_ptr(),
                anchor.data_ptr(),
                stochastic,
                parts(exp_avg.numel(), tiles.shape[0]),
                room(params, words, positions, exp_avg.numel(), len(scales) or no_limit),
                stream(tiles.device),
            )

    def masked_sum_squares(params, grads, master, tiles, words, ranks, positions, coefficients, anchor, packed):
        shares, by_slot = 16, max(master.numel(), anchor.numel(), grads[0].numel() if packed else 0)
        out = torch.empty(tiles.shape[0], shares, dtype=torch.float64, device=tiles.device)
        if len(tiles):
            with launch.on_device_of(tiles):
                c.masked_sum_squares(
                    launch.address_pairs(params, grads, packed, tiles.device).data_ptr(),
                    DTYPES[params[0].dtype],
                    _grad_code(grads),
                    packed,
                    master.data_ptr(),
                    tiles.data_ptr(),
                    tiles.shape[0],
                    words.data_ptr(),
                    ranks.data_ptr(),
                    positions.data_ptr(),
                    coefficients.data_ptr(),
                    anchor.data_ptr(),
                    out.data_ptr(),
                    shares,
                    room(params, words, positions, by_slot or no_limit),
                    stream(tiles.device),
                )
        return out.sum(1)

    def masked_pack_(grads, out, tiles, words, ranks, positions, accumulate):
        if not len(tiles):
            return
        with launch.on_device_of(out):
            c.masked_pack_(
                launch.address_table(list(grads), tiles.device).data_ptr(),
                _grad_code(grads),
                out.data_ptr(),
                tiles.data_ptr(),
                tiles.shape[0],
                words.data_ptr(),
                ranks.data_ptr(),
                positions.data_ptr(),
                accumulate,
                parts(out.numel(), tiles.shape[0]),
                room(grads, words, positions, out.numel()),
                stream(tiles.device),
            )

    def launch_pairs(run, initial, tuned, groups, word_offsets, device, *rest):
        """Calls run(pair table, pairs, tiles, dtype of initial, dtype of tuned, *rest) for each pair of dtypes."""
        sizes, codes = [t.numel() for t in tuned], _codes(tuned)
        *first_tiles, tiles = accumulate((-(-n // TILE) for n in sizes), initial=0)
        if not tiles:
            return
        nothing = [0] * len(tuned), [-1] * len(tuned)
        befores, before_codes = (_addresses(initial), _codes(initial)) if initial else nothing
        columns = (befores, before_codes, _addresses(tuned), codes, sizes, groups, word_offsets, first_tiles)
        numbers = array("q", chain.from_iterable(columns))  # a fifth of the time of torch.tensor
        rows = torch.frombuffer(numbers, dtype=torch.int64).view(len(columns), -1).t().contiguous()
        table = rows.to(device, non_blocking=True)  # pageable memory: copied out before the call returns
        with launch.on_device_of(table):
            for kind in sorted(set(zip(before_codes, codes, strict=True))):
                run(table.data_ptr(), len(table), tiles, *kind, *rest, stream(device))

    def delta_histogram(initial, tuned, groups, prefixes, histogram, nonfinite):
        launch_pairs(
            c.delta_histogram,
            initial,
            tuned,
            groups,
            [0] * len(tuned),
            histogram.device,
            0 if prefixes is None else prefixes.data_ptr(),
            histogram.data_ptr(),
            nonfinite.data_ptr(),
        )

    def delta_band(
        initial, tuned, groups, low, high, words, word_offsets,
        above, inside, take, keys, positions, offsets, cursor, nonfinite,
    ):  # fmt: skip
        launch_pairs(
            c.delta_band,
            initial,
            tuned,
            groups,
            word_offsets,
            words.device,
            low.data_ptr(),
            high.data_ptr(),
            words.data_ptr(),
            above.data_ptr(),
            inside.data_ptr(),
            0 if take is None else take.data_ptr(),
            keys.data_ptr(),
            positions.data_ptr(),
            keys.numel(),
            offsets.data_ptr(),
            cursor.data_ptr(),
            nonfinite.data_ptr(),
        )

    def sample_keys(initial, tuned, tensors, runs, keys):
        nothing = [0] * len(tuned)
        addresses = tensors.data_ptr(), runs.data_ptr(), tensors.numel(), keys.data_ptr()
        launch_pairs(c.sample_keys, initial, tuned, nothing, nothing, keys.device, *addresses)

    def on_candidates(run, candidates, n_groups, *rest):
        keys, _, offsets, *_ = candidates
        with launch.on_device_of(keys):
            run(*_addresses(candidates), offsets.numel(), keys.numel(), n_groups, *rest, stream(keys.device))

    def candidate_histogram(keys, positions, offsets, inside, tile_groups, low, high, shift, histogram):
        bins = [*_addresses([low, high, shift, histogram]), histogram.shape[1]]
        on_candidates(c.candidate_histogram, [keys, positions, offsets, inside, tile_groups], low.numel(), *bins)

    def take_above(keys, positions, offsets, inside, tile_groups, cut, words, tile_words, taken, ties):
        marks = [*_addresses([cut, words]), words.numel(), *_addresses([tile_words, taken, ties])]
        on_candidates(c.take_above, [keys, positions, offsets, inside, tile_groups], cut.numel(), *marks)

    def take_ties(keys, positions, offsets, inside, tile_groups, cut, words, tile_words, take):
        marks = [*_addresses([cut, words]), words.numel(), *_addresses([tile_words, take])]
        on_candidates(c.take_ties, [keys, positions, offsets, inside, tile_groups], cut.numel(), *marks)

    return Backend(
        "compiled",
        masked_adamw_,
        masked_sum_squares,
        masked_pack_,
        delta_histogram,
        delta_band,
        sample_keys=sample_keys,
        candidate_histogram=candidate_histogram,
        take_above=take_above,
        take_ties=take_ties,
        needs_ranks=True,
    )


@cache
def _triton() -> Backend:
    kernels = _kernels()
    assert isinstance(kernels, ModuleType)
    return Backend(
        "triton",
        kernels.masked_adamw_,
        kernels.masked_sum_squares,
        kernels.masked_pack_,
        reference.delta_histogram,  # Triton has none that beats torch's at 32,768 bins; the sampled route avoids it
        kernels.delta_band,
        sample_keys=kernels.sample_keys,
        candidate_histogram=kernels.candidate_histogram,
        take_above=kernels.take_above,
        take_ties=kernels.take_ties,
        needs_ranks=True,
    )


_reference = Backend(
    "reference",
    reference.masked_adamw_,
    reference.masked_sum_squares,
    reference.masked_pack_,
    reference.delta_histogram,
    reference.delta_band,
)


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors on `device`; None if it can."""
    if name == "reference":
        return None
    if name == "compiled":
        if device.type not in ("cpu", "cuda"):
            return f"it serves CPU and CUDA tensors, not {device.type}"
        return (
            reason if isinstance(reason := _extension() if device.type == "cpu" else _cuda_extension(), str) else None
        )
    if isinstance(reason := _kernels(), str):
        return reason
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton serves GPU tensors; on the CPU only in its interpreter (TRITON_INTERPRET=1, for tests)"
    return None


NAMES = ("reference", "compiled", "triton")
OPERATIONS = ("masked_adamw_", "topk_delta")
"""What the table tells apart; `masked_sum_squares` and `masked_pack_` go with the update that they serve."""

CHOICES = Path(__file__).with_name("backend_choice.json")
"""Kind of device -> {"measured": bool, "source": where the order comes from, "rows": [[operation, dtype, density,
{backend: milliseconds or null}], ...]}, the fastest first. `benchmarks/choose_backends.py` writes it."""


@cache
def choices() -> dict[str, dict[str, Any]]:
    """What `CHOICES` holds."""
    return json.loads(CHOICES.read_text())


@cache
def _orders(device_type: str, op: str, dtype: torch.dtype) -> list[tuple[float, tuple[str, ...]]]:
    """(log of the density, backends) of the rows for these; a dtype without rows takes those of the others."""
    rows = [row for row in choices()[device_type]["rows"] if row[0] == op]
    rows = [row for row in rows if row[1] == str(dtype).removeprefix("torch.")] or rows
    return [(math.log(density), tuple(found)) for _, _, density, found in rows]


def preferred(device_type: str, op: str, dtype: torch.dtype, density: float) -> tuple[str, ...]:
    """The backends in the order in which `auto` tries them: the row of the nearest density, then the reference."""
    if device_type not in choices():
        return ("reference",)
    at = math.log(max(density, 1e-9))
    _, order = min(_orders(device_type, op, dtype), key=lambda row: abs(row[0] - at))
    return (*order, "reference")


_chosen: str | None = None


def use_backend(name: str | None) -> None:
    """Chooses the backend of all later calls: "reference", "compiled", "triton", or "auto" (also None).

    The environment variable LTP_SPARSE_BACKEND does the same where this was not called.
    """
    global _chosen
    if name not in (None, "auto", *NAMES):
        raise ValueError(f"use_backend: expected one of auto, {', '.join(NAMES)}, got {name!r}")
    if name in NAMES and all(unavailable_reason(name, torch.device(d)) for d in ("cpu", "cuda")):
        raise BackendUnavailable(
            f"use_backend: {name} cannot be used: {unavailable_reason(name, torch.device('cuda'))}"
        )
    _chosen = None if name == "auto" else name


def chosen() -> str:
    """The backend asked for by `use_backend` or by the environment; "auto" where none was.

    Raises:
        ValueError: the environment names none.
    """
    name = _chosen or os.environ.get(ENVIRONMENT) or "auto"
    if name not in ("auto", *NAMES):
        raise ValueError(f"{ENVIRONMENT}: expected one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


def resolve(
    device: torch.device, op: str = "masked_adamw_", dtype: torch.dtype = torch.float32, density: float = 0.2
) -> Backend:
    """The backend that serves a call on tensors on `device`.

    op:      one of `OPERATIONS`
    dtype:   of the parameters
    density: active entries in parts of all

    Raises:
        BackendUnavailable: the chosen backend cannot.
    """
    name = chosen()
    if name == "auto":
        order = preferred(device.type, op, dtype, density)
        name = next(n for n in order if unavailable_reason(n, device) is None)
    elif reason := unavailable_reason(name, device):
        raise BackendUnavailable(
            f'the backend {name} was asked for and cannot serve {device}: {reason}. use_backend("auto") falls back'
        )
    return _of(name, device)


def named(name: str, device: torch.device) -> Backend:
    """The backend that `resolve` has chosen before, by its name.

    Raises:
        ValueError: there is none of that name.
        BackendUnavailable: it cannot serve tensors on `device`.
    """
    if name not in NAMES:
        raise ValueError(f"expected one of the backends {', '.join(NAMES)}, got {name!r}")
    if reason := unavailable_reason(name, device):
        raise BackendUnavailable(f"the backend {name} cannot serve {device}: {reason}")
    return _of(name, device)


def _of(name: str, device: torch.device) -> Backend:
    if name == "reference":
        return _reference
    if name == "triton":
        return _triton()
    return _compiled() if device.type == "cpu" else _compiled_cuda()


def available_backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Backend -> "ok", or the reason why it cannot serve tensors on `device`."""
    return {name: unavailable_reason(name, torch.device(device)) or "ok" for name in NAMES}


def isa() -> str | None:
    """The instruction set that the compiled backend chose for this processor, e.g. "avx512"."""
    extension = _extension()
    return extension.isa() if isinstance(extension, ModuleType) else None
