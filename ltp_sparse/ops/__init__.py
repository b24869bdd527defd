"""The two operations: registered once with torch.library, checked inside (`backends/checks.py`), served by a backend.

`topk_delta` and `masked_adamw_` are functional, on lists of tensors; `select` and `MaskedAdamW` are what most people
use.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.backends import checks
from ltp_sparse.backends.reference import Coefficient
from ltp_sparse.backends.rounding import rounding_keys
from ltp_sparse.ops.routes import Selection, select_topk
from ltp_sparse.ops.sources import TensorSource
from ltp_sparse.tickets.bits import bitmap_words, tiles_of
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable
from ltp_sparse.weights.tensors import all_plain, check_plain_tensor

_library = torch.library.Library("ltp_sparse", "DEF")  # noqa: TOR901 (kept for the life of the process)

_library.define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) scales, Tensor(e!) master, Tensor tiles, Tensor words, Tensor ranks, Tensor positions, "
    "Tensor coefficients, Tensor anchor, bool stochastic, bool packed, str backend='') -> ()"
)
_library.define(
    "masked_sum_squares(Tensor[] params, Tensor[] grads, Tensor master, Tensor tiles, Tensor words, Tensor ranks, "
    "Tensor positions, Tensor coefficients, Tensor anchor, bool packed, str backend='') -> Tensor"
)
_library.define(
    "masked_pack_(Tensor[] grads, Tensor(a!) out, Tensor tiles, Tensor words, Tensor ranks, Tensor positions, "
    "bool accumulate, str backend='') -> ()"
)
_library.define("topk_delta(Tensor[] initial, Tensor[] tuned, int[] groups, int[] k) -> (Tensor, Tensor, Tensor)")


def _backend(
    op: str, name: str, tensors: Sequence[Tensor], words: Tensor, ranks: Tensor, facts: checks.TableFacts
) -> backends.Backend:
    """The backend of this name, or without one that for so many active entries of these tensors."""
    if name:
        backend = backends.named(name, words.device)
    else:
        dtype, density = (
            tensors[0].dtype if tensors else torch.float32,
            facts.k / max(1, sum(map(Tensor.numel, tensors))),
        )
        backend = backends.resolve(words.device, dtype=dtype, density=density)
    if backend.needs_ranks and ranks.numel() != words.numel() // 2:
        raise ValueError(f"{op}: the {backend.name} backend needs a table with ranks: TileTable.with_ranks()")
    return backend


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


@torch.library.impl(_library, "masked_adamw_", "CompositeExplicitAutograd")
def _masked_adamw_(
    params, grads, exp_avg, exp_avg_sq, scales, master, tiles, words, ranks, positions, coefficients, anchor,
    stochastic, packed, backend="",
):  # fmt: skip
    op, device = "masked_adamw_", tiles.device
    with torch.no_grad():
        facts = checks.table_facts(op, tiles, words, ranks, positions)
        sizes = checks.check_update(op, params, grads, facts, device, coefficients, anchor, master, packed)
        checks.check_state(op, params, sizes, facts, device, exp_avg, exp_avg_sq, scales, master, stochastic)
        contiguous = _contiguous(params)
        _backend(op, backend, params, words, ranks, facts).masked_adamw_(
            contiguous, _contiguous(grads), exp_avg, exp_avg_sq, scales, master,
            tiles, words, ranks, positions, coefficients, anchor, stochastic, packed,
        )  # fmt: skip
        for param, updated in zip(params, contiguous, strict=True):
            if param is not updated:
                param.copy_(updated)


@torch.library.impl(_library, "masked_sum_squares", "CompositeExplicitAutograd")
def _masked_sum_squares(
    params, grads, master, tiles, words, ranks, positions, coefficients, anchor, packed, backend=""
):  # fmt: skip
    op = "masked_sum_squares"
    with torch.no_grad():
        facts = checks.table_facts(op, tiles, words, ranks, positions)
        checks.check_update(op, params, grads, facts, tiles.device, coefficients, anchor, master, packed)
        return _backend(op, backend, params, words, ranks, facts).masked_sum_squares(
            _contiguous(params), _contiguous(grads), master,
            tiles, words, ranks, positions, coefficients, anchor, packed,
        )  # fmt: skip


@torch.library.impl(_library, "masked_pack_", "CompositeExplicitAutograd")
def _masked_pack_(grads, out, tiles, words, ranks, positions, accumulate, backend=""):
    op = "masked_pack_"
    with torch.no_grad():
        facts = checks.table_facts(op, tiles, words, ranks, positions)
        checks.check_pack(op, grads, out, facts, tiles.device)
        _backend(op, backend, grads, words, ranks, facts).masked_pack_(
            _contiguous(grads), out, tiles, words, ranks, positions, accumulate
        )


@torch.library.impl(_library, "topk_delta", "CompositeExplicitAutograd")
def _topk_delta(initial, tuned, groups, k):
    with torch.no_grad():
        checks.check_selection("topk_delta", initial, tuned, groups, k)
        source = TensorSource(initial, tuned)
        dtype, density = tuned[0].dtype if tuned else torch.float32, sum(k) / max(1, sum(source.sizes))
        backend = backends.resolve(source.device, "topk_delta", dtype, density)
        selection = select_topk(backend, source, list(groups), list(k))
        return selection.words, selection.counts, selection.thresholds


def _check_devices(op: str, device: torch.device, **arguments: Sequence[Tensor] | Tensor) -> None:
    """Torch takes this road if any tensor is on the meta device: one that is not would be left as it is, unnoticed."""
    for what, tensors in arguments.items():
        for i, tensor in enumerate([tensors] if isinstance(tensors, Tensor) else tensors):
            if tensor.device != device:
                name = what if isinstance(tensors, Tensor) else f"{what} {i}"
                raise ValueError(f"{op}: {name} is on {tensor.device}, expected it on {device}")


@torch.library.register_fake("ltp_sparse::masked_adamw_", lib=_library)
def _(
    params, grads, exp_avg, exp_avg_sq, scales, master, tiles, words, ranks, positions, coefficients, anchor,
    stochastic, packed, backend="",
):  # fmt: skip
    _check_devices(
        "masked_adamw_", tiles.device, parameter=params, gradient=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq,
        words=words, positions=positions, coefficients=coefficients,
    )  # fmt: skip


@torch.library.register_fake("ltp_sparse::masked_sum_squares", lib=_library)
def _(params, grads, master, tiles, words, ranks, positions, coefficients, anchor, packed, backend=""):
    _check_devices(
        "masked_sum_squares", tiles.device, parameter=params, gradient=grads, words=words, positions=positions,
        coefficients=coefficients,
    )  # fmt: skip
    return tiles.new_empty(tiles.shape[:1], dtype=torch.float64)


@torch.library.register_fake("ltp_sparse::masked_pack_", lib=_library)
def _(grads, out, tiles, words, ranks, positions, accumulate, backend=""):
    _check_devices("masked_pack_", tiles.device, gradient=grads, out=out, words=words, positions=positions)


@torch.library.register_fake("ltp_sparse::topk_delta", lib=_library)
def _(initial, tuned, groups, k):
    if not tuned:
        raise ValueError(f"topk_delta: expected as many initial as tuned tensors, got {len(initial)} and 0")
    _check_devices("topk_delta", tuned[0].device, tensor=tuned)
    _check_devices("topk_delta", tuned[0].device, tensor=initial)
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
        scales: float32 [table.blocks, 2], of the 8-bit moments (see `backends/quantization.py`); updated in place.
            Zeros, with codes of zero, are moments of zero. Codes are rounded stochastically, keyed by ROUNDING_KEY.
        master: float32 [table.k], the exact values of the active entries; updated in place, and rounded into `params`.
        stochastic: rounds bfloat16 parameters stochastically, keyed by the coefficients' ROUNDING_KEY (`seed` of
            `adamw_coefficients`).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    _check_public("masked_adamw_", params, grads, table, exp_avg, exp_avg_sq, coefficients, anchor, scales, master)
    table, backend = _served(table, params)
    empty = coefficients.new_empty(0, dtype=torch.float32)
    torch.ops.ltp_sparse.masked_adamw_(
        list(params), _gradients(params, grads), exp_avg, exp_avg_sq, _or(scales, empty), _or(master, empty),
        table.tiles, table.words, table.ranks, table.positions, coefficients, _or(anchor, empty), stochastic,
        isinstance(grads, Tensor), backend,
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
    _check_public("masked_sum_squares", params, grads, table, coefficients, anchor, master)
    table, backend = _served(table, params)
    empty = coefficients.new_empty(0, dtype=torch.float32)
    return torch.ops.ltp_sparse.masked_sum_squares(
        list(params), _gradients(params, grads), _or(master, empty),
        table.tiles, table.words, table.ranks, table.positions, coefficients, _or(anchor, empty),
        isinstance(grads, Tensor), backend,
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
    present = [grad for grad in grads if grad is not None]
    _refuse_subclasses("masked_pack_", "tensor", [*grads, out])
    _check_sizes("masked_pack_", "gradient", [None if grad is None else grad.numel() for grad in grads], table)
    table, backend = _served(table, present)
    torch.ops.ltp_sparse.masked_pack_(
        [out.new_empty(0) if grad is None else grad for grad in grads], out,
        table.tiles, table.words, table.ranks, table.positions, accumulate, backend,
    )  # fmt: skip


def _served(table: TileTable, tensors: Sequence[Tensor]) -> tuple[TileTable, str]:
    """The backend for a table, and the table with the rank directory if it reads one.

    Norm, packing and update of a step are served by one backend: the choice goes by the density of the whole, which
    tables of a part of it keep. Build the table with `ranks=True` to save the work on a GPU.
    """
    if table.tiles.is_meta:
        check_plain_tensor(table.tiles, "the tile table")
    dtype = tensors[0].dtype if tensors else torch.float32
    backend = backends.resolve(table.tiles.device, dtype=dtype, density=table.density)
    return table.with_ranks() if backend.needs_ranks else table, backend.name


def _gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None] | Tensor) -> list[Tensor]:
    if isinstance(grads, Tensor):
        return [grads]
    return [param.new_empty(0) if grad is None else grad for param, grad in zip(params, grads, strict=True)]


def _or(tensor: Tensor | None, empty: Tensor) -> Tensor:
    return empty if tensor is None else tensor


def _check_public(
    op: str, params: Sequence[Tensor], grads: Sequence[Tensor | None] | Tensor, table: TileTable, *state: Tensor | None
) -> None:
    """What the operator cannot see: subclasses, whose own dispatch comes before it, and the sizes of the table."""
    given = [grads] if isinstance(grads, Tensor) else grads
    for what, tensors in (("parameter", params), ("gradient", given), ("tensor of state", state)):
        _refuse_subclasses(op, what, tensors)
    count = len(params) if isinstance(grads, Tensor) else len(grads)
    if not len(params) == count == len(table.counts):
        raise ValueError(
            f"{op}: expected as many gradients and index sets as parameters, got {len(params)} parameters, "
            f"{count} gradients and a table of {len(table.counts)}"
        )
    _check_sizes(op, "parameter", [*map(Tensor.numel, params)], table)


def _check_sizes(op: str, what: str, found: Sequence[int | None], table: TileTable) -> None:
    """found: entries of each tensor, None of one that is not there."""
    if len(found) != len(table.sizes):
        raise ValueError(f"{op}: expected {len(table.sizes)} {what}s, those of the table, got {len(found)}")
    if found == list(table.sizes):
        return
    for i, (size, covered) in enumerate(zip(found, table.sizes, strict=True)):
        if size not in (None, covered):
            raise ValueError(
                f"{op}: {what} {i} has {size} entries, its index set covers {covered}; a parameter must keep its shape"
            )


def _refuse_subclasses(op: str, what: str, tensors: Sequence[Tensor | None]) -> None:
    """Before torch hands the call to a subclass, whose words would be less clear; None passes."""
    if all_plain(tensors, None) or torch._guards.detect_fake_mode() is not None:
        return
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            check_plain_tensor(tensor, f"{op}: {what} {i}")


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
    table[:, Coefficient.ROUNDING_KEY] = rounding_keys(
        seed, step, torch.arange(step.numel(), dtype=torch.int64, device=step.device)
    )
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
    _refuse_subclasses("topk_delta", "initial tensor", initial)
    _refuse_subclasses("topk_delta", "tuned tensor", tuned)
    if not tuned:
        checks.check_selection("topk_delta", initial, tuned, groups, ks)
        return [], torch.full((len(ks),), torch.inf, dtype=torch.float32, device="cpu")
    words, counts, thresholds = torch.ops.ltp_sparse.topk_delta(list(initial), list(tuned), groups, ks)
    return index_sets(Selection(words, counts, thresholds), [t.numel() for t in tuned]), thresholds


def index_sets(selection: Selection, sizes: Sequence[int]) -> list[IndexSet]:
    """The index set of every tensor, cut from the flat bitmap of a selection."""
    words = selection.words.split([bitmap_words(n) for n in sizes])
    counts = selection.counts.split([tiles_of(n) for n in sizes])
    return [IndexSet.from_bitmap(*of_tensor) for of_tensor in zip(words, sizes, counts, strict=True)]
