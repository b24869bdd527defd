"""The two operations in plain PyTorch: what they mean, and the fallback where nothing faster is there.

Written to be read. Works on every device; the update also in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ltp_sparse.backends.quantization import dequantize, exact_sqrt, quantize
from ltp_sparse.backends.rounding import moment_bits, random16, round_stochastically
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE, bitmap_words, pack_bits, to_uint16_bits
from ltp_sparse.tickets.tile_table import Column, state_blocks, tile_indices

NONFINITE_KEY = 0x7F800000
"""The smallest key of an infinity or a NaN."""


class Coefficient:
    """Columns of the `coefficients` of `masked_adamw_`: float64 [P, 11], a row per parameter."""

    APPLY = 0  # 1: update, 0: leave everything of this parameter as it is
    GRAD_FACTOR = 1  # clip factor / loss scale, negative to maximize
    DECAY_STEP = 2  # lr * weight_decay
    ONE_MINUS_BETA1 = 3
    BETA2 = 4
    ONE_MINUS_BETA2 = 5
    STEP_SIZE = 6  # lr / (1 - beta1 ** step)
    INV_SQRT_BC2 = 7  # 1 / sqrt(1 - beta2 ** step)
    EPS = 8
    PULL = 9  # weight of sign(param - anchor) in the gradient
    ROUNDING_KEY = 10  # 32 bits, for the random bits of weights and 8-bit moments: `rounding_keys`
    COUNT = 11


def _tiles(tiles: Tensor, grads: Sequence[Tensor], packed: bool) -> Iterator[tuple[int, list[int]]]:
    """(position in the table, row) of every tile whose parameter has a gradient."""
    for position, tile in enumerate(tiles.tolist()):
        if packed or grads[tile[Column.PARAM]].numel():
            yield position, tile


def _slots(tile: list[int]) -> slice:
    return slice(tile[Column.SLOT], tile[Column.SLOT] + tile[Column.ACTIVE])


def _values(param: Tensor, master: Tensor, indices: Tensor, slots: slice) -> Tensor:
    """The active entries in the precision they are updated in."""
    if master.numel():
        return master[slots]
    values = param.view(-1)[indices]
    return values if values.dtype == torch.float64 else values.float()


def _active_gradient(grads: Sequence[Tensor], packed: bool, tile: list[int], indices: Tensor) -> Tensor:
    return grads[0][_slots(tile)] if packed else grads[tile[Column.PARAM]].view(-1)[indices]


def _gradient(values: Tensor, grad: Tensor, c: Tensor, anchor: Tensor) -> Tensor:
    gradient = grad.to(values.dtype) * c[Coefficient.GRAD_FACTOR]
    if anchor.numel():
        gradient = gradient + c[Coefficient.PULL] * torch.sign(values - anchor)
    return gradient


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor,
    master: Tensor,
    tiles: Tensor,
    words: Tensor,
    ranks: Tensor,
    positions: Tensor,
    coefficients: Tensor,
    anchor: Tensor,
    stochastic: bool,
    packed: bool = False,
) -> None:
    """AdamW (arXiv 1711.05101) on the active entries, as torch.optim.AdamW but for one thing.

    Decay and step leave a weight in one subtraction: 1 - lr * weight_decay, rounded to float32, would be off in the
    same direction in every step.

    Optional tensors are empty where they are not used: `scales` (moments are then not quantised), `master`, `anchor`.
    packed: `grads` is one tensor, float32 [K] in slot order; whether a parameter is updated, APPLY alone says.
    """
    for _, tile in _tiles(tiles, grads, packed):
        param = params[tile[Column.PARAM]]
        indices, slots = tile_indices(tile, words, positions), _slots(tile)
        old = _values(param, master, indices, slots)
        row = coefficients[tile[Column.PARAM]]
        c = row.to(old.dtype)
        blocks = slice(tile[Column.BLOCK], tile[Column.BLOCK] + state_blocks(tile[Column.ACTIVE]))
        m, v = exp_avg[slots], exp_avg_sq[slots]
        if scales.numel():
            m, v = dequantize(m, v, scales[blocks])

        g = _gradient(old, _active_gradient(grads, packed, tile, indices), c, anchor[slots])
        m = m + c[Coefficient.ONE_MINUS_BETA1] * (g - m)
        v = v * c[Coefficient.BETA2] + c[Coefficient.ONE_MINUS_BETA2] * (g * g)
        denominator = exact_sqrt(v) * c[Coefficient.INV_SQRT_BC2] + c[Coefficient.EPS]
        p = old - (c[Coefficient.DECAY_STEP] * old + c[Coefficient.STEP_SIZE] * (m / denominator))

        written: list[tuple[Tensor, slice | Tensor, Tensor]] = [(exp_avg, slots, m), (exp_avg_sq, slots, v)]
        if scales.numel():
            first, second, block_scales = quantize(m, v, moment_bits(row[Coefficient.ROUNDING_KEY], indices))
            written = [(exp_avg, slots, first), (exp_avg_sq, slots, second), (scales, blocks, block_scales)]
        if master.numel():
            written.append((master, slots, p))
        stored = p.to(param.dtype)
        if stochastic:
            stored = round_stochastically(p, random16(row[Coefficient.ROUNDING_KEY], indices))
        written.append((param.view(-1), indices, stored))
        # a select, not a branch on the host: on a GPU the flag stays on the device
        apply = c[Coefficient.APPLY] != 0
        for target, where, values in written:
            target[where] = torch.where(apply, values, target[where])


def masked_sum_squares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    master: Tensor,
    tiles: Tensor,
    words: Tensor,
    ranks: Tensor,
    positions: Tensor,
    coefficients: Tensor,
    anchor: Tensor,
    packed: bool = False,
) -> Tensor:
    """float64 [T]: per tile, the sum of squares of the active gradient entries as `masked_adamw_` would see them."""
    sums = torch.zeros(tiles.shape[0], dtype=torch.float64, device=tiles.device)
    for position, tile in _tiles(tiles, grads, packed):
        indices, slots = tile_indices(tile, words, positions), _slots(tile)
        values = _values(params[tile[Column.PARAM]], master, indices, slots)
        c = coefficients[tile[Column.PARAM]].to(values.dtype)
        g = _gradient(values, _active_gradient(grads, packed, tile, indices), c, anchor[slots])
        sums[position] = g.double().square().sum()
    return sums


def masked_pack_(
    grads: Sequence[Tensor],
    out: Tensor,
    tiles: Tensor,
    words: Tensor,
    ranks: Tensor,
    positions: Tensor,
    accumulate: bool,
) -> None:
    """Copies the active entries of `grads` to their slots of `out` (float32 [K]), or adds them to what is there."""
    for _, tile in _tiles(tiles, grads, packed=False):
        values = grads[tile[Column.PARAM]].view(-1)[tile_indices(tile, words, positions)].float()
        slots = _slots(tile)
        out[slots] = out[slots] + values if accumulate else values


_CANDIDATES = 1 << 15  # candidates worked off at a time
_STRIDE = 4 * TILE  # entries keyed at a time: keeps the temporaries to a few megabytes
_RUNS = 1 << 13  # sampled runs read at a time

RUN = 16
"""Neighbouring entries that are sampled together: a cache line of float32."""


def delta_keys(initial: Tensor | None, tuned: Tensor) -> Tensor:
    """int32 keys bits(|float32(tuned) - float32(initial)|), which order like the deltas; `initial` None: zeros."""
    delta = tuned.float() if initial is None else tuned.float() - initial.float()
    return delta.abs().view(torch.int32)


def _key_pieces(initial: Sequence[Tensor], tuned: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """(tensor, first entry, keys) over all tensors."""
    for tensor, t in enumerate(tuned):
        for start in range(0, t.numel(), _STRIDE):
            piece = slice(start, start + _STRIDE)
            yield tensor, start, delta_keys(initial[tensor].view(-1)[piece] if initial else None, t.view(-1)[piece])


def delta_histogram(
    initial: Sequence[Tensor],
    tuned: Sequence[Tensor],
    groups: Sequence[int],
    prefixes: Tensor | None,
    histogram: Tensor,
    nonfinite: Tensor,
) -> None:
    """Counts digits of the non-zero keys of each group into `histogram` (int64, added to).

    prefixes None:      [G, 32768] by the upper 15 bits.
    prefixes int64 [G]: [G, 65536] by the lower 16 bits, of the keys whose upper bits are the group's prefix.
    nonfinite:          int64 [1], set to 1 if an infinity or a NaN was seen
    """
    for tensor, _, keys in _key_pieces(initial, tuned):
        group = groups[tensor]
        nonfinite |= (keys >= NONFINITE_KEY).any()
        counted = keys > 0 if prefixes is None else (keys > 0) & ((keys >> 16) == prefixes[group])
        digits = keys >> 16 if prefixes is None else keys & 0xFFFF
        histogram[group].index_add_(0, digits, counted.long())  # unlike bincount, it does not wait for a GPU


def sample_keys(
    initial: Sequence[Tensor], tuned: Sequence[Tensor], tensors: Tensor, runs: Tensor, keys: Tensor
) -> None:
    """The keys of some runs of `RUN` neighbouring entries.

    tensors, runs: int64 [R], run number r of a tensor has its entries RUN * r and on, in row-major order; 0 <= r <
                   max(1, n // RUN)
    keys:          int32 [R, RUN], written: at most the largest finite key, 0 beyond the end of a tensor
    """
    which, counts = tensors.unique_consecutive(return_counts=True)
    start = 0
    for tensor, count in zip(which.tolist(), counts.tolist(), strict=True):
        for first in range(start, start + count, _RUNS):
            piece = slice(first, min(first + _RUNS, start + count))
            before = _runs(initial[tensor], runs[piece]) if initial else None
            keys[piece] = delta_keys(before, _runs(tuned[tensor], runs[piece])).clamp_(max=NONFINITE_KEY - 1)
        start += count


def _runs(tensor: Tensor, runs: Tensor) -> Tensor:
    """[len(runs), RUN] entries; zeros beyond the end."""
    n = tensor.numel()
    if n < RUN:
        return torch.nn.functional.pad(tensor.reshape(-1), (0, RUN - n)).expand(len(runs), RUN)
    if tensor.is_contiguous():
        return tensor.view(-1)[: n // RUN * RUN].view(-1, RUN).index_select(0, runs)
    indices = runs[:, None] * RUN + torch.arange(RUN, device=runs.device, dtype=torch.int64)
    coordinates: list[Tensor] = []  # torch.unravel_index would import 30 MB of modules
    for size in reversed(tensor.shape):
        coordinates.insert(0, indices % size)
        indices = indices // size
    return tensor[tuple(coordinates)]


def delta_band(
    initial: Sequence[Tensor],
    tuned: Sequence[Tensor],
    groups: Sequence[int],
    low: Tensor,
    high: Tensor,
    words: Tensor,
    word_offsets: Sequence[int],
    above: Tensor,
    inside: Tensor,
    take: Tensor | None,
    keys: Tensor,
    positions: Tensor,
    offsets: Tensor,
    cursor: Tensor,
    nonfinite: Tensor,
) -> None:
    """Marks the entries above a band of keys, counts, and stores the candidates inside the band.

    low, high:       int64 [G], 1 <= low <= high
    words:           int32, every word of every tensor is written: the bits of keys >= high
    above, inside:   int64 [T], per tile the number of keys >= high, and of low <= key < high
    take:            int64 [T] or None: also set the bits of each tile's first `take` entries inside the band
    keys, positions: int32 [C] and int16 [C] (uint16 bits): the candidates, each tile's contiguous and ascending
    offsets:         int64 [T], where a tile's candidates start; -1: not stored, no room
    cursor:          int64 [1], candidates stored so far, or wanted where it exceeds C
    nonfinite:       int64 [1], set to 1 if an infinity or a NaN was seen
    """
    tile = 0
    for tensor, start, piece in _key_pieces(initial, tuned):
        group = groups[tensor]
        nonfinite |= (piece >= NONFINITE_KEY).any()
        is_above = piece >= high[group]
        is_inside = (piece >= low[group]) & ~is_above
        for first in range(0, piece.numel(), TILE):
            mask, band = is_above[first : first + TILE], is_inside[first : first + TILE]
            found = band.nonzero().view(-1)
            above[tile], inside[tile] = mask.sum(), found.numel()
            if take is not None:
                mask[found[: int(take[tile])]] = True
            offset = word_offsets[tensor] + (start + first) // TILE * WORDS_PER_TILE
            words[offset : offset + bitmap_words(mask.numel())] = pack_bits(mask)
            stored, end = int(cursor), int(cursor) + found.numel()
            offsets[tile] = stored if end <= keys.numel() else -1
            if end <= keys.numel():
                keys[stored:end] = piece[first : first + TILE][found]
                positions[stored:end] = to_uint16_bits(found)
            cursor += found.numel()
            tile += 1


def _candidate_pieces(
    keys: Tensor, positions: Tensor, offsets: Tensor, inside: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tile, key, position in tile) of the candidates of some tiles at a time."""
    tiles = (inside > 0).nonzero().view(-1)
    tiles = tiles[offsets[tiles].argsort()]
    ends = inside[tiles].cumsum(0)
    start = first = 0
    while start < tiles.numel():
        stop = max(start + 1, int(torch.searchsorted(ends, first + _CANDIDATES, right=True)))
        last = int(ends[stop - 1])
        tile = torch.repeat_interleave(tiles[start:stop], inside[tiles[start:stop]])
        yield tile, keys[first:last], positions[first:last].to(torch.int64) & 0xFFFF
        start, first = stop, last


def candidate_histogram(
    keys: Tensor,
    positions: Tensor,
    offsets: Tensor,
    inside: Tensor,
    tile_groups: Tensor,
    low: Tensor,
    high: Tensor,
    shift: Tensor,
    histogram: Tensor,
) -> None:
    """Counts the candidates low <= key < high of each group into its row of `histogram`, by (key - low) >> shift.

    keys, positions, offsets, inside: candidates as `delta_band` stores them, none left out
    tile_groups:                      int64 [T]
    low, high, shift:                 int64 [G]
    histogram:                        int64 [G, bins], added to; what is beyond the bins is left out
    """
    groups, bins = histogram.shape
    for tile, piece, _ in _candidate_pieces(keys, positions, offsets, inside):
        group = tile_groups[tile]
        bin = (piece - low[group]) >> shift[group]
        counted = (piece >= low[group]) & (piece < high[group]) & (bin < bins)
        digits = (group * bins + bin)[counted]
        histogram += torch.bincount(digits, minlength=groups * bins).view(groups, bins)


def take_above(
    keys: Tensor,
    positions: Tensor,
    offsets: Tensor,
    inside: Tensor,
    tile_groups: Tensor,
    cut: Tensor,
    words: Tensor,
    tile_words: Tensor,
    taken: Tensor,
    ties: Tensor,
) -> None:
    """Sets the bits of the candidates whose key is above the cut of their group, and counts.

    cut:         int64 [G]
    words:       int32, bitmaps as `delta_band` writes them
    tile_words:  int64 [T], the first word of each tile
    taken, ties: int64 [T], written: candidates above the cut, and at it
    """
    taken.zero_()
    ties.zero_()
    for tile, piece, places in _candidate_pieces(keys, positions, offsets, inside):
        limit = cut[tile_groups[tile]]
        over, equal = piece > limit, tile[piece == limit]
        _set_bits(words, tile_words, tile[over], places[over])
        taken.index_add_(0, tile[over], torch.ones_like(tile[over]))
        ties.index_add_(0, equal, torch.ones_like(equal))


def take_ties(
    keys: Tensor,
    positions: Tensor,
    offsets: Tensor,
    inside: Tensor,
    tile_groups: Tensor,
    cut: Tensor,
    words: Tensor,
    tile_words: Tensor,
    take: Tensor,
) -> None:
    """Sets the bits of each tile's first `take` (int64 [T]) candidates at the cut of their group; see `take_above`."""
    for tile, piece, places in _candidate_pieces(keys, positions, offsets, inside):
        equal = (piece == cut[tile_groups[tile]]) & (take[tile] > 0)
        tile, places = tile[equal], places[equal]
        starts = torch.cat([tile.new_ones(min(1, tile.numel())), (tile[1:] != tile[:-1]).to(tile.dtype)]).cumsum(0)
        order = torch.arange(tile.numel(), device=tile.device, dtype=torch.int64)
        chosen = order - torch.searchsorted(starts, starts) < take[tile]  # place among the ties of its tile
        _set_bits(words, tile_words, tile[chosen], places[chosen])


def _set_bits(words: Tensor, tile_words: Tensor, tile: Tensor, positions: Tensor) -> None:
    # every bit is set once, so adding is or-ing
    bits = torch.ones_like(positions, dtype=torch.int32) << (positions & 31).to(torch.int32)
    words.index_add_(0, tile_words[tile] + (positions >> 5), bits)
