"""The two operations: checked once here, registered once with torch.library, served by a backend.

`topk_delta` and `masked_adamw_` are functional, on lists of tensors; `select` and `MaskedAdamW` are what most people
use.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.encoding import IndexSet, TileTable, bitmap_words, tiles_of
from ltp_sparse.reference import Coefficient
from ltp_sparse.rounding import rounding_keys
from ltp_sparse.topk import Selection, TensorSource, select_topk

_library = torch.library.Library("ltp_sparse", "DEF")  # noqa: TOR901 (kept for the life of the process)

_library.define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) scales, Tensor(e!) master, Tensor tiles, Tensor words, Tensor ranks, Tensor positions, "
    "Tensor coefficients, Tensor anchor, bool stochastic, bool packed) -> ()"
)
_library.define(
    "masked_sum_squares(Tensor[] params, Tensor[] grads, Tensor master, Tensor tiles, Tensor words, Tensor ranks, "
    "Tensor positions, Tensor coefficients, Tensor anchor, bool packed) -> Tensor"
)
_library.define(
    "masked_pack_(Tensor[] grads, Tensor(a!) out, Tensor tiles, Tensor words, Tensor ranks, Tensor positions, "
    "bool accumulate) -> ()"
)
_library.define("topk_delta(Tensor[] initial, Tensor[] tuned, int[] groups, int[] k) -> (Tensor, Tensor, Tensor)")


def _update_backend(tensors: Sequence[Tensor], words: Tensor, ranks: Tensor, k: int | None = None) -> backends.Backend:
    """The backend for k active entries of these tensors; without k, which the norm cannot tell, the usual case."""
    known: dict[str, Any] = {} if k is None else {"density": k / max(1, sum(map(Tensor.numel, tensors)))}
    backend = backends.resolve(words.device, dtype=tensors[0].dtype if tensors else torch.float32, **known)
    if backend.needs_ranks and ranks.numel() != words.numel() // 2:
        raise ValueError(f"masked_adamw_: the {backend.name} backend needs a table with ranks: TileTable.with_ranks()")
    return backend


@torch.library.impl(_library, "masked_adamw_", "CompositeExplicitAutograd")
def _masked_adamw_(
    params, grads, exp_avg, exp_avg_sq, scales, master, tiles, words, ranks, positions, coefficients, anchor,
    stochastic, packed,
):  # fmt: skip
    with torch.no_grad():
        contiguous = [param if param.is_contiguous() else param.contiguous() for param in params]
        _update_backend(params, words, ranks, exp_avg.numel()).masked_adamw_(
            contiguous, [grad.contiguous() for grad in grads], exp_avg, exp_avg_sq, scales, master,
            tiles, words, ranks, positions, coefficients, anchor, stochastic, packed,
        )  # fmt: skip
        for param, updated in zip(params, contiguous, strict=True):
            if param is not updated:
                param.copy_(updated)


@torch.library.impl(_library, "masked_sum_squares", "CompositeExplicitAutograd")
def _masked_sum_squares(params, grads, master, tiles, words, ranks, positions, coefficients, anchor, packed):
    with torch.no_grad():
        return _update_backend(params, words, ranks).masked_sum_squares(
            [param.contiguous() for param in params], [grad.contiguous() for grad in grads], master,
            tiles, words, ranks, positions, coefficients, anchor, packed,
        )  # fmt: skip


@torch.library.impl(_library, "masked_pack_", "CompositeExplicitAutograd")
def _masked_pack_(grads, out, tiles, words, ranks, positions, accumulate):
    with torch.no_grad():
        _update_backend(grads, words, ranks, out.numel()).masked_pack_(
            [grad.contiguous() for grad in grads], out, tiles, words, ranks, positions, accumulate
        )


@torch.library.impl(_library, "topk_delta", "CompositeExplicitAutograd")
def _topk_delta(initial, tuned, groups, k):
    with torch.no_grad():
        source = TensorSource(initial, tuned)
        dtype, density = tuned[0].dtype if tuned else torch.float32, sum(k) / max(1, sum(source.sizes))
        backend = backends.resolve(source.device, "topk_delta", dtype, density)
        selection = select_topk(backend, source, list(groups), list(k))
        return selection.words, selection.counts, selection.thresholds


@torch.library.register_fake("ltp_sparse::masked_adamw_", lib=_library)
def _(
    params, grads, exp_avg, exp_avg_sq, scales, master, tiles, words, ranks, positions, coefficients, anchor,
    stochastic, packed,
):  # fmt: skip
    return None


@torch.library.register_fake("ltp_sparse::masked_sum_squares", lib=_library)
def _(params, grads, master, tiles, words, ranks, positions, coefficients, anchor, packed):
    return tiles.new_empty(tiles.shape[0], dtype=torch.float64)


@torch.library.register_fake("ltp_sparse::masked_pack_", lib=_library)
def _(grads, out, tiles, words, ranks, positions, accumulate):
    return None


@torch.library.register_fake("ltp_sparse::topk_delta", lib=_library)
def _(initial, tuned, groups, k):
    words = sum(bitmap_words(t.numel()) for t in tuned)
    return (
        tuned[0].new_empty(words, dtype=torch.int32),
        tuned[0].new_empty(sum(tiles_of(t.numel()) for t in tuned), dtype=torch.int64),
        tuned[0].new_empty(len(k), dtype=torch.float32),
    )


@torch.no_grad()
def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None] | Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    table: TileTable,
    coefficients: Tensor,
    anchor: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    master: Tensor | None = None,
    stochastic: bool = False,
) -> None:
    """One AdamW step on the active entries of `params`; all others keep their bits, whatever their gradients hold.

    Args:
        params: all float32, bfloat16 or float16, any shapes; updated in place at the active entries only, in float32
            arithmetic, and rounded to nearest.
        grads: of the shapes of `params`, all of their dtype or all float32; None: the parameter is skipped, moments
            included. Or packed gradients: one float32 tensor [table.k] in slot order, as `masked_pack_` makes them.
        exp_avg: [table.k], first moments in slot order; updated in place. float32, or with `scales` int8 codes.
        exp_avg_sq: [table.k], second moments; updated in place. float32, or with `scales` uint8 codes.
        table: the active entries, `TileTable.build([index set per parameter])`.
        coefficients: float64 [P, 11], a row per parameter: `adamw_coefficients(...)`. It and all packed tensors must be
            contiguous, and on the device of the table.
        anchor: float32 [table.k], values that the pull of the coefficients draws to, or None.
        scales: float32 [table.blocks, 2], of the 8-bit moments (see `quantization.py`); updated in place. Zeros, with
            codes of zero, are moments of zero. The codes are rounded stochastically, keyed by ROUNDING_KEY.
        master: float32 [table.k], the exact values of the active entries; updated in place, and rounded into `params`.
        stochastic: rounds bfloat16 parameters stochastically, keyed by the coefficients' ROUNDING_KEY (`seed` of
            `adamw_coefficients`).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    _check_parameters(params, grads, table, coefficients)
    empty = coefficients.new_empty(0, dtype=torch.float32)
    moments = (torch.float32, torch.float32) if scales is None else (torch.int8, torch.uint8)
    _check_packed("exp_avg", exp_avg, moments[0], table)
    _check_packed("exp_avg_sq", exp_avg_sq, moments[1], table)
    _check_packed("anchor", anchor, torch.float32, table)
    _check_packed("master", master, torch.float32, table)
    _check_packed("scales", scales, torch.float32, table, shape=(table.blocks, 2))
    if stochastic and (master is not None or any(param.dtype != torch.bfloat16 for param in params)):
        raise ValueError(
            "masked_adamw_: stochastic rounding is for bfloat16 parameters without a master; "
            "float16 needs a master, float32 is not rounded"
        )
    table = _readable(table)
    torch.ops.ltp_sparse.masked_adamw_(
        list(params), _gradients(params, grads), exp_avg, exp_avg_sq, _or(scales, empty), _or(master, empty),
        table.tiles, table.words, table.ranks, table.positions, coefficients, _or(anchor, empty), stochastic,
        isinstance(grads, Tensor),
    )  # fmt: skip


@torch.no_grad()
def masked_sum_squares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None] | Tensor,
    table: TileTable,
    coefficients: Tensor,
    anchor: Tensor | None = None,
    *,
    master: Tensor | None = None,
) -> Tensor:
    """float64 [T]: per tile, the sum of squares of the active gradient entries, scaled and pulled as in the update.

    Arguments as for `masked_adamw_`.
    """
    _check_parameters(params, grads, table, coefficients)
    _check_packed("anchor", anchor, torch.float32, table)
    _check_packed("master", master, torch.float32, table)
    empty = coefficients.new_empty(0, dtype=torch.float32)
    table = _readable(table)
    return torch.ops.ltp_sparse.masked_sum_squares(
        list(params), _gradients(params, grads), _or(master, empty),
        table.tiles, table.words, table.ranks, table.positions, coefficients, _or(anchor, empty),
        isinstance(grads, Tensor),
    )  # fmt: skip


@torch.no_grad()
def masked_pack_(grads: Sequence[Tensor | None], out: Tensor, table: TileTable, *, accumulate: bool = False) -> None:
    """Copies the active entries of dense gradients to their slots; what is not active is dropped, NaN included.

    Args:
        grads: of the sizes that the table was built for, all of one dtype; None: its slots stay as they are.
        out: float32 [table.k], in slot order; written in place.
        table: the active entries.
        accumulate: adds to `out` instead.

    Raises:
        TypeError, ValueError: dtypes, sizes or devices do not fit.
    """
    _check_packed("out", out, torch.float32, table, "masked_pack_")
    if len(grads) != len(table.sizes):
        raise ValueError(f"masked_pack_: expected {len(table.sizes)} gradients, those of the table, got {len(grads)}")
    if len(dtypes := {grad.dtype for grad in grads if grad is not None}) > 1:
        raise TypeError(
            f"masked_pack_: expected gradients of one dtype, got {_names(dtypes)}; make a call, and a table, per dtype"
        )
    for i, (grad, size) in enumerate(zip(grads, table.sizes, strict=True)):
        if grad is None:
            continue
        if grad.dtype not in backends.DTYPES or grad.layout != torch.strided:
            raise TypeError(
                f"masked_pack_: gradient {i} must be a dense float32, bfloat16 or float16 tensor, "
                f"got {grad.dtype} ({grad.layout})"
            )
        if grad.numel() != size or grad.device != out.device:
            raise ValueError(
                f"masked_pack_: gradient {i} must have {size} entries on {out.device}, "
                f"got {grad.numel()} on {grad.device}"
            )
    table = _readable(table)
    torch.ops.ltp_sparse.masked_pack_(
        [out.new_empty(0) if grad is None else grad for grad in grads], out,
        table.tiles, table.words, table.ranks, table.positions, accumulate,
    )  # fmt: skip


def _readable(table: TileTable) -> TileTable:
    """With the rank directory where the backend reads it; build the table with `ranks=True` to save the work."""
    return table.with_ranks() if backends.resolve(table.tiles.device).needs_ranks else table


def _gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None] | Tensor) -> list[Tensor]:
    if isinstance(grads, Tensor):
        return [grads]
    return [param.new_empty(0) if grad is None else grad for param, grad in zip(params, grads, strict=True)]


def _or(tensor: Tensor | None, empty: Tensor) -> Tensor:
    return empty if tensor is None else tensor


def _check_parameters(
    params: Sequence[Tensor], grads: Sequence[Tensor | None] | Tensor, table: TileTable, coefficients: Tensor
) -> None:
    if isinstance(grads, Tensor):
        _check_packed("packed gradients", grads, torch.float32, table)
        grads = [None] * len(params)
    if not len(params) == len(grads) == len(table.counts):
        raise ValueError(
            f"masked_adamw_: expected as many gradients and index sets as parameters, got {len(params)} parameters, "
            f"{len(grads)} gradients and a table of {len(table.counts)}"
        )
    _check_packed("coefficients", coefficients, torch.float64, table, shape=(len(params), int(Coefficient.COUNT)))
    device = table.tiles.device
    for i, (param, grad, size) in enumerate(zip(params, grads, table.sizes, strict=True)):
        if param.numel() != size:
            raise ValueError(
                f"masked_adamw_: parameter {i} has {param.numel()} entries, its index set covers {size}; "
                "a parameter must keep its shape"
            )
        for what, tensor in (("parameter", param), ("gradient", grad)):
            if tensor is None:
                continue
            if tensor.dtype not in backends.DTYPES or tensor.layout != torch.strided:
                raise TypeError(
                    f"masked_adamw_: {what} {i} must be a dense float32, bfloat16 or float16 tensor, "
                    f"got {tensor.dtype} ({tensor.layout})"
                )
            if tensor.device != device:
                raise ValueError(f"masked_adamw_: {what} {i} is on {tensor.device}, the tile table on {device}")
        if grad is not None and grad.shape != param.shape:
            raise ValueError(
                f"masked_adamw_: gradient {i} has shape {list(grad.shape)}, its parameter {list(param.shape)}"
            )
    param_dtypes = {param.dtype for param in params}
    grad_dtypes = {grad.dtype for grad in grads if grad is not None}
    if len(param_dtypes) > 1 or len(grad_dtypes) > 1 or not grad_dtypes <= {*param_dtypes, torch.float32}:
        raise TypeError(
            "masked_adamw_: expected parameters of one dtype, and gradients of that dtype or of float32, "
            f"got parameters of {_names(param_dtypes)} and gradients of {_names(grad_dtypes)}; make a call per dtype"
        )


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def _check_packed(
    what: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    table: TileTable,
    op: str = "masked_adamw_",
    shape: tuple[int, ...] | None = None,
) -> None:
    """Backends read the addresses of these tensors, so all that such an address takes for granted is looked at."""
    device, shape = table.tiles.device, (table.k,) if shape is None else shape
    if tensor is not None and (
        tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous()
    ):
        strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
        raise ValueError(
            f"{op}: {what} must be {dtype} {list(shape)} on {device}, contiguous, "
            f"got {tensor.dtype} {list(tensor.shape)}{strides} on {tensor.device}"
        )


def adamw_coefficients(
    steps: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    pull: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """float64 [P, 11] coefficients of `masked_adamw_` for parameters that have taken `steps` steps, this one included.

    Args:
        steps: [P], >= 1.
        lr: step size; the others as in torch.optim.AdamW.
        pull: weight of sign(param - anchor), added to the gradient.
        seed: of the random bits of stochastic rounding and 8-bit moments, 0 <= seed < 2^63; the parameters are told
            apart by their positions.
    """
    step = steps.to(torch.float64)
    beta1, beta2 = betas
    table = torch.zeros(step.numel(), Coefficient.COUNT, dtype=torch.float64, device=step.device)
    table[:, Coefficient.APPLY] = 1.0
    table[:, Coefficient.GRAD_FACTOR] = 1.0
    table[:, Coefficient.DECAY_STEP] = lr * weight_decay
    table[:, Coefficient.ONE_MINUS_BETA1] = 1.0 - beta1
    table[:, Coefficient.BETA2] = beta2
    table[:, Coefficient.ONE_MINUS_BETA2] = 1.0 - beta2
    table[:, Coefficient.STEP_SIZE] = lr / (1.0 - beta1**step)
    table[:, Coefficient.INV_SQRT_BC2] = (1.0 - beta2**step).rsqrt()
    table[:, Coefficient.EPS] = eps
    table[:, Coefficient.PULL] = pull
    table[:, Coefficient.ROUNDING_KEY] = rounding_keys(seed, step, torch.arange(step.numel(), device=step.device))
    return table


@torch.no_grad()
def topk_delta(
    initial: Sequence[Tensor],
    tuned: Sequence[Tensor],
    k: int | Sequence[int],
    *,
    groups: Sequence[int] | None = None,
) -> tuple[list[IndexSet], Tensor]:
    """The k entries of largest |tuned - initial| over all tensors, exactly; ties go to the earliest (tensor, index).

    Args:
        initial: float32, bfloat16 or float16 tensors, any contiguity; an empty list stands for zeros, which ranks
            |tuned|.
        tuned: of the same shapes; dtypes of a pair may differ, deltas are taken in float32.
        k: entries to select; with `groups`, a number per group.
        groups: the group of every tensor, 0, 1, ...; default: all in one.

    Returns:
        An index set per tensor, and float32 [G], the smallest selected |delta| of every group (infinite: none
        selected). Entries whose delta is zero are never selected, so that fewer than k may come.

    Raises:
        NonFiniteDelta (a ValueError): a delta is NaN or infinite.
        TypeError, ValueError: shapes, dtypes, devices or counts do not fit.
    """
    groups = [0] * len(tuned) if groups is None else list(groups)
    ks = [operator.index(k)] if isinstance(k, SupportsIndex) else list(k)
    _check_selection(initial, tuned, ks, groups)
    if not tuned:
        return [], torch.full((len(ks),), torch.inf)
    words, counts, thresholds = torch.ops.ltp_sparse.topk_delta(list(initial), list(tuned), groups, ks)
    return index_sets(Selection(words, counts, thresholds), [t.numel() for t in tuned]), thresholds


def index_sets(selection: Selection, sizes: Sequence[int]) -> list[IndexSet]:
    """The index set of every tensor, cut from the flat bitmap of a selection."""
    words = selection.words.split([bitmap_words(n) for n in sizes])
    counts = selection.counts.split([tiles_of(n) for n in sizes])
    return [IndexSet.from_bitmap(*of_tensor) for of_tensor in zip(words, sizes, counts, strict=True)]


def _check_selection(initial: Sequence[Tensor], tuned: Sequence[Tensor], ks: list[int], groups: list[int]) -> None:
    if initial and len(initial) != len(tuned):
        raise ValueError(f"topk_delta: expected as many initial as tuned tensors, got {len(initial)} and {len(tuned)}")
    for i, tensors in enumerate(zip(initial, tuned, strict=True) if initial else ((t,) for t in tuned)):
        for tensor in tensors:
            if tensor.dtype not in backends.DTYPES:
                raise TypeError(
                    f"topk_delta: tensor {i} must be float32, bfloat16 or float16, got {tensor.dtype}; convert it"
                )
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"topk_delta: tensor {i} has initial shape {list(tensors[0].shape)}, tuned {list(tensor.shape)}"
                )
            if tensor.device != tuned[0].device:
                raise ValueError(f"topk_delta: tensor {i} is on {tensor.device}, the first on {tuned[0].device}")
    if len(groups) != len(tuned) or any(not 0 <= g < len(ks) for g in groups):
        raise ValueError(f"topk_delta: groups must name one of {len(ks)} groups for each of {len(tuned)} tensors")
    pools = [0] * len(ks)
    for tensor, group in zip(tuned, groups, strict=True):
        pools[group] += tensor.numel()
    for group, (k, pool) in enumerate(zip(ks, pools, strict=True)):
        if not 0 <= k <= pool:
            where = f" in group {group}" if len(ks) > 1 else ""
            raise ValueError(f"topk_delta: k must be in [0, {pool}] for a pool of {pool} entries{where}, got {k}")
