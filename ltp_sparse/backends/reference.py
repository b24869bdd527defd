"""All operations in plain PyTorch: the definition of each, and the fallback where no other backend can serve.

It is written to be read. It works on every device, and the update also in float64. `backends/arguments.py` describes
what each function takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltp_sparse.backends import arguments as records
from ltp_sparse.backends import digests
from ltp_sparse.backends.arguments import RUN, Tensors
from ltp_sparse.backends.coefficients import Coefficient, write_coefficients
from ltp_sparse.backends.quantization import dequantize, exact_sqrt, quantize
from ltp_sparse.backends.rounding import moment_bits, random16, round_stochastically, rounding_keys
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE, bitmap_words, pack_bits, to_uint16_bits
from ltp_sparse.tickets.tile_table import Column, state_blocks, tile_indices

NAME = "reference"
NEEDS_RANKS = NEEDS_PREPARED = False
SUMS_PER_TILE = 1

NONFINITE_KEY = 0x7F800000
"""The smallest key of an infinity or a NaN."""


def probe(device: torch.device) -> str | None:
    """None: it serves tensors on every device."""
    return None


def adamw_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new (p, m, v) of some entries: AdamW (arXiv 1711.05101), as torch.optim.AdamW with one difference.

    Decay and step are subtracted from a weight together. A factor 1 - lr * weight_decay, rounded to float32, would be
    wrong in the same direction in every step.

    Args:
        p: values.
        g: effective gradients, of the shape and dtype of the values.
        m: first moments, the same.
        v: second moments, the same.
        c: a row of coefficients, of the same dtype.
    """
    m = m + c[Coefficient.ONE_MINUS_BETA1] * (g - m)
    v = v * c[Coefficient.BETA2] + c[Coefficient.ONE_MINUS_BETA2] * (g * g)
    denominator = exact_sqrt(v) * c[Coefficient.INV_SQRT_BC2] + c[Coefficient.EPS]
    return p - (c[Coefficient.DECAY_STEP] * p + c[Coefficient.STEP_SIZE] * (m / denominator)), m, v


def prepare_step(step: records.Step) -> None:
    """Counts a step and computes its coefficients."""
    apply = step.has_grad if step.found_inf is None else step.has_grad * (step.found_inf == 0)
    if step.counts:
        step.steps.add_(apply)
    write_coefficients(
        step.coefficients,
        hyper=step.hyper[step.group],
        apply=apply,
        steps=step.steps,
        keys=rounding_keys(step.seed, step.steps, step.numbers),
        grad_scale=step.grad_scale,
        pull_factor=step.pull_factor,
    )


def _tiles(table: records.Tiles, packed: bool) -> Iterator[tuple[int, list[int], Tensor]]:
    """(position in the table, row, flat or packed gradients) of every tile whose parameter has a gradient."""
    for position, tile in enumerate(table.tiles.tolist()):
        grad = table.grads[0 if packed else tile[Column.PARAM]]
        if grad is not None:
            yield position, tile, grad.view(-1)


def _slots(tile: list[int]) -> slice:
    return slice(tile[Column.SLOT], tile[Column.SLOT] + tile[Column.ACTIVE])


def _values_and_gradients(
    norm: records.Norm, tile: list[int], grad: Tensor, indices: Tensor, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The active entries in the precision of the update, and their effective gradients."""
    param, slots = norm.params[tile[Column.PARAM]], _slots(tile)
    assert param is not None
    inside = norm.params.inside(tile[Column.PARAM], indices)
    values = norm.master[slots] if norm.master is not None else param.view(-1)[inside]
    values = values if values.dtype == torch.float64 else values.float()
    scales = norm.coefficients[tile[Column.PARAM], [Coefficient.GRAD_FACTOR, Coefficient.PULL]]
    grad_factor, pull = (scales if clip is None else scales * clip).to(values.dtype)
    g = grad[slots if norm.packed else inside].to(values.dtype) * grad_factor
    if norm.anchor is not None:
        g = g + pull * torch.sign(values - norm.anchor[slots])
    return values, g


def masked_adamw_(update: records.Update) -> None:
    """`adamw_update` of the active entries."""
    exp_avg, exp_avg_sq, scales, master = update.exp_avg, update.exp_avg_sq, update.scales, update.master
    for _, tile, grad in _tiles(update, update.packed):
        param = update.params[tile[Column.PARAM]]
        assert param is not None
        indices, slots = tile_indices(tile, update.words, update.positions), _slots(tile)
        row = update.coefficients[tile[Column.PARAM]]
        blocks = slice(tile[Column.BLOCK], tile[Column.BLOCK] + state_blocks(tile[Column.ACTIVE]))
        m, v = exp_avg[slots], exp_avg_sq[slots]
        if scales is not None:
            m, v = dequantize(m, v, scales[blocks])

        old, g = _values_and_gradients(update, tile, grad, indices, update.clip)
        p, m, v = adamw_update(old, g, m, v, row.to(old.dtype))

        written: list[tuple[Tensor, slice | Tensor, Tensor]] = [(exp_avg, slots, m), (exp_avg_sq, slots, v)]
        if scales is not None:
            first, second, block_scales = quantize(m, v, moment_bits(row[Coefficient.ROUNDING_KEY], indices))
            written = [(exp_avg, slots, first), (exp_avg_sq, slots, second), (scales, blocks, block_scales)]
        if master is not None:
            written.append((master, slots, p))
        stored = p.to(param.dtype)
        if update.stochastic:
            stored = round_stochastically(p, random16(row[Coefficient.ROUNDING_KEY], indices))
        flat = param.data.view(-1)  # .data: the caller tells torch which parameters have changed, for every backend
        written.append((flat, update.params.inside(tile[Column.PARAM], indices), stored))
        # no branch on the host, which would wait for a flag on a GPU
        apply = row[Coefficient.APPLY] != 0
        for target, where, values in written:
            target[where] = torch.where(apply, values, target[where])


def masked_sum_squares(norm: records.Norm) -> Tensor:
    """float64 [T]: per tile, the sum of squares of the active gradient entries as `masked_adamw_` would see them."""
    sums = torch.zeros(norm.tiles.shape[0], dtype=torch.float64, device=norm.tiles.device)
    for position, tile, grad in _tiles(norm, norm.packed):
        _, g = _values_and_gradients(norm, tile, grad, tile_indices(tile, norm.words, norm.positions))
        sums[position] = g.double().square().sum()
    return sums


def gradient_norm(norm: records.Norm, total: records.Total) -> None:
    """After the last launch of a step: the norm of the gradients, and the factor that clips them."""
    add_sums(masked_sum_squares(norm), total)


def add_sums(sums: Tensor, total: records.Total) -> None:
    """`gradient_norm`, from the sums of squares of a launch."""
    end = total.first + len(sums)
    total.sums[total.first : end] = sums
    if end == total.tiles:
        total.grad_norm.copy_(total.sums[:end].sum().sqrt())
        total.clip.copy_((total.max_norm / (total.grad_norm + 1e-6)).clamp(max=1.0))


def masked_pack_(pack: records.Pack) -> None:
    """Copies the active entries of the gradients to their slots, or adds them to the slots."""
    for _, tile, grad in _tiles(pack, packed=False):
        values, slots = grad[tile_indices(tile, pack.words, pack.positions)].float(), _slots(tile)
        pack.out[slots] = pack.out[slots] + values if pack.accumulate else values


def _copies(entries: records.Index, tensors: Tensors) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """(flat tensor, its active entries, their slots) of every tile."""
    for tile in entries.tiles.tolist():
        tensor = tensors[tile[Column.PARAM]]
        assert tensor is not None
        yield tensor.view(-1), tile_indices(tile, entries.words, entries.positions), _slots(tile)


def masked_gather_(gather: records.Gather) -> None:
    """Copies the active entries to their slots."""
    for tensor, indices, slots in _copies(gather, gather.tensors):
        gather.slots[slots] = tensor[indices]


def masked_scatter_(scatter: records.Scatter) -> None:
    """Copies the slots to the active entries."""
    for tensor, indices, slots in _copies(scatter, scatter.tensors):
        tensor[indices] = scatter.slots[slots]


def masked_swap_(swap: records.Swap) -> None:
    """Exchanges the active entries and their slots."""
    for tensor, indices, slots in _copies(swap, swap.tensors):
        new = swap.slots[slots].clone()
        swap.slots[slots] = tensor[indices]  # first, so that whoever knows the new values can undo half a swap
        tensor[indices] = new


_CANDIDATES = 1 << 15  # candidates processed at a time
_STRIDE = 4 * TILE  # entries processed at a time: keeps the temporaries to a few megabytes
_RUNS = 1 << 13  # sampled runs read at a time


def delta_keys(initial: Tensor | None, tuned: Tensor) -> Tensor:
    """int32 keys, the bits of |float32(tuned) - float32(initial)|, ordered like these numbers. No `initial`: zeros."""
    delta = tuned.float() if initial is None else tuned.float() - initial.float()
    return delta.abs().view(torch.int32)


def _key_pieces(pairs: records.Pairs) -> Iterator[tuple[int, int, Tensor]]:
    """(tensor, first entry, keys) over all tensors."""
    for tensor, t in enumerate(pairs.tuned.present):
        before = pairs.initial.present[tensor].view(-1) if pairs.initial else None
        for start in range(0, t.numel(), _STRIDE):
            piece = slice(start, start + _STRIDE)
            yield tensor, start, delta_keys(None if before is None else before[piece], t.view(-1)[piece])


def delta_histogram(histogram: records.Histogram) -> None:
    """Counts digits of the non-zero keys of each group."""
    prefixes = histogram.prefixes
    for tensor, _, keys in _key_pieces(histogram):
        group = histogram.groups[tensor]
        histogram.nonfinite.bitwise_or_((keys >= NONFINITE_KEY).any())
        counted = keys > 0 if prefixes is None else (keys > 0) & ((keys >> 16) == prefixes[group])
        digits = keys >> 16 if prefixes is None else keys & 0xFFFF
        histogram.histogram[group].index_add_(0, digits, counted.long())  # unlike bincount, it waits for no GPU


def sample_keys(sample: records.Sample) -> None:
    """The keys of some runs of `RUN` neighbouring entries."""
    which, counts = sample.tensors.unique_consecutive(return_counts=True)
    start = 0
    for tensor, count in zip(which.tolist(), counts.tolist(), strict=True):
        for first in range(start, start + count, _RUNS):
            piece = slice(first, min(first + _RUNS, start + count))
            runs = sample.runs[piece]
            before = _runs(sample.initial.present[tensor], runs) if sample.initial else None
            keys = delta_keys(before, _runs(sample.tuned.present[tensor], runs))
            sample.keys[piece] = keys.clamp_(max=NONFINITE_KEY - 1)
        start += count


def _runs(tensor: Tensor, runs: Tensor) -> Tensor:
    """[len(runs), RUN]: the entries of each run, zeros beyond the end of the tensor."""
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


def delta_band(band: records.Band) -> None:
    """Marks and counts the entries above a band of keys, and stores the candidates inside the band."""
    tile, room = 0, band.keys.numel()
    # No key is above 2^31 - 1. A larger bound means the same as 2^31, with which an int32 key cannot be compared.
    below_low, below_high = ((bound - 1).clamp(max=2**31 - 1) for bound in (band.low, band.high))
    for tensor, start, piece in _key_pieces(band):
        group = band.groups[tensor]
        band.nonfinite.bitwise_or_((piece >= NONFINITE_KEY).any())
        is_above = piece > below_high[group]
        is_inside = (piece > below_low[group]) & ~is_above
        for first in range(0, piece.numel(), TILE):
            mask, found = is_above[first : first + TILE], is_inside[first : first + TILE].nonzero().view(-1)
            band.above[tile], band.inside[tile] = mask.sum(), found.numel()
            if band.take is not None:
                mask[found[: int(band.take[tile])]] = True
            offset = band.word_offsets[tensor] + (start + first) // TILE * WORDS_PER_TILE
            band.words[offset : offset + bitmap_words(mask.numel())] = pack_bits(mask)
            stored, end = int(band.cursor), int(band.cursor) + found.numel()
            band.offsets[tile] = stored if end <= room else -1
            if end <= room:
                band.keys[stored:end] = piece[first : first + TILE][found]
                band.positions[stored:end] = to_uint16_bits(found)
            band.cursor.add_(found.numel())
            tile += 1
    if band.digests is not None:
        digests.on_host(band.initial.present, band.digests)


def _candidate_pieces(candidates: records.Candidates) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tile, key, position in tile) of the candidates of some tiles at a time."""
    offsets, inside = candidates.offsets, candidates.inside
    tiles = (inside > 0).nonzero().view(-1)
    tiles = tiles[offsets[tiles].argsort()]
    ends = inside[tiles].cumsum(0)
    start = first = 0
    while start < tiles.numel():
        stop = max(start + 1, int(torch.searchsorted(ends, first + _CANDIDATES, right=True)))
        last = int(ends[stop - 1])
        tile = torch.repeat_interleave(tiles[start:stop], inside[tiles[start:stop]])
        yield tile, candidates.keys[first:last], candidates.positions[first:last].to(torch.int64) & 0xFFFF
        start, first = stop, last


def candidate_histogram(candidates: records.CandidateBins) -> None:
    """Counts the candidates low <= key < high of each group into its row of the histogram, by (key - low) >> shift."""
    groups, bins = candidates.histogram.shape
    for tile, piece, _ in _candidate_pieces(candidates):
        group = candidates.tile_groups[tile]
        low = candidates.low[group]
        bin = (piece - low) >> candidates.shift[group]
        counted = (piece >= low) & (piece < candidates.high[group]) & (bin < bins)
        digits = (group * bins + bin)[counted]
        candidates.histogram.add_(torch.bincount(digits, minlength=groups * bins).view(groups, bins))


def take_above(candidates: records.Above) -> None:
    """Sets the bits of the candidates whose key is above the cut of their group, and counts these and the ties."""
    candidates.taken.zero_()
    candidates.ties.zero_()
    for tile, piece, places in _candidate_pieces(candidates):
        limit = candidates.cut[candidates.tile_groups[tile]]
        over, equal = piece > limit, tile[piece == limit]
        _set_bits(candidates, tile[over], places[over])
        candidates.taken.index_add_(0, tile[over], torch.ones_like(tile[over]))
        candidates.ties.index_add_(0, equal, torch.ones_like(equal))


def take_ties(candidates: records.Ties) -> None:
    """Sets the bits of each tile's first `take` candidates at the cut of their group."""
    take = candidates.take
    for tile, piece, places in _candidate_pieces(candidates):
        equal = (piece == candidates.cut[candidates.tile_groups[tile]]) & (take[tile] > 0)
        tile, places = tile[equal], places[equal]
        starts = torch.cat([tile.new_ones(min(1, tile.numel())), (tile[1:] != tile[:-1]).to(tile.dtype)]).cumsum(0)
        order = torch.arange(tile.numel(), device=tile.device, dtype=torch.int64)
        chosen = order - torch.searchsorted(starts, starts) < take[tile]  # place among the ties of its tile
        _set_bits(candidates, tile[chosen], places[chosen])


def _set_bits(marks: records.Marks, tile: Tensor, positions: Tensor) -> None:
    # each bit is set once, so that adding is the same as or
    bits = torch.ones_like(positions, dtype=torch.int32) << (positions & 31).to(torch.int32)
    marks.words.index_add_(0, marks.tile_words[tile] + (positions >> 5), bits)
