"""What an operator's arguments must be before a backend reads their addresses: looked at here, once per call.

A table of tiles is read through once, when it is first seen, and again when torch has counted a change of it; after
that its numbers are known good, and the tensors of a call only have to fit them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ltp_sparse.backends.reference import RUN, Coefficient
from ltp_sparse.tickets.bits import TILE, bitmap_words, popcount, tiles_of
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.tile_table import Column, state_blocks
from ltp_sparse.weights.tensors import DTYPES, all_plain, all_there, check_plain_tensor, has_memory

_TILES_AT_ONCE = 64  # of a table whose content is read: bounds the temporaries to some megabytes


@dataclass(frozen=True)
class TableFacts:
    """What the rows of a tile table ask of the tensors of a call.

    k:       slots
    blocks:  blocks of 8-bit moments
    extents: of every parameter up to the last one named, the entries it must have
    index:   words, ranks and positions, kept so that they are the same ones in a later call
    stamps:  their state, and that of the tiles
    """

    k: int
    blocks: int
    extents: tuple[int, ...]
    index: tuple[Tensor, Tensor, Tensor]
    stamps: tuple[tuple[int, int, int], ...]


_known = WeakTensorKeyDictionary()
"""Tiles -> `TableFacts`."""


def _stamp(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), tensor._version


def table_facts(op: str, tiles: Tensor, words: Tensor, ranks: Tensor, positions: Tensor) -> TableFacts:
    """The facts of a tile table, which is read through unless it is known.

    Raises:
        TypeError, ValueError: it is not a table as `TileTable.build` lays it out.
    """
    tensors = (tiles, words, ranks, positions)
    if any(tensor.is_inference() for tensor in tensors):  # torch does not count their changes
        return _read_table(op, tiles, words, ranks, positions, ())
    facts: TableFacts | None = _known.get(tiles)
    stamps = tuple(map(_stamp, tensors))
    if facts is not None and facts.stamps == stamps and all(a is b for a, b in zip(facts.index, tensors[1:])):  # noqa: B905
        return facts
    facts = _read_table(op, tiles, words, ranks, positions, stamps)
    _known[tiles] = facts
    return facts


def _read_table(
    op: str, tiles: Tensor, words: Tensor, ranks: Tensor, positions: Tensor, stamps: tuple[tuple[int, int, int], ...]
) -> TableFacts:
    device = tiles.device
    _expect(op, "tiles", tiles, torch.int64, (len(tiles) if tiles.dim() else 0, len(Column)), device)
    _expect(op, "words", words, torch.int32, (words.numel() // 2 * 2,), device)
    _expect(op, "ranks", ranks, torch.int16, (words.numel() // 2 if ranks.numel() else 0,), device)
    _expect(op, "positions", positions, torch.int16, (positions.numel(),), device)
    rows = tiles.detach().cpu()
    param, start, length, active, slot, index, encoding, block = rows.unbind(1)
    last = torch.iinfo(torch.int64).max - TILE  # sums of what is below do not overflow

    def refuse(wrong: Tensor, problem: str) -> None:
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            named = ", ".join(
                f"{column.name} {value}" for column, value in zip(Column, rows[row].tolist(), strict=True)
            )
            raise ValueError(f"{op}: row {row} of the tile table: {problem}, got {named}; make it with TileTable.build")

    most = torch.iinfo(torch.int32).max
    refuse((param < 0) | (param > most), "PARAM must be the number of a parameter")
    refuse((start < 0) | (start > last), "START must be an entry of the parameter")
    refuse((length < 1) | (length > TILE), f"LENGTH must be in [1, {TILE}]")
    refuse((active < 1) | (active > length), "ACTIVE must be in [1, LENGTH]")
    refuse(
        ~torch.isin(encoding, torch.tensor(list(Encoding), dtype=torch.int64, device="cpu")),
        "ENCODING must be 0, 1 or 2",
    )
    refuse((encoding == Encoding.FULL) & (active != length), "a FULL tile has all its entries active")
    if len(rows) > 1:
        later = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), param[1:] > param[:-1]])
        after = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), start[:-1] + length[:-1]])
        first = torch.arange(len(rows), dtype=torch.int64, device="cpu") == 0
        same = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), param[1:] == param[:-1]])
        refuse(~(first | later | (same & (start >= after))), "tiles must be in order and apart")
    refuse(slot != active.cumsum(0) - active, "SLOT must count the active entries before")
    blocks = state_blocks(active)
    first_block = block[:1] if len(rows) else block
    refuse((block < 0) | (block > last), "BLOCK must count the blocks of 256 active entries before")
    refuse(block - first_block != blocks.cumsum(0) - blocks, "BLOCK must count the blocks of 256 active entries before")

    groups = 2 * ((length + 63) // 64)
    for kind, sizes, room, what in (
        (Encoding.BITMAP, groups, words.numel(), "words"),
        (Encoding.LIST16, active, positions.numel(), "positions"),
    ):
        own = encoding == kind
        refuse(own & ((index < 0) | (index > room - sizes)), f"INDEX must lie in the {room} {what}")
        if kind is Encoding.BITMAP:
            refuse(own & (index % 2 != 0), "INDEX of a bitmap must be even")
        before = torch.where(own, sizes, 0).cumsum(0) - torch.where(own, sizes, 0)
        origin = index[own][:1] if bool(own.any()) else index[:1]
        refuse(own & (index - origin != before), f"INDEX must follow on that of the tile before in the {what}")
    _read_bitmaps(rows[encoding == Encoding.BITMAP], words, ranks, _refuser(op, encoding == Encoding.BITMAP))
    _read_lists(rows[encoding == Encoding.LIST16], positions, _refuser(op, encoding == Encoding.LIST16))

    extents = torch.zeros(int(param[-1]) + 1 if len(rows) else 0, dtype=torch.int64, device="cpu")
    extents.scatter_reduce_(0, param, start + length, "amax")
    return TableFacts(
        int(active.sum()),
        int(first_block.sum() + blocks.sum()),
        tuple(extents.tolist()),
        (words, ranks, positions),
        stamps,
    )


def _refuser(op: str, own: Tensor) -> Callable[[int, Tensor, str], None]:
    """Raises for the first wrong tile of some rows of one encoding, those from number `first` on; own: which."""

    def refuse(first: int, wrong: Tensor, problem: str) -> None:
        if bool(wrong.any()):
            row = int(own.nonzero()[first + int(wrong.nonzero()[0])])
            raise ValueError(f"{op}: row {row} of the tile table: {problem}; make the table with TileTable.build")

    return refuse


def _read_bitmaps(rows: Tensor, words: Tensor, ranks: Tensor, refuse: Callable[[int, Tensor, str], None]) -> None:
    """Every bitmap has as many bits as its row says, none past its end, and the ranks count them."""
    for first in range(0, len(rows), _TILES_AT_ONCE):
        piece = rows[first : first + _TILES_AT_ONCE].to(words.device)
        length, active, index = (piece[:, column] for column in (Column.LENGTH, Column.ACTIVE, Column.INDEX))
        groups = (length + 63) // 64
        begin, end = int(index[0]), int(index[-1] + 2 * groups[-1])
        own = words[begin:end]
        counts = popcount(own).view(-1, 2).sum(1, dtype=torch.int64)
        before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        starts = (index - begin) // 2
        refuse(first, before[starts + groups] - before[starts] != active, "ACTIVE must be the bits of its bitmap")
        rest = length % 64
        tail = own.view(-1, 2)[starts + groups - 1].to(torch.int64) & 0xFFFFFFFF
        past = (tail[:, 0] >> rest.clamp(max=32)) | (tail[:, 1] >> (rest - 32).clamp(min=0))
        refuse(first, (rest != 0) & (past != 0), "its bitmap has bits set past its end")
        if ranks.numel():
            of_group = torch.repeat_interleave(torch.arange(len(piece), dtype=torch.int64, device=words.device), groups)
            expected = (before[:-1] - before[starts][of_group]) & 0xFFFF
            found = ranks[begin // 2 : end // 2].to(torch.int64) & 0xFFFF
            wrong = torch.zeros(len(piece), dtype=torch.int64, device=words.device)
            wrong.index_add_(0, of_group, (expected != found).long())
            refuse(first, wrong != 0, "its ranks do not count the bits before each 64 entries")


def _read_lists(rows: Tensor, positions: Tensor, refuse: Callable[[int, Tensor, str], None]) -> None:
    """The positions of every list ascend, and lie in its tile."""
    for first in range(0, len(rows), _TILES_AT_ONCE):
        piece = rows[first : first + _TILES_AT_ONCE].to(positions.device)
        length, active, index = (piece[:, column] for column in (Column.LENGTH, Column.ACTIVE, Column.INDEX))
        begin, end = int(index[0]), int(index[-1] + active[-1])
        own = positions[begin:end]
        last = index - begin + active - 1
        refuse(first, (own[last].to(torch.int64) & 0xFFFF) >= length, "a position lies past its end")
        shifted = own ^ -32768  # signed numbers in the order of the uint16 bits
        falls = shifted[1:] <= shifted[:-1]
        falls[last[:-1]] = False  # from one tile to the next
        if bool(falls.any()):
            of_entry = torch.repeat_interleave(torch.arange(len(piece), dtype=torch.int64, device=own.device), active)
            wrong = torch.zeros(len(piece), dtype=torch.bool, device=own.device)
            wrong[of_entry[1:][falls]] = True
            refuse(first, wrong, "the positions of its list must ascend")


def _expect(
    op: str, what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Backends read the addresses of these tensors, so all that such an address takes for granted is looked at."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
        _refuse(op, what, tensor, dtype, shape, device)
    if not has_memory(tensor):
        check_plain_tensor(tensor, f"{op}: {what}")


def _refuse(
    op: str, what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> NoReturn:
    check_plain_tensor(tensor, f"{op}: {what}")
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    raise ValueError(
        f"{op}: {what} must be {dtype} {list(shape)} on {device}, contiguous, "
        f"got {tensor.dtype} {list(tensor.shape)}{strides} on {tensor.device}"
    )


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"


def _dtypes_of(op: str, what: str, tensors: Sequence[Tensor], device: torch.device) -> set[torch.dtype]:
    """The dtypes of dense floating tensors on one device, whose memory is there; what is not raises, by its number."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes <= DTYPES.keys() and all_plain(tensors) and all_there(tensors, device):
        return dtypes
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise TypeError(
                f"{op}: {what} {i} must be a dense float32, bfloat16 or float16 tensor, "
                f"got {tensor.dtype} ({tensor.layout})"
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {what} {i} is on {tensor.device}, expected it on {device}")
        check_plain_tensor(tensor, f"{op}: {what} {i}")
    return dtypes


@lru_cache(maxsize=64)
def _overlap(starts: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, int] | None:
    """The numbers of two spans of addresses that have one in common, or None."""
    spans = sorted((start, start + length, i) for i, (start, length) in enumerate(zip(starts, lengths, strict=True)))
    spans = [span for span in spans if span[0] < span[1]]
    return next((tuple(sorted((a[2], b[2]))) for a, b in pairwise(spans) if b[0] < a[1]), None)  # type: ignore[return-value]


def _check_apart(op: str, params: Sequence[Tensor], sizes: Sequence[int], state: dict[str, Tensor]) -> None:
    """What is written must not share memory: the result would depend on the order of the threads."""
    if all(map(Tensor.is_contiguous, params)):
        width = params[0].element_size() if params else 0
        lengths = [size * width for size in sizes]
    else:  # of one that is written through a copy, the first entry alone
        lengths = [param.nbytes if param.is_contiguous() else min(param.nbytes, 1) for param in params]
        for i, param in enumerate(params):
            if torch._debug_has_internal_overlap(param) == 1:
                raise ValueError(f"{op}: parameter {i} is expanded, its entries share memory; pass a `.clone()`")
    tensors = (*params, *state.values())
    starts, lengths = tuple(map(Tensor.data_ptr, tensors)), [*lengths, *(t.nbytes for t in state.values())]
    if (found := _overlap(starts, tuple(lengths))) is not None:
        names = [f"parameter {i}" for i in range(len(params))] + list(state)
        raise ValueError(
            f"{op}: {names[found[0]]} and {names[found[1]]} share memory; each must have its own, and a tied parameter "
            "is passed once"
        )


def check_update(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    facts: TableFacts,
    device: torch.device,
    coefficients: Tensor,
    anchor: Tensor,
    master: Tensor,
    packed: bool,
) -> list[int]:
    """The arguments that update and norm share; returns the entries of the parameters.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit the table or each other, or are of no plain tensor.
    """
    if len(grads) != (1 if packed else len(params)):
        wanted = "one tensor of packed gradients" if packed else f"{len(params)} gradients, one per parameter,"
        raise ValueError(f"{op}: expected {wanted} got {len(grads)}")
    dtypes = _dtypes_of(op, "parameter", params, device)
    sizes = [*map(Tensor.numel, params)]
    _check_extents(op, "parameter", sizes, facts)
    if packed:
        _expect(op, "packed gradients", grads[0], torch.float32, (facts.k,), device)
        grad_dtypes = {torch.float32}
    else:
        given = grads if all(map(Tensor.numel, grads)) else [grad for grad in grads if grad.numel()]
        grad_dtypes = _dtypes_of(op, "gradient", given, device)
        if not all(map(Tensor.is_same_size, params, grads)):
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if grad.shape != param.shape and grad.numel():
                    raise ValueError(
                        f"{op}: gradient {i} has shape {list(grad.shape)}, its parameter {list(param.shape)}"
                    )
    if len(dtypes) > 1 or len(grad_dtypes) > 1 or not grad_dtypes <= {*dtypes, torch.float32}:
        raise TypeError(
            f"{op}: expected parameters of one dtype, and gradients of that dtype or of float32, "
            f"got parameters of {_names(dtypes)} and gradients of {_names(grad_dtypes)}; make a call per dtype"
        )
    _expect(op, "coefficients", coefficients, torch.float64, (len(params), Coefficient.COUNT), device)
    for what, tensor in (("anchor", anchor), ("master", master)):
        if tensor.numel():
            _expect(op, what, tensor, torch.float32, (facts.k,), device)
    return sizes


def _check_extents(op: str, what: str, sizes: Sequence[int], facts: TableFacts, absent: bool = False) -> None:
    """absent: tensors without entries are passed over."""
    if len(sizes) < len(facts.extents):
        raise ValueError(f"{op}: the tile table names {what} {len(facts.extents) - 1}, got {len(sizes)} {what}s")
    if all(map(operator.ge, sizes, facts.extents)):
        return
    for i, (size, extent) in enumerate(zip(sizes, facts.extents)):  # noqa: B905
        if size < extent and not (absent and not size):
            raise ValueError(f"{op}: {what} {i} has {size} entries, the tile table reaches to {extent}")


def check_state(
    op: str,
    params: Sequence[Tensor],
    sizes: Sequence[int],
    facts: TableFacts,
    device: torch.device,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor,
    master: Tensor,
    stochastic: bool,
) -> None:
    """What only the update has: the moments, and that all it writes is apart.

    Raises:
        TypeError, ValueError: as in `check_update`.
    """
    coded = scales.numel() > 0 or (facts.k == 0 and exp_avg.dtype == torch.int8)
    first, second = (torch.int8, torch.uint8) if coded else (torch.float32, torch.float32)
    _expect(op, "exp_avg", exp_avg, first, (facts.k,), device)
    _expect(op, "exp_avg_sq", exp_avg_sq, second, (facts.k,), device)
    if scales.numel():
        _expect(op, "scales", scales, torch.float32, (facts.blocks, 2), device)
    if stochastic and (master.numel() or any(param.dtype != torch.bfloat16 for param in params[:1])):
        raise ValueError(
            f"{op}: stochastic rounding is for bfloat16 parameters without a master; "
            "float16 needs a master, float32 is not rounded"
        )
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "scales": scales, "master": master}
    _check_apart(op, params, sizes, state)


def check_pack(op: str, grads: Sequence[Tensor], out: Tensor, facts: TableFacts, device: torch.device) -> None:
    """Dense gradients of one dtype, empty where there is none, and their slots.

    Raises:
        TypeError, ValueError: as in `check_update`.
    """
    given = [grad for grad in grads if grad.numel()]
    dtypes = _dtypes_of(op, "gradient", given, device)
    if len(dtypes) > 1:
        raise TypeError(
            f"{op}: expected gradients of one dtype, got {_names(dtypes)}; make a call, and a table, per dtype"
        )
    _check_extents(op, "gradient", [*map(Tensor.numel, grads)], facts, absent=True)
    _expect(op, "out", out, torch.float32, (facts.k,), device)


def check_selection(
    op: str, initial: Sequence[Tensor], tuned: Sequence[Tensor], groups: Sequence[int], ks: Sequence[int]
) -> None:
    """Pairs of tensors to rank, the group of each, and the entries wanted from every group.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or counts do not fit, or a tensor is not plain.
    """
    if initial and len(initial) != len(tuned):
        raise ValueError(f"{op}: expected as many initial as tuned tensors, got {len(initial)} and {len(tuned)}")
    for i, tensors in enumerate(zip(initial, tuned, strict=True) if initial else ((t,) for t in tuned)):
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{op}: tensor {i} must be float32, bfloat16 or float16, got {tensor.dtype}; convert it"
                )
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


# The passes of the selection, of any backend. Numbers inside device tensors are not read here.


def _check_pairs(
    op: str,
    initial: Sequence[Tensor],
    tuned: Sequence[Tensor],
    groups: Sequence[int],
    n_groups: int,
    device: torch.device,
) -> int:
    """Tiles of the pairs, which must be contiguous."""
    if initial and len(initial) != len(tuned) or len(groups) != len(tuned):
        raise ValueError(
            f"{op}: expected an initial tensor, or none at all, and a group for each of {len(tuned)} tensors, "
            f"got {len(initial)} and {len(groups)}"
        )
    for i, group in enumerate(groups):
        if not 0 <= group < n_groups:
            raise ValueError(f"{op}: tensor {i} must be of one of {n_groups} groups, got group {group}")
    for side in (initial, tuned):
        _dtypes_of(op, "tensor", side, device)
    for i, tensor in enumerate((*initial, *tuned)):
        if not tensor.is_contiguous() or tensor.numel() != tuned[i % len(tuned)].numel():
            raise ValueError(
                f"{op}: tensor {i % len(tuned)} must be contiguous, with as many entries on either side, "
                f"got {list(tensor.shape)} with strides {list(tensor.stride())}"
            )
    return sum(tiles_of(t.numel()) for t in tuned)


def _expect_all(op: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, **tensors: Tensor) -> None:
    for what, tensor in tensors.items():
        _expect(op, what, tensor, dtype, shape, device)


def _histogram(initial: Any, tuned: Any, groups: Any, prefixes: Any, histogram: Tensor, nonfinite: Tensor) -> None:
    op, device = "delta_histogram", histogram.device
    n_groups = len(histogram) if histogram.dim() else 0
    _expect(op, "histogram", histogram, torch.int64, (n_groups, 1 << (15 if prefixes is None else 16)), device)
    _expect(op, "nonfinite", nonfinite, torch.int64, (1,), device)
    if prefixes is not None:
        _expect(op, "prefixes", prefixes, torch.int64, (n_groups,), device)
    _check_pairs(op, initial, tuned, groups, n_groups, device)


def _sample(initial: Any, tuned: Any, tensors: Tensor, runs: Tensor, keys: Tensor) -> None:
    op, device = "sample_keys", keys.device
    _check_sides(op, initial, tuned, device)
    count = tensors.numel()
    _expect_all(op, torch.int64, (count,), device, tensors=tensors, runs=runs)
    _expect(op, "keys", keys, torch.int32, (count, RUN), device)


def _check_sides(op: str, initial: Sequence[Tensor], tuned: Sequence[Tensor], device: torch.device) -> None:
    """As `_check_pairs`, of any contiguity."""
    if initial and len(initial) != len(tuned):
        raise ValueError(f"{op}: expected an initial tensor, or none at all, for each of {len(tuned)} tensors")
    for side in (initial, tuned):
        _dtypes_of(op, "tensor", side, device)
    for i, (a, b) in enumerate(zip(initial, tuned)):  # noqa: B905
        if a.numel() != b.numel():
            raise ValueError(f"{op}: tensor {i} has {a.numel()} initial entries, tuned {b.numel()}")


def _band(
    initial: Any, tuned: Any, groups: Any, low: Tensor, high: Tensor, words: Tensor, word_offsets: Sequence[int],
    above: Tensor, inside: Tensor, take: Tensor | None, keys: Tensor, positions: Tensor, offsets: Tensor,
    cursor: Tensor, nonfinite: Tensor,
) -> None:  # fmt: skip
    op, device = "delta_band", words.device
    tiles = _check_pairs(op, initial, tuned, groups, low.numel(), device)
    _expect_all(op, torch.int64, (low.numel(),), device, low=low, high=high)
    _expect(op, "words", words, torch.int32, (words.numel(),), device)
    if len(word_offsets) != len(tuned):
        raise ValueError(f"{op}: expected a word offset for each of {len(tuned)} tensors, got {len(word_offsets)}")
    for i, (offset, tensor) in enumerate(zip(word_offsets, tuned, strict=True)):
        if not 0 <= offset <= words.numel() - bitmap_words(tensor.numel()) or offset % 2:
            raise ValueError(
                f"{op}: the {bitmap_words(tensor.numel())} words of tensor {i} must lie in words "
                f"[{words.numel()}], from an even offset on, got {offset}"
            )
    _expect_all(op, torch.int64, (tiles,), device, above=above, inside=inside, offsets=offsets)
    if take is not None:
        _expect(op, "take", take, torch.int64, (tiles,), device)
    _expect(op, "keys", keys, torch.int32, (keys.numel(),), device)
    _expect(op, "positions", positions, torch.int16, (keys.numel(),), device)
    _expect_all(op, torch.int64, (1,), device, cursor=cursor, nonfinite=nonfinite)


def _candidates(
    op: str, keys: Tensor, positions: Tensor, offsets: Tensor, inside: Tensor, tile_groups: Tensor, **per_group: Tensor
) -> None:
    device, tiles = keys.device, offsets.numel()
    _expect(op, "keys", keys, torch.int32, (keys.numel(),), device)
    _expect(op, "positions", positions, torch.int16, (keys.numel(),), device)
    _expect_all(op, torch.int64, (tiles,), device, offsets=offsets, inside=inside, tile_groups=tile_groups)
    groups = next(iter(per_group.values())).numel()
    _expect_all(op, torch.int64, (groups,), device, **per_group)


def _candidate_histogram(*candidates_and_bands: Tensor) -> None:
    *candidates, low, high, shift, histogram = candidates_and_bands
    op = "candidate_histogram"
    _candidates(op, *candidates, low=low, high=high, shift=shift)
    bins = histogram.shape[1] if histogram.dim() == 2 else 0
    _expect(op, "histogram", histogram, torch.int64, (low.numel(), bins), low.device)


def _take(
    op: str, candidates: Sequence[Tensor], cut: Tensor, words: Tensor, tile_words: Tensor, **per_tile: Tensor
) -> None:
    _candidates(op, *candidates, cut=cut)
    _expect(op, "words", words, torch.int32, (words.numel(),), cut.device)
    _expect_all(op, torch.int64, (candidates[2].numel(),), cut.device, tile_words=tile_words, **per_tile)


def _take_above(*arguments: Tensor) -> None:
    *candidates, cut, words, tile_words, taken, ties = arguments
    _take("take_above", candidates, cut, words, tile_words, taken=taken, ties=ties)


def _take_ties(*arguments: Tensor) -> None:
    *candidates, cut, words, tile_words, take = arguments
    _take("take_ties", candidates, cut, words, tile_words, take=take)


PASSES: dict[str, Callable[..., None]] = {
    "delta_histogram": _histogram,
    "sample_keys": _sample,
    "delta_band": _band,
    "candidate_histogram": _candidate_histogram,
    "take_above": _take_above,
    "take_ties": _take_ties,
}
"""What looks at the arguments of each pass of a backend, under its signature in `reference.py`."""
