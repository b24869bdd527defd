"""The passes of `topk_delta`. `kernels/README.md` explains the design.

    key = bits(|float32(tuned) - float32(initial)|)

* `sample_keys`: the keys of some runs of neighbouring entries
* `delta_band`: marks, counts and collects
      key >= high:        its bit is set, and it is counted as above
      low <= key < high:  it is counted as inside, and stored among the candidates of its tile
* `candidate_histogram`, `take_above`, `take_ties`: process the candidates

The launchers take the records of `ltp_sparse/backends/arguments.py` and do not wait for the device. There is no
histogram of all keys, since Triton has no atomics in shared memory.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import bit_of_rank, popcount
from .digests import tile_digests
from .launch import launch
from .precision import TYPES

TILE = 65_536

_ROWS = 128  # words of 32 entries that a program reads together
_NUM_WARPS = 8
_PROGRAMS_PER_PROCESSOR = 2

# columns of the launcher's table, with a row per tile
_INITIAL = tl.constexpr(0)  # address of the tile's first entry
_TUNED = tl.constexpr(1)
_WORD = tl.constexpr(2)  # first word of its bitmap
_LENGTH = tl.constexpr(3)
_GROUP = tl.constexpr(4)
_TILE = tl.constexpr(5)  # its index in above, inside, take and offsets
_COLUMNS = tl.constexpr(6)

# columns of the table of `sample_keys`, with a row per tensor, after the two addresses
_ENTRIES = tl.constexpr(2)
_KIND = tl.constexpr(3)  # the number of its combination of dtypes
_SAMPLE_COLUMNS = tl.constexpr(4)

_WORDS = tl.constexpr(TILE // 32)
_CANDIDATES = tl.constexpr(512)  # candidates processed together
_CANDIDATE_WARPS = 4
_RUN = tl.constexpr(16)  # neighbouring entries that are sampled together
_RUNS = tl.constexpr(64)  # runs of a program
_SAMPLE_WARPS = 4
_NONFINITE_KEY = tl.constexpr(0x7F800000)
_LARGEST_KEY = tl.constexpr(0x7FFFFFFF)

# These arguments may be slices. Otherwise Triton would compile a kernel for each alignment, which gains nothing here.
_READ_SINGLY = [
    *("tensor_ptr", "run_ptr", "cursor_ptr", "nonfinite_ptr"),
    *("low_ptr", "high_ptr", "shift_ptr", "cut_ptr"),  # a number per group
    *("above_ptr", "inside_ptr", "offset_ptr", "group_ptr", "tile_word_ptr", "take_ptr", "taken_ptr", "ties_ptr"),
]


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:
        # the division shows the alignment; a hint on `address` itself would hold for all its uses
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def _keys(initial_ptr, tuned_ptr, entry, mask, HAS_INITIAL: tl.constexpr):
    """int32 keys; where `mask` is False it is 0, which no band contains."""
    other: tl.constexpr = None if mask is None else 0.0
    delta = tl.load(tuned_ptr + entry, mask, other).to(tl.float32)
    if HAS_INITIAL:
        delta -= tl.load(initial_ptr + entry, mask, other).to(tl.float32)
    return delta.to(tl.int32, bitcast=True) & _LARGEST_KEY


@triton.jit(do_not_specialize=["kind", "n_runs"], do_not_specialize_on_alignment=_READ_SINGLY)
def _sample_keys_kernel(
    row_ptr, kind, tensor_ptr, run_ptr, n_runs, key_ptr, INITIAL: tl.constexpr, TUNED: tl.constexpr,
):  # fmt: skip
    """Writes the sampled keys of tensors of one kind. INITIAL and TUNED are their dtypes; None stands for zeros."""
    HAS_INITIAL: tl.constexpr = INITIAL is not None
    number = tl.program_id(0).to(tl.int64) * _RUNS + tl.arange(0, _RUNS)
    exists = number < n_runs
    row = row_ptr + tl.load(tensor_ptr + number, exists, 0) * _SAMPLE_COLUMNS
    mine = (exists & (tl.load(row + _KIND) == kind))[:, None]
    entry = tl.load(run_ptr + number, exists, 0)[:, None] * _RUN + tl.arange(0, _RUN)[None, :]
    in_tensor = mine & (entry < tl.load(row + _ENTRIES)[:, None])
    tuned_ptr = _pointer(tl.load(row + _TUNED), TUNED, False)[:, None]
    initial_ptr = _pointer(tl.load(row + _INITIAL), INITIAL, False)[:, None] if HAS_INITIAL else tuned_ptr
    key = _keys(initial_ptr, tuned_ptr, entry, in_tensor, HAS_INITIAL)
    slot = number[:, None] * _RUN + tl.arange(0, _RUN)[None, :]
    tl.store(key_ptr + slot, tl.minimum(key, _NONFINITE_KEY - 1), mine)


def _dtypes(pairs: Any) -> list[tuple[torch.dtype | None, torch.dtype]]:
    """The dtypes of both sides of every pair; None for zeros."""
    before = [t.dtype for t in pairs.initial] or [None] * len(pairs.tuned)
    return list(zip(before, (t.dtype for t in pairs.tuned), strict=True))


def _addresses(pairs: Any) -> list[tuple[int, int]]:
    return list(zip(pairs.initial.addresses or [0] * len(pairs.tuned), pairs.tuned.addresses, strict=True))


def sample_keys(sample: Any) -> None:
    """One launch for each combination of dtypes, which is nearly always a single one."""
    tensors, runs, keys = sample.tensors, sample.runs, sample.keys
    if not len(runs):
        return
    kinds: dict[tuple[torch.dtype | None, torch.dtype], int] = {}
    rows = [
        [*addresses, size, kinds.setdefault(dtypes, len(kinds))]
        for addresses, size, dtypes in zip(_addresses(sample), sample.tuned.sizes, _dtypes(sample), strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(keys.device, non_blocking=True)

    for (initial_dtype, tuned_dtype), kind in kinds.items():
        arguments = table, kind, tensors, runs, len(runs), keys
        launch(
            _sample_keys_kernel,
            triton.cdiv(len(runs), _RUNS.value),
            keys,
            *arguments,
            INITIAL=TYPES.get(initial_dtype),
            TUNED=TYPES[tuned_dtype],
            num_warps=_SAMPLE_WARPS,
        )


@triton.jit
def _pack(flags, lane):
    """bool [ROWS, 32] -> uint32 words [ROWS], with lane 0 in the lowest bit."""
    return tl.sum(flags.to(tl.uint32) << lane, 1)


@triton.jit
def _mark_block(
    initial_ptr, tuned_ptr, above_ptr, inside_ptr, first, length, below_low, below_high, largest, n_above, n_inside,
    HAS_INITIAL: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes ROWS words of two bitmaps. Returns the largest keys [ROWS, 32] and the counts [ROWS] so far."""
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, 32)[None, :]
    entry = first + row[:, None] * 32 + lane
    word = first // 32 + row
    # a mask from a bound in memory prevents vector loads, so that only the last block of a tile has one
    key = _keys(initial_ptr, tuned_ptr, entry, entry < length if MASKED else None, HAS_INITIAL)
    exists = word < (length + 63) // 64 * 2 if MASKED else None
    above = _pack(key > below_high, lane)
    inside = _pack((key > below_low) & (key <= below_high), lane)
    tl.store(above_ptr + word, above.to(tl.int32, bitcast=True), exists)
    tl.store(inside_ptr + word, inside.to(tl.int32, bitcast=True))
    return tl.maximum(largest, key), n_above + popcount(above), n_inside + popcount(inside)


@triton.jit
def _collect(
    initial_ptr, tuned_ptr, inside_words_ptr, before_ptr, key_ptr, position_ptr, rank, n_inside,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Stores the candidates number `rank`, after finding the word by bisection and the bit by popcounts."""
    mask = rank < n_inside
    word = tl.zeros_like(rank)
    for log_step in tl.static_range(10, -1, -1):  # the last word with at most `rank` candidates before it
        probe = word + (1 << log_step)
        before = tl.load(before_ptr + probe).to(tl.uint16, bitcast=True).to(tl.int32)
        word = tl.where(before <= rank, probe, word)
    before = tl.load(before_ptr + word).to(tl.uint16, bitcast=True).to(tl.int32)
    inside = tl.load(inside_words_ptr + word).to(tl.uint32, bitcast=True)
    position = word * 32 + bit_of_rank(inside, rank - before)
    tl.store(key_ptr + rank, _keys(initial_ptr, tuned_ptr, position, mask, HAS_INITIAL), mask)
    tl.store(position_ptr + rank, position.to(tl.int16), mask)


@triton.jit(do_not_specialize=["n_tiles", "capacity"], do_not_specialize_on_alignment=_READ_SINGLY)
def _delta_band_kernel(
    row_ptr, n_tiles, low_ptr, high_ptr, words_ptr, above_ptr, inside_ptr, take_ptr, key_ptr, position_ptr, capacity,
    offset_ptr, cursor_ptr, nonfinite_ptr, inside_words_ptr, before_ptr,
    INITIAL: tl.constexpr, TUNED: tl.constexpr, ALIGNED: tl.constexpr, HAS_TAKE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program processes every num_programs-th tile. INITIAL and TUNED are dtypes; None stands for zeros."""
    HAS_INITIAL: tl.constexpr = INITIAL is not None
    BLOCK: tl.constexpr = ROWS * 32
    inside_words_ptr += tl.program_id(0) * _WORDS
    before_ptr += tl.program_id(0) * _WORDS
    index = tl.program_id(0)
    while index < n_tiles:
        row = row_ptr + index * _COLUMNS
        length = tl.load(row + _LENGTH).to(tl.int32)
        tile = tl.load(row + _TILE)
        group = tl.load(row + _GROUP)
        # no key is above the largest, so that any larger bound means the same
        below_low = tl.minimum(tl.load(low_ptr + group) - 1, _LARGEST_KEY).to(tl.int32)
        below_high = tl.minimum(tl.load(high_ptr + group) - 1, _LARGEST_KEY).to(tl.int32)
        tile_words_ptr = words_ptr + tl.load(row + _WORD)
        tuned_ptr = _pointer(tl.load(row + _TUNED), TUNED, ALIGNED)
        initial_ptr = _pointer(tl.load(row + _INITIAL), INITIAL, ALIGNED) if HAS_INITIAL else tuned_ptr

        largest = tl.zeros([ROWS, 32], tl.int32)
        row_above = tl.zeros([ROWS], tl.int32)
        row_inside = tl.zeros([ROWS], tl.int32)
        first = 0
        while first + BLOCK <= length:
            largest, row_above, row_inside = _mark_block(
                initial_ptr, tuned_ptr, tile_words_ptr, inside_words_ptr, tl.multiple_of(first, BLOCK), length,
                below_low, below_high, largest, row_above, row_inside, HAS_INITIAL, False, ROWS,
            )  # fmt: skip
            first += BLOCK
        if first < length:
            largest, row_above, row_inside = _mark_block(
                initial_ptr, tuned_ptr, tile_words_ptr, inside_words_ptr, tl.multiple_of(first, BLOCK), length,
                below_low, below_high, largest, row_above, row_inside, HAS_INITIAL, True, ROWS,
            )  # fmt: skip
        n_inside = tl.sum(row_inside)
        tl.store(above_ptr + tile, tl.sum(row_above).to(tl.int64))
        tl.store(inside_ptr + tile, n_inside.to(tl.int64))
        if tl.max(tl.max(largest, 1), 0) >= _NONFINITE_KEY:
            tl.store(nonfinite_ptr, tl.full([], 1, tl.int64))

        offset = tl.full([], 0, tl.int64)
        if n_inside > 0:
            tl.debug_barrier()  # other threads of the program have written the words
            word = tl.arange(0, _WORDS)
            exists = word < (length + 63) // 64 * 2
            inside = tl.load(inside_words_ptr + word, exists, 0).to(tl.uint32, bitcast=True)
            count = popcount(inside)
            before = tl.cumsum(count) - count
            if HAS_TAKE:
                wanted = tl.maximum(tl.load(take_ptr + tile).to(tl.int32) - before, 0)
                end = bit_of_rank(inside, wanted).to(tl.uint32)
                taken = tl.where(wanted < count, inside & ((tl.full([], 1, tl.uint32) << end) - 1), inside)
                marked = tl.load(tile_words_ptr + word, exists)
                tl.store(tile_words_ptr + word, marked | taken.to(tl.int32, bitcast=True), exists)
            offset = tl.atomic_add(cursor_ptr, n_inside.to(tl.int64))
            if offset + n_inside > capacity:
                offset = tl.full([], -1, tl.int64)
            else:
                tl.store(before_ptr + word, before.to(tl.int16))
                tl.debug_barrier()
                first = 0
                while first < n_inside:
                    _collect(
                        initial_ptr, tuned_ptr, inside_words_ptr, before_ptr, key_ptr + offset, position_ptr + offset,
                        first + tl.arange(0, _CANDIDATES), n_inside, HAS_INITIAL,
                    )  # fmt: skip
                    first += _CANDIDATES
            tl.debug_barrier()  # the next tile overwrites the words
        tl.store(offset_ptr + tile, offset)
        index += tl.num_programs(0)


def delta_band(band: Any) -> None:
    """A launch for each combination of dtypes and alignment, nearly always one. Scratch is 12 KB per program."""
    if band.digests is not None:
        tile_digests(band.initial, band.digests)
    words, keys = band.words, band.keys
    first_tiles = accumulate((-(-size // TILE) for size in band.tuned.sizes), initial=0)
    kinds: dict[tuple[torch.dtype | None, torch.dtype, bool], list[list[int]]] = {}
    columns = zip(band.word_offsets, band.tuned.sizes, band.groups, first_tiles)  # noqa: B905 (a last tile more)
    for addresses, dtypes, rest in zip(_addresses(band), _dtypes(band), columns, strict=True):
        kinds.setdefault((*dtypes, all(a % 16 == 0 for a in addresses)), []).append([*addresses, *rest])

    for (initial_dtype, tuned_dtype, aligned), tensors in kinds.items():
        rows = _tile_rows(tensors, initial_dtype, tuned_dtype).to(words.device, non_blocking=True)
        programs = min(len(rows), _resident_programs(words.device))
        marks = band.low, band.high, words, band.above, band.inside, band.take
        candidates = keys, band.positions, keys.numel(), band.offsets, band.cursor, band.nonfinite
        launch(
            _delta_band_kernel,
            programs,
            words,
            rows,
            len(rows),
            *marks,
            *candidates,
            torch.empty(programs, _WORDS.value, dtype=torch.int32, device=words.device),
            torch.empty(programs, _WORDS.value, dtype=torch.int16, device=words.device),
            INITIAL=TYPES.get(initial_dtype),
            TUNED=TYPES[tuned_dtype],
            ALIGNED=aligned,
            HAS_TAKE=band.take is not None,
            ROWS=_ROWS,
            num_warps=_NUM_WARPS,
        )


def _tile_rows(tensors: list[list[int]], initial_dtype: torch.dtype | None, tuned_dtype: torch.dtype) -> Tensor:
    """int64 [T, 6]: a row for each tile, from `tensors`, which has the same columns for whole tensors."""
    whole = torch.tensor(tensors, dtype=torch.int64, device="cpu")
    counts = (whole[:, _LENGTH.value] + TILE - 1) // TILE
    tensor = torch.repeat_interleave(counts)
    rows = whole[tensor]
    number = torch.arange(len(rows), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[tensor]
    initial, tuned, word, length, _, tile = rows.unbind(1)
    if initial_dtype is not None:
        initial += number * TILE * initial_dtype.itemsize
    tuned += number * TILE * tuned_dtype.itemsize
    word += number * _WORDS.value
    length -= number * TILE
    length.clamp_(max=TILE)
    tile += number
    return rows


def _resident_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # the interpreter runs programs one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_PROCESSOR


@triton.jit
def _stored(offset_ptr, inside_ptr, tile):
    """(place of the tile's first candidate, number of its candidates, or 0 if they are not stored)."""
    offset = tl.load(offset_ptr + tile)
    return offset, tl.where(offset < 0, 0, tl.load(inside_ptr + tile)).to(tl.int32)


@triton.jit
def _set_bits(tile_words_ptr, position_ptr, place, mask):
    """Sets the bits of the candidates at `place`, with atomics, since several may share a word."""
    position = tl.load(position_ptr + place, mask, 0).to(tl.uint16, bitcast=True).to(tl.int32)
    bit = tl.full([], 1, tl.uint32) << (position & 31).to(tl.uint32)
    tl.atomic_or(tile_words_ptr + position // 32, bit.to(tl.int32, bitcast=True), mask, sem="relaxed")


def _launch_per_tile(kernel: Any, offsets: Tensor, *arguments: Tensor | int) -> None:
    launch(kernel, len(offsets), offsets, *arguments, num_warps=_CANDIDATE_WARPS)


@triton.jit(do_not_specialize=["bins"], do_not_specialize_on_alignment=_READ_SINGLY)
def _candidate_histogram_kernel(
    key_ptr, offset_ptr, inside_ptr, group_ptr, low_ptr, high_ptr, shift_ptr, histogram_ptr, bins
):
    """A program for each tile, as in the next two kernels."""
    tile = tl.program_id(0)
    offset, n = _stored(offset_ptr, inside_ptr, tile)
    group = tl.load(group_ptr + tile)
    low = tl.load(low_ptr + group)
    high = tl.load(high_ptr + group)
    shift = tl.load(shift_ptr + group)
    first = 0
    while first < n:
        place = first + tl.arange(0, _CANDIDATES)
        key = tl.load(key_ptr + offset + place, place < n, 0)
        bin = (key - low) >> shift
        counted = (place < n) & (key >= low) & (key < high) & (bin < bins)
        tl.atomic_add(histogram_ptr + group * bins + bin, tl.full([], 1, tl.int64), counted, sem="relaxed")
        first += _CANDIDATES


def candidate_histogram(c: Any) -> None:
    stored, bounds = (c.keys, c.offsets, c.inside, c.tile_groups), (c.low, c.high, c.shift)
    _launch_per_tile(_candidate_histogram_kernel, c.offsets, *stored, *bounds, c.histogram, c.histogram.shape[1])


@triton.jit(do_not_specialize_on_alignment=_READ_SINGLY)
def _take_above_kernel(
    key_ptr, position_ptr, offset_ptr, inside_ptr, group_ptr, cut_ptr, words_ptr, tile_word_ptr, taken_ptr, ties_ptr
):
    tile = tl.program_id(0)
    offset, n = _stored(offset_ptr, inside_ptr, tile)
    cut = tl.load(cut_ptr + tl.load(group_ptr + tile))
    tile_words_ptr = words_ptr + tl.load(tile_word_ptr + tile)
    taken = tl.zeros([_CANDIDATES], tl.int32)
    ties = tl.zeros([_CANDIDATES], tl.int32)
    first = 0
    while first < n:
        place = first + tl.arange(0, _CANDIDATES)
        key = tl.load(key_ptr + offset + place, place < n, 0)
        above = (place < n) & (key > cut)
        _set_bits(tile_words_ptr, position_ptr + offset, place, above)
        taken += above.to(tl.int32)
        ties += ((place < n) & (key == cut)).to(tl.int32)
        first += _CANDIDATES
    tl.store(taken_ptr + tile, tl.sum(taken).to(tl.int64))
    tl.store(ties_ptr + tile, tl.sum(ties).to(tl.int64))


def take_above(c: Any) -> None:
    _launch_per_tile(_take_above_kernel, c.offsets, *_marks(c), c.taken, c.ties)


def _marks(c: Any) -> list[Tensor]:
    return [c.keys, c.positions, c.offsets, c.inside, c.tile_groups, c.cut, c.words, c.tile_words]


@triton.jit(do_not_specialize_on_alignment=_READ_SINGLY)
def _take_ties_kernel(
    key_ptr, position_ptr, offset_ptr, inside_ptr, group_ptr, cut_ptr, words_ptr, tile_word_ptr, take_ptr
):
    tile = tl.program_id(0)
    offset, n = _stored(offset_ptr, inside_ptr, tile)
    cut = tl.load(cut_ptr + tl.load(group_ptr + tile))
    tile_words_ptr = words_ptr + tl.load(tile_word_ptr + tile)
    take = tl.load(take_ptr + tile)
    first = 0
    seen = 0
    while (first < n) & (seen < take):
        place = first + tl.arange(0, _CANDIDATES)
        key = tl.load(key_ptr + offset + place, place < n, 0)
        tie = (place < n) & (key == cut)
        before = seen + tl.cumsum(tie.to(tl.int32)) - tie.to(tl.int32)
        _set_bits(tile_words_ptr, position_ptr + offset, place, tie & (before < take))
        seen += tl.sum(tie.to(tl.int32))
        first += _CANDIDATES


def take_ties(c: Any) -> None:
    _launch_per_tile(_take_ties_kernel, c.offsets, *_marks(c), c.take)
