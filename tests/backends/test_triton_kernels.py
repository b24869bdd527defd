"""The Triton kernels against the formulas they implement, written here in plain torch.

Without a GPU they run in Triton's interpreter, which is why the inputs are small: it says nothing about races or speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from helpers.backends import Unpacked
from helpers.bits import bits
from torch import Tensor

from ltp_sparse.backends import triton
from ltp_sparse.backends.addresses import _tables, address_table
from ltp_sparse.backends.arguments import Tensors
from ltp_sparse.tickets.bits import TILE, bitmap_words
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable

pytest.importorskip("ltp_sparse.kernels", exc_type=ImportError)

kernels = Unpacked(triton)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN_WITH_PAYLOAD = 0x7FC12345


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    different = (bits(actual) != bits(expected)).nonzero().view(-1)
    assert not different.numel(), f"{what}: {different.numel()} entries differ, first {different[:5].tolist()}"


def misaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that no vector load may take."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    buffer[1:] = tensor
    return buffer[1:]


# --- masked_adamw_ ----------------------------------------------------------------------------------------------------

# (entries, share of active entries): every encoding with tails, blocks that several programs share, a second tile
SHAPES = [(1, 1.0), (63, 0.3), (1000, 0.02), (1000, 0.0), (4097, 1.0), (1500, 1.0), (4097, 0.2), (70_000, 0.01)]
TWO_TILES_OF_BITMAP = (70_000, 0.1)  # slow in the interpreter
# positions of full parameters whose slots can be, and cannot be, moved as vectors, and of those in special situations
VECTORS, NO_VECTORS, MISALIGNED, APPLY_OFF, NO_GRADIENT = 4, 5, 4, 6, 2
SITUATIONS = {"all": (), "skip": (APPLY_OFF, NO_GRADIENT), "misaligned": (MISALIGNED,)}


@dataclass
class Problem:
    """Arguments of `masked_adamw_`, and the masks they came from."""

    masks: list[Tensor]
    table: TileTable
    params: list[Tensor]
    grads: list[Tensor | None]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    coefficients: Tensor
    anchor: Tensor | None

    def args(self) -> tuple:
        return *self.norm_args(), self.exp_avg, self.exp_avg_sq, None, False

    def norm_args(self) -> tuple:
        t = self.table
        index = (t.tiles, t.words, t.ranks, t.positions)
        return *index, self.grads, self.params, self.coefficients, False, None, self.anchor

    def slots(self, param: int) -> slice:
        ends = list(accumulate(self.table.counts))
        return slice(ends[param] - self.table.counts[param], ends[param])


def random_mask(n: int, share: float, rng: torch.Generator) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=rng)[: round(share * n)]] = True
    return mask


def problem(rng: torch.Generator, *, situation: str = "all", anchor: bool = False) -> Problem:
    shapes = [*SHAPES, TWO_TILES_OF_BITMAP] if situation == "all" and anchor else SHAPES
    masks = [random_mask(n, share, rng) for n, share in shapes]
    params = [torch.randn(n, generator=rng) for n, _ in shapes]
    grads = [torch.randn(n, generator=rng) for n, _ in shapes]
    for mask, param, grad in zip(masks, params, grads, strict=True):
        # frozen entries keep their bits, whatever they and their gradients hold
        frozen = (~mask).nonzero().view(-1)
        param[frozen[::3]] = torch.tensor(NAN_WITH_PAYLOAD, dtype=torch.int32).view(torch.float32)
        param[frozen[1::3]] = -0.0
        grad[frozen] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(frozen.numel()) % 3]
        grad[mask.nonzero().view(-1)[::7]] = 0.0
    table = TileTable.build([IndexSet.from_mask(mask) for mask in masks], device=DEVICE, ranks=True)
    assert set(table.tiles[:, Column.ENCODING].tolist()) == set(Encoding)
    first_slots = [sum(table.counts[:param]) % 4 for param in (VECTORS, NO_VECTORS)]
    assert first_slots == [0, 1]
    kept = torch.cat([p[m] for p, m in zip(params, masks, strict=True)])
    initial = torch.where(torch.rand(table.k, generator=rng) < 0.3, kept, torch.randn(table.k, generator=rng))
    # APPLY, GRAD_FACTOR, DECAY_STEP, 1 - beta1, beta2, 1 - beta2, STEP_SIZE, INV_SQRT_BC2, EPS, PULL, ROUNDING_KEY
    row = torch.tensor([1.0, 0.7, 1e-3, 0.1, 0.999, 1e-3, 1e-2, 1.9, 1e-8, 0.03, 0], dtype=torch.float64)
    coefficients = row * (1 + 0.01 * torch.arange(len(shapes))[:, None])
    chosen = SITUATIONS[situation]
    if APPLY_OFF in chosen:
        coefficients[APPLY_OFF, 0] = 0
    if NO_GRADIENT in chosen:
        grads[NO_GRADIENT] = None
    params = [p.to(DEVICE) for p in params]
    grads = [None if g is None else g.to(DEVICE) for g in grads]
    if MISALIGNED in chosen:
        params[MISALIGNED] = misaligned(params[MISALIGNED])
    return Problem(
        [mask.to(DEVICE) for mask in masks],
        table,
        params,
        grads,
        torch.randn(table.k, generator=rng).to(DEVICE),
        torch.rand(table.k, generator=rng).to(DEVICE),
        coefficients.to(DEVICE),
        initial.to(DEVICE) if anchor else None,
    )


def expected_gradient(p: Problem, param: int) -> Tensor:
    c = p.coefficients[param].float()
    g = p.grads[param][p.masks[param]] * c[1]
    if p.anchor is not None:
        g = g + c[9] * torch.sign(p.params[param][p.masks[param]] - p.anchor[p.slots(param)])
    return g


def expected_step(p: Problem) -> tuple[list[Tensor], Tensor, Tensor]:
    params, exp_avg, exp_avg_sq = [x.clone() for x in p.params], p.exp_avg.clone(), p.exp_avg_sq.clone()
    for i, mask in enumerate(p.masks):
        c, slots = p.coefficients[i].float(), p.slots(i)
        if p.grads[i] is None or c[0] == 0:
            continue
        g = expected_gradient(p, i)
        x = p.params[i][mask]
        m = p.exp_avg[slots] + c[3] * (g - p.exp_avg[slots])
        v = p.exp_avg_sq[slots] * c[4] + c[5] * (g * g)
        root = v.double().sqrt().float()  # rounded correctly, which torch's float32 root on CPUs is not
        params[i][mask] = x - (c[2] * x + c[6] * (m / (root * c[7] + c[8])))
        exp_avg[slots], exp_avg_sq[slots] = m, v
    return params, exp_avg, exp_avg_sq


@pytest.mark.slow
@pytest.mark.parametrize("anchor", [False, True], ids=["plain", "anchor"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_update_gives_the_bits_of_the_formula(rng, situation, anchor):
    p = problem(rng, situation=situation, anchor=anchor)
    params, exp_avg, exp_avg_sq = expected_step(p)
    kernels.masked_adamw_(*p.args())
    for i, (actual, expected) in enumerate(zip(p.params, params, strict=True)):
        assert_same_bits(actual, expected, f"parameter {i} of {actual.numel()} entries")
    assert_same_bits(p.exp_avg, exp_avg, "exp_avg")
    assert_same_bits(p.exp_avg_sq, exp_avg_sq, "exp_avg_sq")


def test_update_of_zero_moments_and_gradients(rng):
    # 0 / (sqrt(0) + eps): the slow paths of root and division
    p = problem(rng)
    for tensor in (*p.grads, p.exp_avg, p.exp_avg_sq):
        tensor.zero_()
    params, exp_avg, exp_avg_sq = expected_step(p)
    kernels.masked_adamw_(*p.args())
    for actual, expected in zip([*p.params, p.exp_avg, p.exp_avg_sq], [*params, exp_avg, exp_avg_sq], strict=True):
        assert_same_bits(actual, expected, "zeros")


@pytest.mark.slow
def test_update_follows_gradients_that_move(rng):
    p = problem(rng)
    for _ in range(2):
        params, exp_avg, exp_avg_sq = expected_step(p)
        kernels.masked_adamw_(*p.args())
        assert_same_bits(p.exp_avg, exp_avg, "exp_avg")
        assert_same_bits(p.exp_avg_sq, exp_avg_sq, "exp_avg_sq")
        for actual, expected in zip(p.params, params, strict=True):
            assert_same_bits(actual, expected, "parameter")
        p.grads = [-0.5 * grad for grad in p.grads]


def test_update_of_an_empty_table(rng):
    p = problem(rng)
    p.table = TileTable.build([IndexSet.from_mask(torch.zeros_like(m)) for m in p.masks], device=DEVICE, ranks=True)
    before = [param.clone() for param in p.params]
    kernels.masked_adamw_(*p.args())
    for param, kept in zip(p.params, before, strict=True):
        assert_same_bits(param, kept, "parameter")
    assert kernels.masked_sum_squares(*p.norm_args()).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("anchor", [False, True], ids=["plain", "anchor"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_sum_of_squares(rng, situation, anchor):
    p = problem(rng, situation=situation, anchor=anchor)
    args = p.norm_args()
    sums = kernels.masked_sum_squares(*args)
    assert sums.dtype == torch.float64
    assert sums.shape == (len(p.table.tiles),)
    assert_same_bits(kernels.masked_sum_squares(*args), sums, "second call")
    for tile, (param, start, length, active, slot, *_) in enumerate(p.table.tiles.tolist()):
        if p.grads[param] is None:
            assert sums[tile] == 0
            continue
        first = slot - p.slots(param).start
        squares = expected_gradient(p, param)[first : first + active].double().square()
        torch.testing.assert_close(sums[tile], squares.sum(), rtol=1e-14, atol=0, msg=f"tile {tile}: {start}+{length}")


def test_addresses_are_copied_when_they_change_only():
    _tables.clear()
    tensors = [torch.ones(3, device=DEVICE), torch.ones(2, device=DEVICE), None]
    table = address_table(Tensors(tensors).addresses, DEVICE)
    assert table.tolist() == [tensors[0].data_ptr(), tensors[1].data_ptr(), 0]
    assert address_table(Tensors(tensors).addresses, DEVICE) is table
    tensors[1] = torch.ones(2, device=DEVICE)
    changed = address_table(Tensors(tensors).addresses, DEVICE)
    assert changed.tolist() == [tensors[0].data_ptr(), tensors[1].data_ptr(), 0]
    assert len(_tables) == 2


# --- delta_band -------------------------------------------------------------------------------------------------------

SIZES = [1, 63, 1000, 4097, 70_000]
GROUPS = [0, 1, 0, 1, 1]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass
class Band:
    """The outputs of a `delta_band` call, poisoned before it."""

    words: Tensor
    word_offsets: list[int]
    above: Tensor
    inside: Tensor
    keys: Tensor
    positions: Tensor
    offsets: Tensor
    cursor: Tensor
    nonfinite: Tensor


def key_of(initial: Tensor | None, tuned: Tensor) -> Tensor:
    delta = tuned.float() if initial is None else tuned.float() - initial.float()
    return bits(delta) & 0x7FFFFFFF


def run_band(
    initial: list[Tensor],
    tuned: list[Tensor],
    groups: list[int],
    low: list[int],
    high: list[int],
    *,
    take: list[int] | None = None,
    capacity: int = 1 << 18,
) -> Band:
    sizes = [t.numel() for t in tuned]
    n_tiles = sum(-(-n // TILE) for n in sizes)
    word_offsets = [0, *accumulate(map(bitmap_words, sizes))]

    def integers(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((n,), -77, dtype=dtype, device=DEVICE)

    band = Band(
        integers(word_offsets[-1], torch.int32),
        word_offsets,
        integers(n_tiles),
        integers(n_tiles),
        integers(capacity, torch.int32),
        integers(capacity, torch.int16),
        integers(n_tiles),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )
    kernels.delta_band(
        initial,
        tuned,
        groups,
        torch.tensor(low, device=DEVICE),
        torch.tensor(high, device=DEVICE),
        band.words,
        word_offsets[:-1],
        band.above,
        band.inside,
        None if take is None else torch.tensor(take, device=DEVICE),
        band.keys,
        band.positions,
        band.offsets,
        band.cursor,
        band.nonfinite,
    )
    return band


def check_band(
    band: Band,
    initial: list[Tensor],
    tuned: list[Tensor],
    groups: list[int],
    low: list[int],
    high: list[int],
    *,
    take: list[int] | None = None,
) -> None:
    """Every output against the definition, tile by tile; which tiles were stored is the pass's choice."""
    tile = 0
    taken_space: list[tuple[int, int]] = []
    for i, t in enumerate(tuned):
        keys = key_of(initial[i] if initial else None, t)
        chosen = keys >= high[groups[i]]
        for start in range(0, t.numel(), TILE):
            piece = keys[start : start + TILE]
            found = ((piece >= low[groups[i]]) & (piece < high[groups[i]])).nonzero().view(-1)
            where = f"tensor {i}, tile from {start}"
            assert band.above[tile] == chosen[start : start + TILE].sum(), where
            assert band.inside[tile] == found.numel(), where
            offset = int(band.offsets[tile])
            if found.numel() and offset >= 0:
                span = slice(offset, offset + found.numel())
                taken_space.append((span.start, span.stop))
                assert span.stop <= band.keys.numel(), where
                assert torch.equal(band.keys[span], piece[found]), where
                assert torch.equal(band.positions[span].to(torch.int64) & 0xFFFF, found), where
            if take is not None:
                chosen[start + found[: take[tile]]] = True
            tile += 1
        words = band.words[band.word_offsets[i] : band.word_offsets[i + 1]]
        assert torch.equal(words, IndexSet.from_mask(chosen).bitmap()), f"tensor {i}: bitmap"
    assert int(band.cursor) == int(band.inside.sum())
    taken_space.sort()
    assert all(a[1] <= b[0] for a, b in zip(taken_space, taken_space[1:], strict=False)), "candidates overlap"
    if int(band.cursor) <= band.keys.numel():
        assert sum(b - a for a, b in taken_space) == int(band.cursor), "all candidates are stored where they fit"


def weights(rng: torch.Generator, before: torch.dtype, after: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    initial = [(0.02 * torch.randn(n, generator=rng)).to(before) for n in SIZES]
    tuned = [(i.float() + 1e-3 * torch.randn(i.numel(), generator=rng)).to(after) for i in initial]
    for i, t in zip(initial, tuned, strict=True):
        t[::5] = i[::5].to(after)  # entries that did not move
    return [i.to(DEVICE) for i in initial], [t.to(DEVICE) for t in tuned]


def key_at(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32))


BOUNDS = [key_at(1.0e-3), key_at(1.5e-3)], [key_at(1.1e-3), key_at(1.6e-3)]


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32")])
def test_band_in_every_dtype(rng, before, after):
    initial, tuned = weights(rng, DTYPES[before], DTYPES[after])
    band = run_band(initial, tuned, GROUPS, *BOUNDS)
    check_band(band, initial, tuned, GROUPS, *BOUNDS)
    assert band.inside.sum() > 100
    assert band.nonfinite == 0


def test_band_of_scores(rng):
    _, tuned = weights(rng, torch.float32, torch.float32)
    check_band(run_band([], tuned, GROUPS, *BOUNDS), [], tuned, GROUPS, *BOUNDS)


@pytest.mark.slow
def test_band_of_several_dtypes_and_alignments(rng):
    kinds = [torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float32]
    initial, tuned = weights(rng, torch.float32, torch.float32)
    tuned = [t.to(dtype) for t, dtype in zip(tuned, kinds, strict=True)]
    tuned[2], initial[4] = misaligned(tuned[2]), misaligned(initial[4])
    check_band(run_band(initial, tuned, GROUPS, *BOUNDS), initial, tuned, GROUPS, *BOUNDS)


@pytest.mark.parametrize("take", [[0] * 6, [1, 2, 22, 1000, 33, 4464], [1, 63, 1000, 4097, TILE, 4464]])
def test_band_takes_the_first_ties_of_every_tile(take):
    initial = [torch.zeros(n, device=DEVICE) for n in SIZES]
    tuned = [torch.ones(n, device=DEVICE) for n in SIZES]
    for t in tuned:
        t[1::3] = 0.5
        t[2::3] = 2.0
    bounds = [key_at(1.0)] * 2, [key_at(1.0) + 1] * 2
    band = run_band(initial, tuned, GROUPS, *bounds, take=take, capacity=0)
    check_band(band, initial, tuned, GROUPS, *bounds, take=take)
    assert (band.offsets[band.inside > 0] == -1).all()


@pytest.mark.slow
def test_band_with_every_entry_a_candidate():
    tuned = [torch.full((n,), 1.5, device=DEVICE) for n in (TILE, 63)]
    bounds = [1], [key_at(2.0)]
    band = run_band([], tuned, [0, 0], *bounds)
    check_band(band, [], tuned, [0, 0], *bounds)
    assert band.inside.tolist() == [TILE, 63]


@pytest.mark.parametrize("capacity", [0, 64, 5000])
def test_band_stores_no_candidate_beyond_the_room_for_them(rng, capacity):
    initial, tuned = weights(rng, torch.float32, torch.float32)
    bounds = [1, 1], [key_at(1e-3)] * 2
    band = run_band(initial, tuned, GROUPS, *bounds, capacity=capacity)
    check_band(band, initial, tuned, GROUPS, *bounds)
    assert int(band.cursor) > capacity
    assert (band.offsets == -1).any()


def test_band_keeps_subnormal_deltas():
    tuned = [torch.tensor([0, 1, 2, 0x7FFFFF, 0x800000, 3], dtype=torch.int32, device=DEVICE).view(torch.float32)]
    initial = [torch.zeros(6, device=DEVICE)]
    band = run_band(initial, tuned, [0], [2], [0x7FFFFF])
    check_band(band, initial, tuned, [0], [2], [0x7FFFFF])
    assert band.keys[:2].tolist() == [2, 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_band_reports_values_that_are_not_finite(rng, value):
    initial, tuned = weights(rng, torch.bfloat16, torch.bfloat16)
    tuned[3][4096] = value
    bounds = [key_at(1.0)] * 2, [0x7F800000] * 2
    assert run_band(initial, tuned, GROUPS, *bounds).nonfinite == 1


# --- sample_keys ------------------------------------------------------------------------------------------------------

SAMPLED_SIZES = [0, 1, 15, 16, 17, 1000, 4097]
LARGEST_FINITE_KEY = 0x7F7FFFFF


def run_sample(initial: list[Tensor], tuned: list[Tensor], tensors: Tensor, runs: Tensor) -> Tensor:
    """The keys, after a check that nothing was written beside them."""
    buffer = torch.full((len(runs) + 2, 16), -77, dtype=torch.int32, device=DEVICE)
    kernels.sample_keys(initial, tuned, tensors.to(DEVICE), runs.to(DEVICE), buffer[1:-1])
    assert (buffer[0] == -77).all() and (buffer[-1] == -77).all()
    return buffer[1:-1]


def check_sample(keys: Tensor, initial: list[Tensor], tuned: list[Tensor], tensors: Tensor, runs: Tensor) -> None:
    for i, (tensor, run) in enumerate(zip(tensors.tolist(), runs.tolist(), strict=True)):
        piece = slice(16 * run, 16 * run + 16)
        expected = torch.zeros(16, dtype=torch.int32, device=DEVICE)
        found = key_of(initial[tensor][piece] if initial else None, tuned[tensor][piece])
        expected[: len(found)] = found.clamp(max=LARGEST_FINITE_KEY)
        assert torch.equal(keys[i], expected), f"run {run} of tensor {tensor}"


def sampled(rng: torch.Generator, dtype: torch.dtype, other: torch.dtype) -> list[Tensor]:
    """Weights of SAMPLED_SIZES, the one of 1000 entries in another dtype and the last at an odd address."""
    tensors = [(0.02 * torch.randn(n, generator=rng)).to(dtype).to(DEVICE) for n in SAMPLED_SIZES]
    return [*tensors[:5], tensors[5].to(other), misaligned(tensors[6])]


def drawn(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """150 runs, in more than two programs: neighbours of different tensors, the last whole runs, and some twice."""
    tensors = torch.arange(150) % len(SAMPLED_SIZES)
    last = (torch.tensor(SAMPLED_SIZES) // 16).clamp(min=1)[tensors] - 1
    runs = (torch.rand(150, generator=rng) * (last + 1)).long()
    runs[-len(SAMPLED_SIZES) :] = last[-len(SAMPLED_SIZES) :]
    return tensors, runs


@pytest.mark.parametrize("before, after", [("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32")])
def test_sample_in_every_dtype(rng, before, after):
    initial, tuned = (sampled(rng, DTYPES[name], DTYPES[name]) for name in (before, after))
    where = drawn(rng)
    check_sample(run_sample(initial, tuned, *where), initial, tuned, *where)


def test_sample_of_several_dtypes(rng):
    initial = sampled(rng, torch.float32, torch.bfloat16)
    tuned = sampled(rng, torch.float32, torch.float16)
    initial[3] = initial[3].bfloat16()
    where = drawn(rng)
    check_sample(run_sample(initial, tuned, *where), initial, tuned, *where)


def test_sample_of_scores(rng):
    tuned = sampled(rng, torch.float32, torch.bfloat16)
    where = drawn(rng)
    check_sample(run_sample([], tuned, *where), [], tuned, *where)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_sample_of_extreme_deltas():
    values = [torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-40, 0.0, -0.0]
    tuned = [torch.tensor(values, device=DEVICE)]
    initial = [torch.zeros(10, device=DEVICE)]
    initial[0][4:6] = torch.tensor([-3e38, 1e38])
    first = torch.zeros(1, dtype=torch.int64)
    keys = run_sample(initial, tuned, first, first)
    check_sample(keys, initial, tuned, first, first)
    assert keys[0, :5].tolist() == [LARGEST_FINITE_KEY] * 5
    assert keys[0, 6:8].tolist() == [1, 71362]


# --- candidate_histogram, take_above, take_ties -----------------------------------------------------------------------

# (candidates, group, entries of the tile): none, one, several blocks of candidates, full blocks, a short last tile;
# the candidates of one tile are not stored
CANDIDATE_TILES = [
    (0, 0, TILE),
    (700, 1, TILE),
    (1, 0, TILE),
    (1300, 0, TILE),
    (600, 1, TILE),
    (512, 2, TILE),
    (33, 2, 100),
]
NOT_STORED = 4
LOWEST_KEY = 1_000_000_000


@dataclass
class Candidates:
    """Candidates as `delta_band` stores them, of few different keys; the tiles lie in any order, with gaps between."""

    keys: Tensor
    positions: Tensor
    offsets: Tensor
    inside: Tensor
    tile_groups: Tensor
    words: Tensor
    tile_words: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return self.keys, self.positions, self.offsets, self.inside, self.tile_groups

    def tiles(self) -> list[tuple[int, Tensor, Tensor]]:
        """(group, keys, positions) of the stored candidates of every tile, on the CPU."""
        rows = zip(self.offsets.tolist(), self.inside.tolist(), self.tile_groups.tolist(), strict=True)
        spans = [(slice(offset, offset + n if offset >= 0 else offset), group) for offset, n, group in rows]
        keys, positions = self.keys.cpu().long(), self.positions.cpu().long() & 0xFFFF
        return [(group, keys[span], positions[span]) for span, group in spans]


def candidates(rng: torch.Generator) -> Candidates:
    counts, groups, lengths = map(list, zip(*CANDIDATE_TILES, strict=True))
    n_tiles = len(counts)
    # what lies between the tiles would count as well
    keys = LOWEST_KEY + torch.randint(0, 6, (sum(counts) + 100,), generator=rng, dtype=torch.int32)
    positions = torch.randint(-(1 << 15), 1 << 15, keys.shape, generator=rng, dtype=torch.int16)
    offsets = torch.full((n_tiles,), -1)
    offset = 3
    for tile in torch.randperm(n_tiles, generator=rng).tolist():
        found = torch.randperm(lengths[tile], generator=rng)[: counts[tile]].sort().values
        if counts[tile] > 100:
            found[0], found[-1] = 0, lengths[tile] - 1
        positions[offset : offset + counts[tile]] = found.to(torch.int16)
        if tile != NOT_STORED:
            offsets[tile] = offset
            offset += counts[tile] + 5
    n_words = torch.tensor([bitmap_words(n) for n in lengths])
    words = torch.randint(-(1 << 31), 1 << 31, (int(n_words.sum()),), generator=rng, dtype=torch.int32)
    parts = keys, positions, offsets, torch.tensor(counts), torch.tensor(groups), words, n_words.cumsum(0) - n_words
    return Candidates(*(part.to(DEVICE) for part in parts))


def expected_words(c: Candidates, chosen: list[Tensor]) -> Tensor:
    """The words with the bits of the chosen candidates of every tile set."""
    words = c.words.tolist()
    for first, (_, _, positions), which in zip(c.tile_words.tolist(), c.tiles(), chosen, strict=True):
        for position in positions[which].tolist():
            bit = 1 << position % 32
            words[first + position // 32] |= bit if bit < 1 << 31 else bit - (1 << 32)
    return torch.tensor(words, dtype=torch.int32, device=DEVICE)


def test_histogram_of_candidates(rng):
    c = candidates(rng)
    bins = 4
    # group 0: keys outside; group 1: two keys a bin, some beyond the bins; group 2: the widest bounds that there are
    low = [LOWEST_KEY + 1, LOWEST_KEY - 4, 0]
    high = [LOWEST_KEY + 4, LOWEST_KEY + 6, 0x7FFFFFFF]
    shift = [0, 1, 28]
    expected = torch.arange(3 * bins).view(3, bins)
    for group, keys, _ in c.tiles():
        for bin in range(bins):
            first, last = (low[group] + (b << shift[group]) for b in (bin, bin + 1))
            expected[group, bin] += 2 * ((keys >= first) & (keys < min(last, high[group]))).sum()
    histogram = torch.arange(3 * bins, device=DEVICE).view(3, bins)
    for _ in range(2):
        bounds = (torch.tensor(values, device=DEVICE) for values in (low, high, shift))
        kernels.candidate_histogram(*c.args(), *bounds, histogram)
    assert torch.equal(histogram.cpu(), expected)
    assert (histogram[0, :3] > 100).all() and histogram[0, 3] == 3
    assert (histogram[1:] > 100).any(1).all()


# at the largest key, among the keys and below them; at the ends of all keys, and below
CUTS = [[LOWEST_KEY + 5, LOWEST_KEY + 3, LOWEST_KEY - 1], [0, 0x7FFFFFFF, -1]]


@pytest.mark.parametrize("cut", CUTS)
def test_candidates_above_the_cut_are_taken(rng, cut):
    c = candidates(rng)
    c.keys[::10] = 0
    tiles = c.tiles()
    words = expected_words(c, [keys > cut[group] for group, keys, _ in tiles])
    taken, ties = (torch.full_like(c.inside, -77) for _ in range(2))
    kernels.take_above(*c.args(), torch.tensor(cut, device=DEVICE), c.words, c.tile_words, taken, ties)
    assert_same_bits(c.words, words, "words")
    assert taken.tolist() == [int((keys > cut[group]).sum()) for group, keys, _ in tiles]
    assert ties.tolist() == [int((keys == cut[group]).sum()) for group, keys, _ in tiles]
    assert taken[0] == ties[0] == taken[NOT_STORED] == ties[NOT_STORED] == 0


# none, some in the first block, up to a later block, more than there are
@pytest.mark.parametrize("share", [0.0, 0.1, 0.8, 2.0])
@pytest.mark.parametrize("cut", [[0] * 3, [LOWEST_KEY + i for i in range(3)]], ids=["one key", "several keys"])
def test_ties_are_taken_in_the_order_of_their_positions(rng, cut, share):
    c = candidates(rng)
    if cut[0] == 0:
        c.keys.zero_()
    ties = [keys == cut[group] for group, keys, _ in c.tiles()]
    take = [round(share * int(which.sum())) for which in ties]
    take[NOT_STORED] = 5
    words = expected_words(c, [which & (which.cumsum(0) <= n) for which, n in zip(ties, take, strict=True)])
    changed = not torch.equal(words, c.words)
    kernels.take_ties(
        *c.args(), torch.tensor(cut, device=DEVICE), c.words, c.tile_words, torch.tensor(take, device=DEVICE)
    )
    assert_same_bits(c.words, words, "words")
    assert changed == (share > 0)


@pytest.mark.slow
def test_candidate_passes_follow_the_band_pass(rng):
    """Taking candidates by the cut gives the bitmap of the band pass that has the cut as its bound."""
    initial, tuned = weights(rng, torch.bfloat16, torch.bfloat16)
    low, high = [key_at(1e-4)] * 2, [key_at(3e-3)] * 2
    band = run_band(initial, tuned, GROUPS, low, high)
    cut = band.keys[band.offsets[[2, 4]]].long()  # keys that there are, of either group
    tile_groups = torch.tensor([0, 1, 0, 1, 1, 1], device=DEVICE)
    tile_words = torch.tensor([*band.word_offsets[:5], band.word_offsets[4] + TILE // 32], device=DEVICE)
    c = Candidates(band.keys, band.positions, band.offsets, band.inside, tile_groups, band.words, tile_words)
    taken, ties = (torch.full_like(c.inside, -77) for _ in range(2))
    kernels.take_above(*c.args(), cut, c.words, c.tile_words, taken, ties)
    kernels.take_ties(*c.args(), cut, c.words, c.tile_words, ties)
    direct = run_band(initial, tuned, GROUPS, cut.tolist(), cut.tolist())
    assert_same_bits(c.words, direct.words, "words")
    assert torch.equal(band.above + taken + ties, direct.above)
    assert taken.sum() > 100 and ties.sum() > 0


def test_passes_over_nothing():
    keys, positions = (torch.empty(0, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.int16))
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    bounds = torch.ones(1, dtype=torch.int64, device=DEVICE)
    histogram = torch.full((1, 4), 7, device=DEVICE)
    kernels.sample_keys([], [], none, none, keys.view(0, 16))
    kernels.candidate_histogram(keys, positions, none, none, none, bounds, bounds, bounds, histogram)
    kernels.take_above(keys, positions, none, none, none, bounds, keys, none, none, none)
    kernels.take_ties(keys, positions, none, none, none, bounds, keys, none, none)
    assert histogram.tolist() == [[7] * 4]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_launchers_do_not_wait_for_the_device(rng):
    initial, tuned = weights(rng, torch.float32, torch.bfloat16)
    c = candidates(rng)
    groups = torch.arange(3, device=DEVICE)
    where = [part.to(DEVICE) for part in (torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64))]
    keys = torch.empty(9, 16, dtype=torch.int32, device=DEVICE)
    flags = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    counts = torch.empty(4, 6, dtype=torch.int64, device=DEVICE)
    taken, ties = torch.empty_like(c.inside), torch.empty_like(c.inside)
    word_offsets = [0, *accumulate(map(bitmap_words, SIZES))]
    words = torch.empty(word_offsets[-1], dtype=torch.int32, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.sample_keys(initial, tuned, *where, keys)
        kernels.delta_band(
            initial, tuned, GROUPS, groups, groups, words, word_offsets[:-1], counts[0], counts[1], None,
            c.keys, c.positions, counts[2], flags[0], flags[1],
        )  # fmt: skip
        kernels.candidate_histogram(*c.args(), groups, groups, groups, torch.zeros_like(groups)[:, None])
        kernels.take_above(*c.args(), groups, c.words, c.tile_words, taken, ties)
        kernels.take_ties(*c.args(), groups, c.words, c.tile_words, ties)
    finally:
        torch.cuda.set_sync_debug_mode("default")
