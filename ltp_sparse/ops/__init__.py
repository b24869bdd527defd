"""The operations as functions of lists of tensors: `topk_delta`, `masked_adamw_`, and copies of active entries.

Each is registered with torch.library once. Inside, its arguments are checked (`backends/checks.py`) and a backend runs
it. Most people use `select` and `MaskedAdamW` instead, which are built on them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.backends import arguments as records
from ltp_sparse.backends import checks, reference
from ltp_sparse.backends.arguments import RECORDS, Tensors, arguments_of, schema, tensors_of
from ltp_sparse.backends.coefficients import Coefficient, write_coefficients
from ltp_sparse.backends.rounding import rounding_keys
from ltp_sparse.ops.routes import Selection, select_topk
from ltp_sparse.ops.sources import TensorSource
from ltp_sparse.tickets.bits import bitmap_words, tiles_of
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable
from ltp_sparse.weights.tensors import all_plain, check_plain_tensor, count_edit

_library = torch.library.Library("ltp_sparse", "DEF")  # noqa: TOR901 (kept for the life of the process)
_library.define("topk_delta(Tensor[] initial, Tensor[] tuned, int[] groups, int[] k) -> (Tensor, Tensor, Tensor)")

_LISTS = {"params": "parameter", "grads": "gradient", "tensors": "tensor"}

_CHECKS: dict[str, Callable[[str, Any], checks.TableFacts]] = {
    "masked_adamw_": checks.check_update,
    "masked_sum_squares": checks.check_update,
    "masked_pack_": checks.check_pack,
    **dict.fromkeys(("masked_gather_", "masked_scatter_", "masked_swap_"), checks.check_copy),
}


def _run(op: str, record: Any, backend: backends.Backend | None) -> Any:
    """Runs an operator on its record, by the given backend or the one that suits the record."""
    served, contiguous = _serving(op, record, backend), _contiguous(record)
    result = getattr(served, op)(contiguous)
    if contiguous is not record and op in ("masked_adamw_", "masked_scatter_", "masked_swap_"):
        for tensor, copy in zip(_first_list(record).present, _first_list(contiguous).present, strict=True):
            if tensor is not copy:
                tensor.copy_(copy)
    if op in ("masked_scatter_", "masked_swap_"):
        count_edit(record.tensors.present)
    elif op == "masked_adamw_" and not record.packed:  # which have packed gradients, only the caller knows
        params, grads = record.params, record.grads
        absent = 0 in grads.addresses
        count_edit([p for p, grad in zip(params, grads, strict=True) if grad is not None] if absent else params)
    return result


def _first_list(record: Any) -> Tensors:
    """The tensors whose entries a record is about: its parameters, gradients or other tensors."""
    return next(getattr(record, name) for name in _LISTS if hasattr(record, name))


def _contiguous(record: Any) -> Any:
    """The record with contiguous copies in place of listed tensors that are not contiguous."""
    lists = {name: getattr(record, name) for name in _LISTS if hasattr(record, name)}
    if all(tensors.contiguous for tensors in lists.values()):
        return record
    copies: dict[str, Any] = {name: tensors.to_contiguous() for name, tensors in lists.items()}
    if isinstance(record, records.Norm):  # these rows hold the addresses of the originals
        copies["prepared"] = None
    return replace(record, **copies)


def _serving(op: str, record: Any, backend: backends.Backend | None) -> backends.Backend:
    """Checks a record; returns the given backend, or the one that suits its tensors and their density."""
    facts = _CHECKS[op](op, record)
    if backend is None:
        tensors = _first_list(record)
        density = facts.k / max(1, sum(tensors.sizes))
        backend = backends.resolve(record.words.device, _kind(op), _dtype(tensors), density)
    if backend.needs_ranks and record.ranks.numel() != record.words.numel() // 2:
        raise ValueError(f"{op}: the {backend.name} backend needs a table with ranks: TileTable.with_ranks()")
    return backend


def _record(op: str, arguments: Sequence[Any]) -> tuple[Any, str]:
    """The record of an operator's arguments, and the name of the backend, "" if none was given.

    An empty tensor stands for an optional tensor, or a gradient, that is absent.
    """
    fields = arguments_of(RECORDS[op])
    values: dict[str, Any] = {}
    for (name, field), value in zip(fields.items(), arguments, strict=False):
        if field.kind is Tensors:
            values[name] = Tensors(value)
        else:
            values[name] = _none_if_empty(value) if field.optional else value
    if "grads" in values and not values.get("packed"):
        values["grads"] = Tensors(map(_none_if_empty, values["grads"]))
    return RECORDS[op](**values), "".join(arguments[len(fields) :])


def _none_if_empty(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.numel() == 0 else tensor


def _register(op: str, returns: str) -> None:
    """Registers an operator whose arguments are the fields of its record, and `backend`, a name."""
    _library.define(schema(op, RECORDS[op], "str backend=''", returns=returns))

    @torch.library.impl(_library, op, "CompositeExplicitAutograd")
    def _(*arguments: Any) -> Any:
        record, name = _record(op, arguments)
        with torch.no_grad():
            return _run(op, record, backends.named(name, record.words.device) if name else None)

    @torch.library.register_fake(f"ltp_sparse::{op}", lib=_library)
    def _(*arguments: Any) -> Any:
        record, _ = _record(op, arguments)
        lists = {what: getattr(record, name).present for name, what in _LISTS.items() if hasattr(record, name)}
        _check_devices(op, record.tiles.device, **lists, **dict(tensors_of(record)))
        return record.tiles.new_empty(record.tiles.shape[:1], dtype=torch.float64) if returns == "Tensor" else None


for _op in _CHECKS:
    _register(_op, "Tensor" if _op == "masked_sum_squares" else "()")


def run(op: str, record: Any, backend: backends.Backend) -> Any:
    """Runs a record on a backend: directly, or through the operator if torch is tracing or has a dispatch mode."""
    if not _is_watched():
        return _run(op, record, backend)
    for name, what in _LISTS.items():
        _refuse_subclasses(op, what, getattr(record, name, ()))
    fields = {name: getattr(record, name) for name in arguments_of(RECORDS[op])}
    return getattr(torch.ops.ltp_sparse, op)(**fields, backend=backend.name)


def check(op: str, record: Any, backend: backends.Backend) -> None:
    """Raises what `run` would raise for a record; when torch is tracing, `run` itself will."""
    if not _is_watched():
        _serving(op, record, backend)


def _is_watched() -> bool:
    """Whether torch is compiling, or a dispatch mode wants to see operators."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def prepare_step(step: records.Step, backend: backends.Backend) -> None:
    """Counts a step and computes its coefficients."""
    (reference.prepare_step if _is_watched() else backend.prepare_step)(step)


def gradient_norm(norm: records.Norm, total: records.Total, backend: backends.Backend) -> None:
    """After the last launch of a step: the norm of the gradients, and the factor that clips them."""
    if _is_watched():
        reference.add_sums(run("masked_sum_squares", norm, backend), total)
    else:
        _serving("masked_sum_squares", norm, backend).gradient_norm(_contiguous(norm), total)


@torch.library.impl(_library, "topk_delta", "CompositeExplicitAutograd")
def _topk_delta(initial, tuned, groups, k):
    selection = select_from(TensorSource(initial, tuned), list(groups), list(k))
    return selection.words, selection.counts, selection.thresholds


@torch.no_grad()
def select_from(source: TensorSource, groups: list[int], ks: list[int]) -> Selection:
    """`topk_delta` from a source, which may also ask for digests; arguments are checked in the same way."""
    initial, tuned = source.initial, source.tuned
    checks.check_selection("topk_delta", initial, tuned, groups, ks)
    dtype, density = tuned[0].dtype if tuned else torch.float32, sum(ks) / max(1, sum(source.sizes))
    return select_topk(backends.resolve(source.device, "topk_delta", dtype, density), source, groups, ks)


def _check_devices(op: str, device: torch.device, **arguments: Sequence[Tensor] | Tensor) -> None:
    """Torch comes here if any tensor is on the meta device. One on a real device would silently stay as it was."""
    for what, tensors in arguments.items():
        for i, tensor in enumerate([tensors] if isinstance(tensors, Tensor) else tensors):
            if tensor.device != device:
                name = what if isinstance(tensors, Tensor) else f"{what} {i}"
                raise ValueError(f"{op}: {name} is on {tensor.device}, expected it on {device}")


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


def _kind(op: str) -> str:
    """What the table of choices calls an operator."""
    return "masked_copy" if op in ("masked_gather_", "masked_scatter_", "masked_swap_") else "masked_adamw_"


def served(table: TileTable, dtype: torch.dtype, op: str = "masked_adamw_") -> tuple[TileTable, backends.Backend]:
    """The table, with its directory if the backend reads it, and the backend for parameters of a dtype.

    One backend serves norm, packing and update of a step: the choice depends on the density of the whole table, which
    tables of its parts keep. On a GPU, `ranks=True` when the table is built saves making the directory here.
    """
    if table.tiles.is_meta:
        check_plain_tensor(table.tiles, "the tile table")
    backend = backends.resolve(table.tiles.device, _kind(op), dtype, table.density)
    return table.with_ranks() if backend.needs_ranks else table, backend


def norm_fields(
    op: str,
    params: Tensors,
    grads: Sequence[Tensor | None] | Tensor,
    table: TileTable,
    coefficients: Tensor,
    anchor: Tensor | None,
    master: Tensor | None,
    **state: Tensor | None,
) -> dict[str, Any]:
    """The fields of a `Norm` and `state`. Here they are compared with the table; `run` checks the rest."""
    packed = isinstance(grads, Tensor)
    listed = grads if isinstance(grads, Tensors) else Tensors([grads] if isinstance(grads, Tensor) else grads)
    count = len(params) if packed else len(listed)
    if not len(params) == count == len(table.counts):
        raise ValueError(
            f"{op}: expected as many gradients and index sets as parameters, got {len(params)} parameters, "
            f"{count} gradients and a table of {len(table.counts)}"
        )
    _refuse_subclasses(op, "tensor of state", (coefficients, anchor, master, *state.values()))
    _check_sizes(op, "parameter", params.sizes, table)
    return {
        **_index(table),
        "grads": listed,
        "params": params,
        "coefficients": coefficients,
        "packed": packed,
        "master": master,
        "anchor": anchor,
        **state,
    }


def _index(table: TileTable) -> dict[str, Tensor]:
    return {"tiles": table.tiles, "words": table.words, "ranks": table.ranks, "positions": table.positions}


def _dtype(tensors: Tensors) -> torch.dtype:
    return tensors.present[0].dtype if tensors.present else torch.float32


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
    """One AdamW step on the active entries of `params`. All others keep their bits, whatever their gradients are.

    Args:
        params: P tensors of any shapes, all float32, bfloat16 or float16. The active entries are updated in place, in
            float32 arithmetic, and rounded to nearest.
        grads: dense gradients in the shapes of `params`, all in their dtype or all in float32. A parameter whose
            gradient is None is skipped, with its moments. Or packed gradients: one float32 tensor [table.k] in slot
            order, as `masked_pack_` makes it.
        exp_avg: [table.k] first moments in slot order, float32, or int8 codes with `scales`; updated in place.
        exp_avg_sq: [table.k] second moments, float32, or uint8 codes with `scales`; updated in place.
        table: the active entries, `TileTable.build([index set per parameter])`.
        coefficients: float64 [P, 11], a row per parameter from `adamw_coefficients`. It and all packed tensors must be
            contiguous and on the device of the table.
        anchor: float32 [table.k], the values that the pull draws to, or None.
        scales: float32 [table.blocks, 2], scales of 8-bit moments (`backends/quantization.py`); updated in place. All
            zeros, with codes of zero, are moments of zero. New codes are rounded stochastically by the ROUNDING_KEY.
        master: float32 [table.k], the exact values of the active entries; updated in place and rounded into `params`.
        stochastic: rounds bfloat16 parameters stochastically, by the ROUNDING_KEY of the coefficients (`seed` of
            `adamw_coefficients`).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    listed = Tensors(params)
    table, backend = served(table, _dtype(listed))
    fields = norm_fields(
        "masked_adamw_", listed, grads, table, coefficients, anchor, master,
        exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, scales=scales,
    )  # fmt: skip
    update = records.Update(**fields, stochastic=stochastic)
    run("masked_adamw_", update, backend)
    if update.packed:
        count_edit(update.params.present)


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
    """float64 [T]: for each tile, the sum of squares of the effective gradients of its active entries.

    Args:
        params: as for `masked_adamw_`, and so are the other arguments.
        grads: dense or packed gradients.
        table: the active entries.
        coefficients: float64 [P, 11]; GRAD_FACTOR and PULL are used.
        anchor: float32 [table.k] or None.
        master: float32 [table.k] or None.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    listed = Tensors(params)
    table, backend = served(table, _dtype(listed))
    fields = norm_fields("masked_sum_squares", listed, grads, table, coefficients, anchor, master)
    return run("masked_sum_squares", records.Norm(**fields), backend)


@torch.no_grad()
def masked_pack_(grads: Sequence[Tensor | None], out: Tensor, table: TileTable, *, accumulate: bool = False) -> None:
    """Copies the active entries of dense gradients to their slots. All other entries are ignored, NaN included.

    Args:
        grads: gradients of the sizes that the table was built for, all of one dtype. The slots of one that is None stay
            as they are.
        out: float32 [table.k] in slot order; written in place.
        table: the active entries.
        accumulate: adds the entries to `out` instead.

    Raises:
        TypeError, ValueError: dtypes, sizes or devices do not fit.
    """
    listed = Tensors(grads)
    _refuse_subclasses("masked_pack_", "tensor", [*listed, out])
    _check_sizes("masked_pack_", "gradient", [None if grad is None else grad.numel() for grad in listed], table)
    table, backend = served(table, _dtype(listed))
    run("masked_pack_", records.Pack(**_index(table), grads=listed, out=out, accumulate=accumulate), backend)


@torch.no_grad()
def masked_gather(tensors: Sequence[Tensor], table: TileTable, *, out: Tensor | None = None) -> Tensor:
    """Copies the active entries of some tensors, bit by bit, to a new tensor in slot order.

    Args:
        tensors: tensors of the sizes that the table was built for, all of one dtype of at most 8 bytes.
        table: the active entries.
        out: [table.k] of their dtype, to write into; None: a new tensor.

    Returns:
        [table.k] of that dtype.

    Raises:
        TypeError, ValueError: dtypes, sizes or devices do not fit.
    """
    dtype = tensors[0].dtype if tensors else torch.float32
    slots = torch.empty(table.k, dtype=dtype, device=table.tiles.device) if out is None else out
    _run_copy("masked_gather_", records.Gather, tensors, slots, table)
    return slots


@torch.no_grad()
def masked_scatter_(tensors: Sequence[Tensor], slots: Tensor, table: TileTable) -> None:
    """Writes slots to the active entries of some tensors. All others keep their bits. It undoes `masked_gather`.

    Args:
        tensors: as in `masked_gather`; written in place.
        slots: [table.k] of their dtype, in slot order.
        table: the active entries.

    Raises:
        TypeError, ValueError: dtypes, sizes or devices do not fit, or tensors share memory.
    """
    _run_copy("masked_scatter_", records.Scatter, tensors, slots, table)


@torch.no_grad()
def masked_swap_(tensors: Sequence[Tensor], slots: Tensor, table: TileTable) -> None:
    """Exchanges slots with the active entries of some tensors. A second call undoes the first.

    Arguments and errors are those of `masked_scatter_`; the slots are written too.
    """
    _run_copy("masked_swap_", records.Swap, tensors, slots, table)


def _run_copy(op: str, kind: type, tensors: Sequence[Tensor], slots: Tensor, table: TileTable) -> None:
    listed = Tensors(tensors)
    _refuse_subclasses(op, "tensor", [*listed, slots])
    _check_sizes(op, "tensor", listed.sizes, table)
    table, backend = served(table, _dtype(listed), op)
    run(op, kind(**_index(table), tensors=listed, slots=slots), backend)


def _check_sizes(op: str, what: str, found: Sequence[int | None], table: TileTable) -> None:
    """Compares the number of entries of each tensor, None for an absent one, with the table."""
    if len(found) != len(table.sizes):
        raise ValueError(f"{op}: expected {len(table.sizes)} {what}s, those of the table, got {len(found)}")
    if tuple(found) == table.sizes:
        return
    for i, (size, covered) in enumerate(zip(found, table.sizes, strict=True)):
        if size not in (None, covered):
            raise ValueError(
                f"{op}: {what} {i} has {size} entries, its index set covers {covered}; a parameter must keep its shape"
            )


def _refuse_subclasses(op: str, what: str, tensors: Sequence[Tensor | None]) -> None:
    """Refuses subclasses of tensors with a clear error, before torch hands the call to them. None passes."""
    if all_plain(tensors) or torch._guards.detect_fake_mode() is not None:
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
    """float64 [P, 11]: the coefficients of `masked_adamw_` for one step.

    Args:
        steps: [P], steps that each parameter has taken, this one included: at least 1.
        lr: step size.
        betas: decay rates of the two moments, as in torch.optim.AdamW.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        pull: weight of sign(param - anchor), which is added to the gradient.
        seed: seed of the random bits of stochastic rounding and 8-bit moments, 0 <= seed < 2^63. Parameters get
            different bits by their positions.
    """
    step = steps.to(torch.float64)
    numbers = torch.arange(step.numel(), dtype=torch.int64, device=step.device)

    def column(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=step.device).expand(step.numel())

    rows = torch.zeros(step.numel(), Coefficient.COUNT, dtype=torch.float64, device=step.device)
    hyper = torch.stack([column(value) for value in (lr, *betas, eps, weight_decay, 1.0, pull)], 1)
    write_coefficients(rows, hyper=hyper, apply=column(1.0), steps=step, keys=rounding_keys(seed, step, numbers))
    return rows


@torch.no_grad()
def topk_delta(
    initial: Sequence[Tensor], tuned: Sequence[Tensor], k: int | Sequence[int], *, groups: Sequence[int] | None = None
) -> tuple[list[IndexSet], Tensor]:
    """The k entries of largest |tuned - initial| over all tensors, exactly. Of ties, the earliest (tensor, index) wins.

    Args:
        initial: float32, bfloat16 or float16 tensors, contiguous or not. An empty list stands for zeros: |tuned| is
            ranked.
        tuned: tensors of the same shapes. The dtypes of a pair may differ; deltas are computed in float32.
        k: the number of entries to select; with `groups`, one number per group.
        groups: the group of every tensor, 0, 1, and so on; by default all are in one.

    Returns:
        An index set per tensor, and float32 [G], the smallest selected |delta| of every group, infinite where nothing
        was selected. Entries whose delta is zero are never selected, so that there may be fewer than k.

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
    """The index set of every tensor, cut from the bitmaps of a selection. All counts are read in one copy."""
    tiles = [tiles_of(n) for n in sizes]
    words = selection.words.split([bitmap_words(n) for n in sizes])
    counts, on_host = selection.counts.split(tiles), selection.counts.tolist()
    ks = [sum(on_host[end - count : end]) for end, count in zip(accumulate(tiles), tiles, strict=True)]
    return [IndexSet.of_counted(*of_tensor) for of_tensor in zip(words, sizes, counts, ks, strict=True)]
