"""Checks of an operator's arguments, once per call, before a backend reads addresses.

The content of a tile table is checked when the table is first seen, and again after a change that torch has counted.
Otherwise only the tensors of the call are compared with what the table needs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ltp_sparse.backends import arguments as records
from ltp_sparse.backends.arguments import Tensors, fields_of, tensors_of
from ltp_sparse.tickets.bits import TILE, bitmap_words, popcount, tiles_of
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.tile_table import Column, state_blocks
from ltp_sparse.weights.tensors import DTYPE_NAMES, DTYPES, LOWEST_ADDRESS, all_plain, check_plain_tensor, has_memory

_TILES_AT_ONCE = 64  # tiles whose content is checked together: bounds the temporaries to some megabytes


@dataclass(frozen=True)
class TableFacts:
    """What the tensors of a call must fit, as read from the rows of a tile table.

    Attributes:
        k: number of slots.
        blocks: number of state blocks of 8-bit moments.
        extents: the fewest entries that each parameter may have, up to the last parameter of the table.
        index: words, ranks and positions; the next call must bring the same tensors.
        stamps: address, size and version of the tiles and of these.
    """

    k: int
    blocks: int
    extents: tuple[int, ...]
    index: tuple[Tensor, Tensor, Tensor]
    stamps: tuple[tuple[int, int, int] | None, ...]


_known = WeakTensorKeyDictionary()
"""Tiles -> `TableFacts`."""


def _stamp(tensor: Tensor) -> tuple[int, int, int] | None:
    """Address, size and version of a tensor; None if torch does not count its changes."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor.numel(), tensor._version)


def table_facts(op: str, table: records.Index) -> TableFacts:
    """The facts of a tile table. Its content is checked unless the table is known.

    Raises:
        TypeError, ValueError: it is not a table as `TileTable.build` makes it.
    """
    tensors = table.tiles, table.words, table.ranks, table.positions
    facts: TableFacts | None = _known.get(table.tiles)
    stamps = tuple(map(_stamp, tensors))
    if facts is not None and facts.stamps == stamps and all(a is b for a, b in zip(facts.index, tensors[1:])):  # noqa: B905
        return facts
    facts = _read_table(op, *tensors, stamps)
    if None not in stamps:
        _known[table.tiles] = facts
    return facts


def _read_table(
    op: str, tiles: Tensor, words: Tensor, ranks: Tensor, positions: Tensor, stamps: tuple[Any, ...]
) -> TableFacts:
    """Checks the content of a table, and returns its facts."""
    device = tiles.device
    _expect(op, "tiles", tiles, torch.int64, (len(tiles) if tiles.dim() else 0, len(Column)), device)
    _expect(op, "words", words, torch.int32, (words.numel() // 2 * 2,), device)
    _expect(op, "ranks", ranks, torch.int16, (words.numel() // 2 if ranks.numel() else 0,), device)
    _expect(op, "positions", positions, torch.int16, (positions.numel(),), device)
    rows = tiles.detach().cpu()
    _check_rows(rows, partial(_refuse, op, rows, torch.arange(len(rows), dtype=torch.int64, device="cpu")))
    param, start, length, active, _, _, encoding, block = rows.unbind(1)
    for kind, index in ((Encoding.BITMAP, words), (Encoding.LIST16, positions)):
        numbers = (encoding == kind).nonzero().view(-1)
        own, refuse = rows[numbers], partial(_refuse, op, rows, numbers)
        _check_places(own, kind, index.numel(), refuse)
        if kind is Encoding.BITMAP:
            _read_bitmaps(own, words, ranks, refuse)
        else:
            _read_lists(own, positions, refuse)
    extents = torch.zeros(int(param[-1]) + 1 if len(rows) else 0, dtype=torch.int64, device="cpu")
    extents.scatter_reduce_(0, param, start + length, "amax")
    return TableFacts(
        int(active.sum()),
        int(block[:1].sum() + state_blocks(active).sum()),
        tuple(extents.tolist()),
        (words, ranks, positions),
        stamps,
    )


def _check_rows(rows: Tensor, refuse: Callable[..., None]) -> None:
    """Checks all columns of the tiles except `INDEX`, each by itself and along the table."""
    param, start, length, active, slot, _, encoding, block = rows.unbind(1)
    last = torch.iinfo(torch.int64).max - TILE  # the sums of smaller numbers below do not overflow
    known = torch.tensor(list(Encoding), dtype=torch.int64, device="cpu")
    refuse((param < 0) | (param > torch.iinfo(torch.int32).max), "PARAM must be the number of a parameter")
    refuse((start < 0) | (start > last), "START must be an entry of the parameter")
    refuse((length < 1) | (length > TILE), f"LENGTH must be in [1, {TILE}]")
    refuse((active < 1) | (active > length), "ACTIVE must be in [1, LENGTH]")
    refuse(~torch.isin(encoding, known), "ENCODING must be 0, 1 or 2")
    refuse((encoding == Encoding.FULL) & (active != length), "a FULL tile has all its entries active")
    apart = (param[1:] == param[:-1]) & (start[1:] >= start[:-1] + length[:-1])
    in_order = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), apart | (param[1:] > param[:-1])])
    refuse(~in_order, "tiles must be in order and apart")
    refuse(slot != active.cumsum(0) - active, "SLOT must count the active entries before")
    blocks, first_block = state_blocks(active), block[:1]
    wrong = (block < 0) | (block > last) | (block - first_block != blocks.cumsum(0) - blocks)
    refuse(wrong, "BLOCK must count the blocks of 256 active entries before")


def _check_places(rows: Tensor, kind: Encoding, room: int, refuse: Callable[..., None]) -> None:
    """Checks `INDEX` of the tiles of one encoding, whose bitmaps or lists lie in `room` words or positions."""
    index, is_bitmap = rows[:, Column.INDEX], kind is Encoding.BITMAP
    what = "words" if is_bitmap else "positions"
    sizes = 2 * ((rows[:, Column.LENGTH] + 63) // 64) if is_bitmap else rows[:, Column.ACTIVE]
    refuse((index < 0) | (index > room - sizes), f"INDEX must lie in the {room} {what}")
    if is_bitmap:
        refuse(index % 2 != 0, "INDEX of a bitmap must be even")
    refuse(index - index[:1] != sizes.cumsum(0) - sizes, f"INDEX must follow on that of the tile before in the {what}")


def _refuse(op: str, rows: Tensor, numbers: Tensor, wrong: Tensor, problem: str, first: int = 0) -> None:
    """Raises for the first wrong tile among those with these numbers, from number `first` of them on."""
    if bool(wrong.any()):
        row = int(numbers[first + int(wrong.nonzero()[0])])
        found = ", ".join(f"{column.name} {value}" for column, value in zip(Column, rows[row].tolist(), strict=True))
        raise ValueError(f"{op}: row {row} of the tile table: {problem}, got {found}; make it with TileTable.build")


def _read_bitmaps(rows: Tensor, words: Tensor, ranks: Tensor, refuse: Callable[..., None]) -> None:
    """Checks that every bitmap has as many bits as its row says, none past its end, and that the ranks count them."""
    for first in range(0, len(rows), _TILES_AT_ONCE):
        piece = rows[first : first + _TILES_AT_ONCE].to(words.device)
        length, active, index = (piece[:, column] for column in (Column.LENGTH, Column.ACTIVE, Column.INDEX))
        groups = (length + 63) // 64
        begin, end = int(index[0]), int(index[-1] + 2 * groups[-1])
        own = words[begin:end]
        counts = popcount(own).view(-1, 2).sum(1, dtype=torch.int64)
        before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        starts = (index - begin) // 2
        refuse(before[starts + groups] - before[starts] != active, "ACTIVE must be the bits of its bitmap", first)
        rest = length % 64
        tail = own.view(-1, 2)[starts + groups - 1].to(torch.int64) & 0xFFFFFFFF
        past = (tail[:, 0] >> rest.clamp(max=32)) | (tail[:, 1] >> (rest - 32).clamp(min=0))
        refuse((rest != 0) & (past != 0), "its bitmap has bits set past its end", first)
        if ranks.numel():
            of_group = torch.repeat_interleave(torch.arange(len(piece), dtype=torch.int64, device=words.device), groups)
            expected = (before[:-1] - before[starts][of_group]) & 0xFFFF
            found = ranks[begin // 2 : end // 2].to(torch.int64) & 0xFFFF
            wrong = torch.zeros(len(piece), dtype=torch.int64, device=words.device)
            wrong.index_add_(0, of_group, (expected != found).long())
            refuse(wrong != 0, "its ranks do not count the bits before each 64 entries", first)


def _read_lists(rows: Tensor, positions: Tensor, refuse: Callable[..., None]) -> None:
    """Checks that the positions of every list ascend and lie in its tile."""
    for first in range(0, len(rows), _TILES_AT_ONCE):
        piece = rows[first : first + _TILES_AT_ONCE].to(positions.device)
        length, active, index = (piece[:, column] for column in (Column.LENGTH, Column.ACTIVE, Column.INDEX))
        begin, end = int(index[0]), int(index[-1] + active[-1])
        own = positions[begin:end]
        last = index - begin + active - 1
        refuse((own[last].to(torch.int64) & 0xFFFF) >= length, "a position lies past its end", first)
        shifted = own ^ -32768  # signed numbers in the order of the uint16 bits
        falls = shifted[1:] <= shifted[:-1]
        falls[last[:-1]] = False  # from one tile to the next
        if bool(falls.any()):
            of_entry = torch.repeat_interleave(torch.arange(len(piece), dtype=torch.int64, device=own.device), active)
            wrong = torch.zeros(len(piece), dtype=torch.bool, device=own.device)
            wrong[of_entry[1:][falls]] = True
            refuse(wrong, "the positions of its list must ascend", first)


def _expect(
    op: str, what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Checks everything that must hold before a backend reads the address of a tensor."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
        if tensor.device != device:
            raise ValueError(f"{op}: {what} is on {tensor.device}, expected it on {device}")
        check_plain_tensor(tensor, f"{op}: {what}")
        strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
        raise ValueError(
            f"{op}: {what} must be {dtype} {list(shape)} on {device}, contiguous, "
            f"got {tensor.dtype} {list(tensor.shape)}{strides} on {tensor.device}"
        )
    if not has_memory(tensor):
        check_plain_tensor(tensor, f"{op}: {what}")


def _check_there(op: str, what: str, tensor: Tensor | None) -> None:
    if tensor is None:
        raise TypeError(f"{op}: {what} must be a tensor, got None")


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def _check_dense(op: str, what: str, tensors: Tensors, device: torch.device, any_dtype: bool = False) -> None:
    """Checks that tensors are dense, of a dtype in `DTYPES`, on the device and in memory. The error names the first."""
    known = tensors.dtypes <= DTYPES.keys() or (any_dtype and not any(t.is_quantized for t in tensors.present))
    if known and all_plain(tensors.present) and _all_there(tensors, device):
        return
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if not any_dtype and (tensor.dtype not in DTYPES or tensor.layout != torch.strided):
            raise TypeError(
                f"{op}: {what} {i} must be a dense {DTYPE_NAMES} tensor, got {tensor.dtype} ({tensor.layout})"
            )
        if any_dtype:  # here the device is that of the table: a model without values is told first
            check_plain_tensor(tensor, f"{op}: {what} {i}")
        if tensor.device != device:
            raise ValueError(f"{op}: {what} {i} is on {tensor.device}, expected it on {device}")
        check_plain_tensor(tensor, f"{op}: {what} {i}")


def _all_there(tensors: Tensors, device: torch.device) -> bool:
    """Whether all are dense and in memory on the device, found out quickly. False may also mean that one is empty."""
    try:
        whole = len(tensors.present) == len(tensors)
        lowest = min(tensors.addresses if whole else map(Tensor.data_ptr, tensors.present), default=LOWEST_ADDRESS)
    except RuntimeError:  # a layout without an address
        return False
    return lowest >= LOWEST_ADDRESS and tensors.devices <= {-1 if device.type == "cpu" else device.index}


@lru_cache(maxsize=64)
def _overlap(
    starts: tuple[int, ...], sizes: tuple[int, ...], itemsize: int, more: tuple[tuple[int, int], ...]
) -> tuple[int, int] | None:
    """The numbers of two spans of addresses that overlap, or None; `more` lists further spans as (start, bytes)."""
    given = [*zip(starts, (itemsize * size for size in sizes), strict=True), *more]
    spans = sorted((start, start + length, i) for i, (start, length) in enumerate(given))
    spans = [span for span in spans if span[0] < span[1]]
    return next((tuple(sorted((a[2], b[2]))) for a, b in pairwise(spans) if b[0] < a[1]), None)  # type: ignore[return-value]


def _check_apart(op: str, params: Tensors, state: dict[str, Tensor]) -> None:
    """Checks that tensors which are written share no memory: the result would depend on the order of threads."""
    itemsize, sizes = max((dtype.itemsize for dtype in params.dtypes), default=0), params.memory()[1]
    if not params.contiguous:  # one that is written through a copy counts with its first entry
        sizes = tuple(p.numel() if p.is_contiguous() else min(p.numel(), 1) for p in params.present)
        for i, param in enumerate(params.present):
            if torch._debug_has_internal_overlap(param) == 1:
                raise ValueError(f"{op}: parameter {i} is expanded, its entries share memory; pass a `.clone()`")
    spans = tuple((tensor.data_ptr(), tensor.nbytes) for tensor in state.values())
    if (found := _overlap(params.memory()[0], sizes, itemsize, spans)) is not None:
        names = [f"parameter {i}" for i in range(len(params))] + list(state)
        raise ValueError(
            f"{op}: {names[found[0]]} and {names[found[1]]} share memory; each must have its own, and a tied parameter "
            "is passed once"
        )


def check_update(op: str, norm: records.Norm) -> TableFacts:
    """Checks the arguments of an update, or of the norm of its gradients, once per record.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit the table or each other, or a tensor is not plain.
    """
    if (facts := vars(norm).get("_facts")) is None:
        facts = table_facts(op, norm)
        _check_gradients(op, norm, facts)
        vars(norm)["_facts"] = facts
    if isinstance(norm, records.Update) and op == "masked_adamw_" and "_state_known" not in vars(norm):
        _check_state(op, norm, facts)
        vars(norm)["_state_known"] = True
    return facts


def _check_gradients(op: str, norm: records.Norm, facts: TableFacts) -> None:
    params, grads, device = norm.params, norm.grads, norm.tiles.device
    if len(grads) != (1 if norm.packed else len(params)):
        wanted = "one tensor of packed gradients" if norm.packed else f"{len(params)} gradients, one per parameter,"
        raise ValueError(f"{op}: expected {wanted} got {len(grads)}")
    _check_dense(op, "parameter", params, device)
    _check_extents(op, "parameter", params.sizes, facts)
    if norm.packed:
        if grads[0] is None:
            raise ValueError(f"{op}: expected one tensor of packed gradients, got None")
        _expect(op, "packed gradients", grads[0], torch.float32, (facts.k,), device)
    else:
        _check_dense(op, "gradient", grads, device)
        if len(grads.present) != len(grads) or not all(map(Tensor.is_same_size, params.present, grads.present)):
            for i, (param, grad) in enumerate(zip(params.present, grads, strict=True)):
                if grad is not None and grad.shape != param.shape:
                    raise ValueError(
                        f"{op}: gradient {i} has shape {list(grad.shape)}, its parameter {list(param.shape)}"
                    )
    allowed = {torch.float32} if norm.packed else {*params.dtypes, torch.float32}
    if len(params.dtypes) > 1 or len(grads.dtypes) > 1 or not grads.dtypes <= allowed:
        raise TypeError(
            f"{op}: expected parameters of one dtype, and gradients of that dtype or of float32, "
            f"got parameters of {_names(params.dtypes)} and gradients of {_names(grads.dtypes)}; make a call per dtype"
        )
    _check_tensors(op, norm, _added(records.Norm, records.Tiles), {"params": len(params), "k": facts.k}, device)


def _check_extents(op: str, what: str, sizes: Sequence[int], facts: TableFacts, absent: bool = False) -> None:
    """Checks that each tensor reaches as far as the table. With `absent`, empty ones are passed over."""
    if len(sizes) < len(facts.extents):
        raise ValueError(f"{op}: the tile table names {what} {len(facts.extents) - 1}, got {len(sizes)} {what}s")
    if all(map(operator.ge, sizes, facts.extents)):
        return
    for i, (size, extent) in enumerate(zip(sizes, facts.extents)):  # noqa: B905
        if size < extent and not (absent and not size):
            raise ValueError(f"{op}: {what} {i} has {size} entries, the tile table reaches to {extent}")


def _check_state(op: str, update: records.Update, facts: TableFacts) -> None:
    """Checks what only an update has: its moments, and that the tensors it writes share no memory."""
    sizes, coded = {"k": facts.k, "blocks": facts.blocks}, update.scales is not None
    _check_tensors(op, update, _added(records.Update, records.Norm), sizes, update.tiles.device, coded)
    if update.stochastic and (update.master is not None or not update.params.dtypes <= {torch.bfloat16}):
        raise ValueError(
            f"{op}: stochastic rounding is for bfloat16 parameters without a master; "
            "float16 needs a master, float32 is not rounded"
        )
    fields = fields_of(records.Update)
    _check_apart(op, update.params, {name: t for name, t in tensors_of(update) if fields[name].spec.written})


def check_pack(op: str, pack: records.Pack) -> TableFacts:
    """Checks dense gradients of one dtype, None where there is none, and their slots.

    Raises:
        TypeError, ValueError: as in `check_update`.
    """
    facts, device = table_facts(op, pack), pack.tiles.device
    _check_dense(op, "gradient", pack.grads, device)
    if len(pack.grads.dtypes) > 1:
        raise TypeError(
            f"{op}: expected gradients of one dtype, got {_names(pack.grads.dtypes)}; "
            "make a call, and a table, per dtype"
        )
    _check_extents(op, "gradient", pack.grads.sizes, facts, absent=True)
    _check_tensors(op, pack, ("out",), {"k": facts.k}, device)
    return facts


def check_copy(op: str, copy: records.Gather | records.Scatter | records.Swap) -> TableFacts:
    """Checks tensors of one dtype, contiguous or not, and slots of the same dtype.

    Raises:
        TypeError, ValueError: dtypes, sizes or devices do not fit, a tensor is not plain, or what is written shares
            memory.
    """
    facts, device, tensors = table_facts(op, copy), copy.tiles.device, copy.tensors
    _check_dense(op, "tensor", tensors, device, any_dtype=True)
    if len(tensors.dtypes) > 1 or (tensors.present and tensors.present[0].element_size() > 8):
        raise TypeError(
            f"{op}: expected tensors of one dtype of at most 8 bytes an entry, got {_names(tensors.dtypes)}; make a "
            "call, and a table, per dtype"
        )
    _check_extents(op, "tensor", tensors.sizes, facts)
    _check_there(op, "slots", copy.slots)
    _expect(op, "slots", copy.slots, next(iter(tensors.dtypes), copy.slots.dtype), (facts.k,), device)
    if not isinstance(copy, records.Gather):
        _check_apart(op, tensors, {"slots": copy.slots})
    return facts


@cache
def _added(record: type, base: type) -> list[str]:
    """The arguments that are one tensor each and that a record class adds to those of its base."""
    fields = fields_of(record).items()
    return [n for n, f in fields if f.kind is Tensor and not f.spec.internal and n not in fields_of(base)]


def _check_tensors(
    op: str, record: Any, names: Sequence[str], sizes: dict[str, int], device: torch.device, coded: bool = False
) -> None:
    """Checks the tensors of these fields against their `Spec`; `sizes` holds named sizes, and learns new ones."""
    fields = fields_of(record.__class__)
    for name in names:
        tensor, spec = getattr(record, name), fields[name].spec
        if tensor is None and fields[name].optional:
            continue
        _check_there(op, name, tensor)
        for size, found in zip(spec.shape, tensor.shape, strict=False):
            if isinstance(size, str):
                sizes.setdefault(size, found)
        shape = tuple(size if isinstance(size, int) else sizes.get(size, 0) for size in spec.shape)
        dtype = spec.coded if coded and spec.coded is not None else spec.dtype
        assert dtype is not None
        _expect(op, name, tensor, dtype, shape, device)


def check_selection(
    op: str, initial: Sequence[Tensor], tuned: Sequence[Tensor], groups: Sequence[int], ks: Sequence[int]
) -> None:
    """Checks the arguments of a selection.

    Args:
        op: the operation, for messages.
        initial: tensors before tuning; empty for zeros.
        tuned: tensors after it.
        groups: the group of each pair.
        ks: the number of entries wanted from each group.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or counts do not fit, or a tensor is not plain.
    """
    if initial and len(initial) != len(tuned):
        raise ValueError(f"{op}: expected as many initial as tuned tensors, got {len(initial)} and {len(tuned)}")
    for i, tensors in enumerate(zip(initial, tuned, strict=True) if initial else ((t,) for t in tuned)):
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{op}: tensor {i} must be {DTYPE_NAMES}, got {tensor.dtype}; convert it")
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"{op}: tensor {i} has initial shape {list(tensors[0].shape)}, tuned {list(tensor.shape)}"
                )
            if tensor.device != tuned[0].device:
                raise ValueError(f"{op}: tensor {i} is on {tensor.device}, the first on {tuned[0].device}")
            check_plain_tensor(tensor, f"{op}: tensor {i}")
    if len(groups) != len(tuned) or any(not 0 <= g < len(ks) for g in groups):
        raise ValueError(f"{op}: groups must name one of {len(ks)} groups for each of {len(tuned)} tensors")
    pools = [0] * len(ks)
    for tensor, group in zip(tuned, groups, strict=True):
        pools[group] += tensor.numel()
    for group, (k, pool) in enumerate(zip(ks, pools, strict=True)):
        if not 0 <= k <= pool:
            where = f" in group {group}" if len(ks) > 1 else ""
            raise ValueError(f"{op}: k must be in [0, {pool}] for a pool of {pool} entries{where}, got {k}")
    if sum(pools) > torch.iinfo(torch.int64).max // 8:
        raise ValueError(f"{op}: a pool of {sum(pools)} entries is more than can be counted")


# The passes of a selection, on any backend. Nothing here reads the content of a tensor on a device.


def check_pass(op: str, record: Any) -> None:
    """Checks the arguments of a pass.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit each other, or a tensor is not plain.
    """
    tensors = dict(tensors_of(record))
    device, sizes = next(reversed(tensors.values())).device, {}
    if isinstance(record, records.Histogram):
        sizes["bins"] = 1 << (15 if record.prefixes is None else 16)
        sizes["groups"] = len(record.histogram) if record.histogram.dim() else 0
    if isinstance(record, records.Pairs):
        _check_sides(op, record, device)
    if isinstance(record, records.Histogram | records.Band | records.Sampled):
        n_groups = sizes["groups"] if isinstance(record, records.Histogram) else record.low.numel()
        sizes["tiles"] = _check_groups(op, record, record.groups, n_groups)
    if isinstance(record, records.Sampled):
        sizes["words"] = sum(map(bitmap_words, record.tuned.sizes))
    _check_tensors(op, record, list(tensors), sizes, device)
    if isinstance(record, records.Band):
        _check_word_offsets(op, record)


def _check_sides(op: str, pairs: records.Pairs, device: torch.device) -> None:
    """Two tensors of equal size, or one, in every pair; of any contiguity."""
    if pairs.initial and len(pairs.initial) != len(pairs.tuned):
        raise ValueError(
            f"{op}: expected an initial tensor, or none at all, for each of {len(pairs.tuned)} tensors, "
            f"got {len(pairs.initial)}"
        )
    for side in (pairs.initial, pairs.tuned):
        _check_dense(op, "tensor", side, device)
    for i, (before, after) in enumerate(zip(pairs.initial.sizes, pairs.tuned.sizes)):  # noqa: B905
        if before != after:
            raise ValueError(f"{op}: tensor {i} has {before} initial entries, tuned {after}")


def _check_groups(op: str, pairs: records.Pairs, groups: Sequence[int], n_groups: int) -> int:
    """The pairs are contiguous, and of a group each; returns their tiles."""
    if len(groups) != len(pairs.tuned):
        raise ValueError(f"{op}: expected a group for each of {len(pairs.tuned)} tensors, got {len(groups)}")
    for i, group in enumerate(groups):
        if not 0 <= group < n_groups:
            raise ValueError(f"{op}: tensor {i} must be of one of {n_groups} groups, got group {group}")
    for side in (pairs.initial, pairs.tuned):
        for i, tensor in enumerate(side.present):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"{op}: tensor {i} must be contiguous, "
                    f"got {list(tensor.shape)} with strides {list(tensor.stride())}"
                )
    return sum(map(tiles_of, pairs.tuned.sizes))


def _check_word_offsets(op: str, band: records.Band) -> None:
    if len(band.word_offsets) != len(band.tuned):
        raise ValueError(
            f"{op}: expected a word offset for each of {len(band.tuned)} tensors, got {len(band.word_offsets)}"
        )
    for i, (offset, size) in enumerate(zip(band.word_offsets, band.tuned.sizes, strict=True)):
        if not 0 <= offset <= band.words.numel() - bitmap_words(size) or offset % 2:
            raise ValueError(
                f"{op}: the {bitmap_words(size)} words of tensor {i} must lie in words "
                f"[{band.words.numel()}], from an even offset on, got {offset}"
            )
