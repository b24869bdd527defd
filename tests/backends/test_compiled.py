"""The compiled kernels, driven through addresses, against plain formulas: all instruction sets give the same bits."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.bits import bits
from torch import Tensor

from ltp_sparse.backends import arguments, reference
from ltp_sparse.backends.arguments import Above, CandidateBins, Histogram, Norm, Sample, Tensors, Ties, Update

_C = pytest.importorskip("ltp_sparse._C", reason="the compiled extension is not built")

TILE = 65536
ISAS = ("generic", "avx2", "avx512")
FULL, BITMAP, LIST16 = 0, 1, 2
ENCODINGS = {"full": FULL, "bitmap": BITMAP, "list16": LIST16}
SIZES = (1, 63, 64, 65, 1000, 4097, 65535, 65536, 65537, 200_000)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available_isas() -> list[str]:
    """Those this machine runs; the instruction set in use stays."""
    current, found = _C.isa(), []
    for name in ISAS:
        try:
            _C.set_isa(name)
            found.append(name)
        except ValueError:
            pass
    _C.set_isa(current)
    return found


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set in turn."""
    current = _C.isa()
    try:
        _C.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_isa(current)


# --- masked_adamw_ ----------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """P parameters with gradients, packed state and tile table; `masks` say what is active."""

    params: list[Tensor]
    grads: list[Tensor | None]
    masks: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    anchor: Tensor | None
    coefficients: Tensor
    tiles: Tensor
    words: Tensor
    positions: Tensor

    @classmethod
    def random(cls, rng, sizes, *, density, encoding, anchor=False, misaligned=0) -> "Problem":
        """Gradients of inactive entries are NaN or infinite. `misaligned`: entries before the first in its memory."""

        def normal(n: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(n + misaligned, generator=rng) * scale)[misaligned:]

        params, grads = [normal(n) for n in sizes], [normal(n, 0.1) for n in sizes]
        masks = [torch.rand(n, generator=rng) < density for n in sizes]
        for grad, mask in zip(grads, masks, strict=True):
            mask[torch.randint(len(mask), (1,), generator=rng)] = True
            poison = torch.tensor([float("nan"), float("inf"), -float("inf")])[torch.arange(len(mask)) % 3]
            grad[~mask] = poison[~mask]
        k = int(sum(mask.sum() for mask in masks))
        step = 3
        row = [
            1,
            0.5,
            1e-3 * 0.1,
            1 - 0.9,
            0.999,
            1 - 0.999,
            1e-3 / (1 - 0.9**step),
            (1 - 0.999**step) ** -0.5,
            1e-8,
            0.01,
            0,
        ]
        return cls(
            params,
            grads,
            masks,
            normal(k, 0.01),
            normal(k, 0.01).square(),
            torch.cat([p[m] for p, m in zip(params, masks, strict=True)]) + (torch.arange(k) % 3 - 1)
            if anchor
            else None,
            torch.tensor([row] * len(sizes), dtype=torch.float64),
            *tile_table(masks, encoding),
        )

    def clone(self) -> "Problem":
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        params = [p.clone() for p in self.params]
        return Problem(
            **fields | {"params": params, "exp_avg": self.exp_avg.clone(), "exp_avg_sq": self.exp_avg_sq.clone()}
        )

    def norm(self) -> tuple:
        """The fields of a `Norm`."""
        index = self.tiles, self.words, torch.empty(0, dtype=torch.int16), self.positions
        return *index, Tensors(self.grads), Tensors(self.params), self.coefficients, False, None, self.anchor

    def update(self, threads: int = 2) -> "Problem":
        """Runs `_C.masked_adamw_`, in place."""
        _C.masked_adamw_(Update(*self.norm(), self.exp_avg, self.exp_avg_sq, None, False), threads)
        return self

    def sum_squares(self, threads: int = 2) -> Tensor:
        out = torch.full((len(self.tiles),), float("nan"), dtype=torch.float64)
        _C.masked_sum_squares(Norm(*self.norm()), out, threads)
        return out

    def state(self) -> tuple[Tensor, Tensor]:
        return self.exp_avg, self.exp_avg_sq

    def slots(self) -> list[slice]:
        ends = np.cumsum([int(mask.sum()) for mask in self.masks]).tolist()
        return [slice(end - int(mask.sum()), end) for end, mask in zip(ends, self.masks, strict=True)]

    def gradient(self, i: int) -> Tensor:
        """The effective gradient of the active entries of parameter i."""
        c = self.coefficients[i].float()
        g = self.grads[i][self.masks[i]] * c[1]
        if self.anchor is not None:
            g = g + c[9] * torch.sign(self.params[i][self.masks[i]] - self.anchor[self.slots()[i]])
        return g

    def expected(self) -> "Problem":
        """The update in eager float32, in the order of operations that the library documents."""
        out = self.clone()
        for i, (mask, slots) in enumerate(zip(self.masks, self.slots(), strict=True)):
            _, _, decay_step, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bc2, eps, _, _ = c = (
                self.coefficients[i].float()
            )
            if self.grads[i] is None or c[0] == 0:
                continue
            g, m, v = self.gradient(i), out.exp_avg[slots], out.exp_avg_sq[slots]
            p = out.params[i][mask]
            m.copy_(m + one_minus_beta1 * (g - m))
            v.copy_(v * beta2 + one_minus_beta2 * (g * g))
            # numpy's square root is IEEE 754's; torch's, from a vector library, is off by the last bit at times
            root = torch.from_numpy(np.sqrt(v.numpy()))
            out.params[i][mask] = p - (decay_step * p + step_size * (m / (root * inv_sqrt_bc2 + eps)))
        return out


def tile_table(masks: list[Tensor], encoding: int) -> tuple[Tensor, Tensor, Tensor]:
    """tiles, words and positions of flat bool masks, all in one encoding; tiles without active entries are left out."""
    rows, words, positions, slot = [], [np.empty(0, np.int32)], [np.empty(0, np.uint16)], 0
    for param, mask in enumerate(masks):
        for start in range(0, len(mask), TILE):
            tile = mask[start : start + TILE].numpy()
            if not tile.any():
                continue
            index = {FULL: 0, BITMAP: sum(map(len, words)), LIST16: sum(map(len, positions))}[encoding]
            rows.append([param, start, len(tile), int(tile.sum()), slot, index, encoding, 0])
            slot += int(tile.sum())
            if encoding == BITMAP:
                packed = np.packbits(np.pad(tile, (0, -len(tile) % 64)), bitorder="little")
                words.append(packed.view(np.int32))
            elif encoding == LIST16:
                positions.append(np.flatnonzero(tile).astype(np.uint16))
    return (
        torch.tensor(rows, dtype=torch.int64),
        torch.from_numpy(np.concatenate(words)),
        torch.from_numpy(np.concatenate(positions).view(np.int16)),
    )


def assert_same_bits(got: Problem, want: Problem) -> None:
    for i, (a, b) in enumerate(zip(got.params, want.params, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"parameter {i}"
    assert torch.equal(bits(got.exp_avg), bits(want.exp_avg))
    assert torch.equal(bits(got.exp_avg_sq), bits(want.exp_avg_sq))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_update_is_the_formula_bit_for_bit(isa, rng, encoding, n):
    problem = Problem.random(rng, [n, 77], density=1.0 if encoding == "full" else 0.3, encoding=ENCODINGS[encoding])
    expected = problem.expected()
    assert_same_bits(problem.update(), expected)


@pytest.mark.parametrize("density", [1e-4, 0.02, 0.12, 0.13, 0.5, 0.99])
@pytest.mark.parametrize("encoding", ["bitmap", "list16"])
def test_update_at_every_density(isa, rng, encoding, density):
    problem = Problem.random(rng, [70_001, 4096], density=density, encoding=ENCODINGS[encoding])
    expected = problem.expected()
    assert_same_bits(problem.update(), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pull_towards_the_anchor_and_memory_that_is_not_aligned(isa, rng, encoding):
    density = 1.0 if encoding == "full" else 0.4
    problem = Problem.random(rng, [5000, 300], density=density, encoding=ENCODINGS[encoding], anchor=True, misaligned=1)
    expected = problem.expected()
    assert_same_bits(problem.update(), expected)


def test_skipped_parameters_stay_as_they_are(isa, rng):
    problem = Problem.random(rng, [500, 600, 700, 800], density=0.5, encoding=BITMAP)
    problem.grads[1] = None
    problem.coefficients[2, 0] = 0
    before, expected = problem.clone(), problem.expected()
    assert_same_bits(problem.update(), expected)
    for i in (1, 2):
        assert torch.equal(bits(problem.params[i]), bits(before.params[i]))
        assert torch.equal(bits(problem.exp_avg[problem.slots()[i]]), bits(before.exp_avg[problem.slots()[i]]))


def test_clustered_masks_mix_empty_and_full_groups(isa, rng):
    problem = Problem.random(rng, [3 * TILE + 70], density=0.0, encoding=BITMAP)
    mask = problem.masks[0]
    mask.zero_()
    mask[100:9000] = True
    mask[TILE + 64 : TILE + 128] = True
    mask[-3:] = True
    problem = Problem(
        **{name: getattr(problem, name) for name in ("params", "masks", "anchor", "coefficients")},
        grads=[torch.randn(len(mask), generator=rng)],
        exp_avg=torch.zeros(int(mask.sum())),
        exp_avg_sq=torch.zeros(int(mask.sum())),
        **dict(zip(("tiles", "words", "positions"), tile_table([mask], BITMAP), strict=True)),
    )
    assert problem.tiles[:, 1].tolist() == [0, TILE, 3 * TILE]
    expected = problem.expected()
    assert_same_bits(problem.update(), expected)


def test_denormals_are_kept_even_if_the_caller_flushes_them(isa, rng):
    problem = Problem.random(rng, [4 * TILE], density=0.5, encoding=BITMAP)
    for grad in problem.grads:
        grad.mul_(1e-38)
    problem.exp_avg.mul_(1e-38)
    expected = problem.expected()
    assert bool((expected.exp_avg.abs() < torch.finfo(torch.float32).tiny).any())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        problem.update()
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(problem, expected)


@pytest.mark.parametrize("anchor", [False, True], ids=["plain", "pull"])
def test_sum_of_squares(isa, rng, anchor):
    problem = Problem.random(rng, [70_001, 63, 1000], density=0.3, encoding=BITMAP, anchor=anchor)
    problem.grads[1] = None
    problem.coefficients[2, 0] = 0  # APPLY is for the update, not for the norm
    sums = problem.sum_squares()
    squares = problem.gradient(0).double().square()
    first = int(problem.tiles[0, 3])
    expected = [squares[:first].sum(), squares[first:].sum(), 0.0, problem.gradient(2).double().square().sum()]
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_sum_of_squares_has_the_same_bits_everywhere(rng):
    """Whatever the encoding, the instruction set and the number of threads."""
    state = rng.get_state()
    results = []
    current = _C.isa()
    for name in available_isas():
        _C.set_isa(name)
        for encoding in (BITMAP, LIST16):
            for threads in (1, 3):
                rng.set_state(state)
                problem = Problem.random(rng, [TILE + 7000, 900], density=0.3, encoding=encoding)
                results.append(problem.sum_squares(threads))
    _C.set_isa(current)
    assert len(results) >= 4
    assert all(torch.equal(r, results[0]) for r in results)


def test_threads_do_not_change_the_update(isa, rng):
    problem = Problem.random(rng, [300_000, 5, 100_000, 12_345], density=0.2, encoding=BITMAP)
    alone = problem.clone().update(threads=1)
    for threads in (2, 5):
        assert_same_bits(problem.clone().update(threads), alone)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[(0, 1), (0, -1), (1, -1), (1, 1), (2, 0), (2, 101), (2, TILE + 1), (3, 0), (3, 101), (4, -1), (4, 1)],
        *[(5, -1), (5, 2), (6, 3), (6, 0), (6, 2), (7, -1), *((column, 2**63 - 1) for column in range(8))],
    ],
)
def test_impossible_tiles_are_refused(rng, column, value):
    problem = Problem.random(rng, [100], density=0.5, encoding=BITMAP)
    problem.tiles[0, column] = value
    before = problem.clone()
    with pytest.raises(ValueError, match="row 0 of the tile table"):
        problem.update()
    assert_same_bits(problem, before)


@pytest.mark.parametrize(
    ("encoding", "spoil"),
    [
        (LIST16, lambda p: p.positions[-1:].fill_(100)),
        (LIST16, lambda p: p.positions[-5:-4].fill_(-1)),  # 65,535
        (BITMAP, lambda p: p.words[-1:].bitwise_or_(1 << 20)),
        (BITMAP, lambda p: p.words[-4:-3].fill_(-1)),  # slots past the end
        (BITMAP, lambda p: p.words[-4:-3].fill_(0)),
    ],
    ids=["list past the end", "list in the middle", "bits past the end", "more bits", "fewer bits"],
)
def test_a_tile_that_its_index_does_not_fit_is_left_alone(isa, rng, encoding, spoil):
    """The second of two parameters keeps its bits, and so does all around it; the first is updated."""
    problem = Problem.random(rng, [1000, 100], density=0.5, encoding=encoding)
    k, own = len(problem.exp_avg), problem.slots()[1]
    memory = torch.randn(3, 70_000, generator=rng)
    problem.params[1] = memory[0, 1000:1100].copy_(problem.params[1])
    problem.exp_avg, problem.exp_avg_sq = (row[:k].copy_(t) for row, t in zip(memory[1:], problem.state(), strict=True))
    expected, before = problem.clone().update(), memory.clone()
    spoil(problem)
    for call in (problem.sum_squares, problem.update):
        with pytest.raises(ValueError, match="row 1 of the tile table does not fit its list or bitmap"):
            call()
    assert torch.equal(bits(problem.params[0]), bits(expected.params[0]))
    assert torch.equal(memory[0], before[0])
    assert torch.equal(memory[1:, own.start :], before[1:, own.start :])


def test_arguments_that_do_not_fit_are_refused(rng):
    problem = Problem.random(rng, [100], density=0.5, encoding=BITMAP)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        problem.update(threads=0)
    problem.grads.append(None)
    with pytest.raises(ValueError, match="one gradient address .* got 2 for 1"):
        problem.update()
    with pytest.raises(ValueError, match="generic, avx2 or avx512, got sse9"):
        _C.set_isa("sse9")


# --- topk_delta -------------------------------------------------------------------------------------------------------


def keys_of(initial: Tensor | None, tuned: Tensor) -> Tensor:
    delta = tuned.float() if initial is None else tuned.float() - initial.float()
    return delta.abs().view(torch.int32).long()


def pairs(rng, sizes, initial_dtype=torch.float32, tuned_dtype=torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before and after tuning, a third of them unmoved, with tiny, denormal and huge deltas among them."""
    initial = [(torch.randn(n, generator=rng) * 0.02).to(initial_dtype) for n in sizes]
    tuned = []
    for a in initial:
        delta = torch.randn(len(a), generator=rng) * 1e-3 * (torch.rand(len(a), generator=rng) > 0.33)
        b = (a.float() + delta).to(tuned_dtype)
        b[::97] = (torch.rand(len(b[::97]), generator=rng) * 1e-6).to(tuned_dtype)
        a[::97] = 0
        b[::89] = torch.finfo(tuned_dtype).max
        tuned.append(b)
    return initial, tuned


def histogram(initial, tuned, groups, prefixes=(), threads=2) -> tuple[Tensor, bool]:
    """Counts on top of 5 in every bin, to see that they are added."""
    bins = torch.full((max(groups) + 1, 65536 if prefixes else 32768), 5, dtype=torch.int64)
    nonfinite = torch.zeros(1, dtype=torch.int64)
    upper = torch.tensor(prefixes) if prefixes else None
    _C.delta_histogram(Histogram(Tensors(initial), Tensors(tuned), groups, upper, bins, nonfinite), threads)
    return bins - 5, bool(nonfinite)


def all_keys(initial, tuned) -> list[Tensor]:
    return [keys_of(initial[i] if initial else None, t) for i, t in enumerate(tuned)]


MIXES = [(a, b) for a in (None, *DTYPES) for b in DTYPES]


@pytest.mark.parametrize(("initial_dtype", "tuned_dtype"), MIXES, ids=lambda d: str(d).removeprefix("torch."))
def test_histograms(isa, rng, initial_dtype, tuned_dtype):
    initial, tuned = pairs(rng, (1, 63, 64, 1000, 70_001), initial_dtype or torch.float32, tuned_dtype)
    initial = initial if initial_dtype else []
    groups = [0, 1, 0, 2, 1]
    by_group = [
        torch.cat([k for k, g in zip(all_keys(initial, tuned), groups, strict=True) if g == group])
        for group in range(3)
    ]
    by_group = [keys[keys > 0] for keys in by_group]

    counts, nonfinite = histogram(initial, tuned, groups)
    assert torch.equal(counts, torch.stack([torch.bincount(k >> 16, minlength=32768) for k in by_group]))
    assert not nonfinite

    prefixes = [int((k >> 16).mode().values) for k in by_group]
    counts, nonfinite = histogram(initial, tuned, groups, prefixes)
    low = [k[k >> 16 == p] & 0xFFFF for k, p in zip(by_group, prefixes, strict=True)]
    assert torch.equal(counts, torch.stack([torch.bincount(k, minlength=65536) for k in low]))
    assert not nonfinite


def test_zero_keys_are_counted_nowhere(isa, rng):
    """Keys below 2^16 share their first digit with zero."""
    tuned = torch.zeros(5000)
    tuned[::7] = bits_to_float(torch.arange(1, 716))
    counts, _ = histogram([], [tuned], [0])
    assert counts[0, 0] == 715 and counts.sum() == 715
    counts, _ = histogram([], [tuned], [0], prefixes=[0])
    assert torch.equal(counts[0, :716], torch.ones(716, dtype=torch.int64).index_fill(0, torch.tensor(0), 0))
    assert counts.sum() == 715


def bits_to_float(values: Tensor) -> Tensor:
    return values.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_nonfinite_deltas_are_reported(isa, rng, value, dtype):
    initial, tuned = pairs(rng, (70_001,), dtype, dtype)
    tuned[0][70_000] = value
    assert histogram(initial, tuned, [0])[1]
    assert histogram(initial, tuned, [0], prefixes=[3])[1]
    band = Band(initial, tuned, [0], [1000], [2000])
    assert band.nonfinite
    band.check()


class Band:
    """A run of `_C.delta_band` over poisoned outputs."""

    def __init__(self, initial, tuned, groups, low, high, *, take=None, capacity=10_000_000, threads=2):
        self.initial, self.tuned, self.groups, self.low, self.high = initial, tuned, groups, low, high
        self.tile_sizes = [min(TILE, t.numel() - s) for t in tuned for s in range(0, t.numel(), TILE)]
        self.word_offsets = np.cumsum([0] + [2 * -(-t.numel() // 64) for t in tuned]).tolist()
        n_tiles = len(self.tile_sizes)
        self.take, self.capacity = take, min(capacity, sum(self.tile_sizes))
        self.words = torch.full((self.word_offsets[-1],), 0x5A5A5A5A, dtype=torch.int32)
        self.above, self.inside, self.offsets = (torch.full((n_tiles,), -7, dtype=torch.int64) for _ in range(3))
        self.keys = torch.full((self.capacity,), -7, dtype=torch.int32)
        self.positions = torch.full((self.capacity,), -7, dtype=torch.int16)
        self.cursor = torch.zeros(1, dtype=torch.int64)
        take_tensor = torch.tensor(take or [0], dtype=torch.int64)
        self.nonfinite = torch.zeros(1, dtype=torch.int64)
        record = arguments.Band(
            Tensors(initial),
            Tensors(tuned),
            groups,
            torch.tensor(low),
            torch.tensor(high),
            self.words,
            self.word_offsets[:-1],
            self.above,
            self.inside,
            take_tensor if take else None,
            self.keys,
            self.positions,
            self.offsets,
            self.cursor,
            self.nonfinite,
        )
        _C.delta_band(record, threads)

    def check(self, stored: bool = True) -> None:
        """Every output against its definition, tile by tile."""
        tile = 0
        for i, keys in enumerate(all_keys(self.initial, self.tuned)):
            low, high = self.low[self.groups[i]], self.high[self.groups[i]]
            packed = self.words[self.word_offsets[i] : self.word_offsets[i + 1]].numpy().view(np.uint8)
            mask = torch.from_numpy(np.unpackbits(packed, bitorder="little")).bool()
            assert not mask[len(keys) :].any()
            for start in range(0, len(keys), TILE):
                piece = keys[start : start + TILE]
                above, inside = piece >= high, ((piece >= low) & (piece < high)).nonzero().view(-1)
                assert (self.above[tile], self.inside[tile]) == (above.sum(), len(inside))
                if self.take:
                    above[inside[: self.take[tile]]] = True
                assert torch.equal(mask[start : start + len(piece)], above)
                offset = int(self.offsets[tile])
                if offset >= 0 and len(inside):
                    assert torch.equal(self.keys[offset : offset + len(inside)].long(), piece[inside])
                    assert torch.equal(self.positions[offset : offset + len(inside)].long() & 0xFFFF, inside)
                else:
                    assert not len(inside) or not stored
                tile += 1
        assert int(self.cursor) == int(self.inside.sum())


@pytest.mark.parametrize(("initial_dtype", "tuned_dtype"), MIXES, ids=lambda d: str(d).removeprefix("torch."))
def test_band(isa, rng, initial_dtype, tuned_dtype):
    initial, tuned = pairs(rng, (1, 63, 64, 1000, 70_001), initial_dtype or torch.float32, tuned_dtype)
    keys = torch.cat(all_keys(initial if initial_dtype else [], tuned)).sort().values
    low, high = int(keys[int(0.7 * len(keys))]), int(keys[int(0.75 * len(keys))]) + 1
    band = Band(initial if initial_dtype else [], tuned, [0, 1, 0, 1, 0], [low, low + 1], [high, high + 1])
    assert not band.nonfinite and band.inside.sum() > 0
    band.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_value_of_the_16_bit_dtypes(isa, dtype):
    tuned = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    tuned = tuned[~tuned.isnan()]
    band = Band([], [tuned], [0], [1], [2**31])
    assert band.nonfinite and int(band.inside) == len(tuned) - 2  # all but the two zeros
    band.check()


@pytest.mark.parametrize("n", SIZES)
def test_band_at_every_size(isa, rng, n):
    initial, tuned = pairs(rng, (n, 77))
    high = int(keys_of(initial[0], tuned[0]).median()) + 1
    Band(initial, tuned, [0, 0], [1], [high]).check()
    Band(initial, tuned, [0, 0], [high], [high]).check()
    Band(initial, tuned, [0, 0], [1], [2**31]).check()


def test_band_takes_the_first_of_the_ties(isa, rng):
    """All moved entries have one of two deltas; take sets the bits of the earliest inside the band."""
    levels = torch.tensor([0.0, 0.25, 0.5])
    tuned = [levels[torch.randint(3, (n,), generator=rng)] for n in (100, 2 * TILE + 1000)]
    quarter = int(keys_of(None, torch.tensor(0.25)))
    inside = [int((t[s : s + TILE] == 0.25).sum()) for t in tuned for s in range(0, t.numel(), TILE)]
    for take in ([0, inside[1], 5, 1], [inside[0], 17_000, 0, inside[3]]):
        Band([], tuned, [0, 0], [quarter], [quarter + 1], take=take).check()


@pytest.mark.parametrize("threads", [1, 2])
def test_band_without_room_for_all_candidates(isa, rng, threads):
    initial, tuned = pairs(rng, (3 * TILE, 1000))
    everything = Band(initial, tuned, [0, 0], [1], [2**31], threads=threads)
    everything.check()
    room = int(everything.inside[0] + everything.inside[1])
    some = Band(initial, tuned, [0, 0], [1], [2**31], capacity=room, threads=threads)
    some.check(stored=False)
    assert 0 < int((some.offsets >= 0).sum()) < len(some.offsets)
    none = Band(initial, tuned, [0, 0], [1], [2**31], capacity=0, threads=threads)
    none.check(stored=False)
    assert (none.offsets[none.inside > 0] == -1).all()


def test_the_passes_have_the_same_bits_everywhere(rng):
    """Counts, bitmaps and candidates do not depend on threads or on the instruction set."""
    initial, tuned = pairs(rng, (3 * TILE + 5, 70_000, 999))
    current, results = _C.isa(), []
    for name in available_isas():
        _C.set_isa(name)
        for threads in (1, 4):
            counts, _ = histogram(initial, tuned, [0, 1, 0], threads=threads)
            band = Band(initial, tuned, [0, 1, 0], [10_000_000, 1], [900_000_000, 800_000_000], threads=threads)
            band.check()
            results.append((counts, band.words, band.above, band.inside))
    _C.set_isa(current)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_keys_are_those_of_the_reference(rng, dtype, isa):
    """Of both sides and of one, of tensors shorter than a run, beside each other's dtypes."""
    if isa not in available_isas():
        pytest.skip(f"this processor has no {isa}")
    initial, tuned = pairs(rng, (5, 0, 16, 1000), torch.float32, dtype)
    initial[3] = initial[3].to(dtype)
    tuned[3][640:650] = torch.inf
    tensors, runs = torch.tensor([0, 2, 3, 3, 3, 3]), torch.tensor([0, 0, 40, 61, 0, 17])
    current = _C.isa()
    for sides in ((initial, tuned), ([], tuned)):
        wanted = torch.empty(6, arguments.RUN, dtype=torch.int32)
        reference.sample_keys(Sample(*map(Tensors, sides), tensors, runs, wanted))
        _C.set_isa(isa)
        for threads in (1, 3):
            found = torch.full_like(wanted, 77)
            _C.sample_keys(Sample(*map(Tensors, sides), tensors, runs, found), threads)
            assert torch.equal(found, wanted)
        _C.set_isa(current)
    assert (wanted[0, 5:] == 0).all() and (wanted == reference.NONFINITE_KEY - 1).any()


@pytest.mark.parametrize(("tensor", "run"), [(2, 0), (-1, 0), (0, 1), (1, 6), (1, -1)])
def test_samples_beyond_the_tensors_are_refused(rng, tensor, run):
    _, tuned = pairs(rng, (5, 100))
    tensors, runs, keys = torch.tensor([tensor]), torch.tensor([run]), torch.empty(16, dtype=torch.int32)
    with pytest.raises(ValueError, match="sample_keys: (tensor|run) -?[0-9]"):
        _C.sample_keys(Sample(Tensors(), Tensors(tuned), tensors, runs, keys), 1)


def test_passes_refuse_what_does_not_fit(rng):
    initial, tuned = pairs(rng, (100,))
    sides, bins, flag = (Tensors(initial), Tensors(tuned)), torch.zeros(2, 32768, dtype=torch.int64), torch.tensor([0])
    with pytest.raises(ValueError, match="group 2 of 2"):
        _C.delta_histogram(Histogram(*sides, [2], None, bins, flag), 1)
    with pytest.raises(ValueError, match=r"prefix must be in \[0, 32768\), got 32768"):
        _C.delta_histogram(Histogram(*sides, [0], torch.tensor([32768]), bins, flag), 1)
    with pytest.raises(ValueError, match="a group for each of the 1 tensors"):
        _C.delta_histogram(Histogram(*sides, [0, 0], None, bins, flag), 1)
    with pytest.raises(ValueError, match="1 <= low <= high, got 0 and 5"):
        Band(initial, tuned, [0], [0], [5])


def test_candidates_that_lead_out_are_left_alone(isa):
    """Two tiles; whatever is wrong with the second, the first is served, and nothing else is written."""
    keys, positions = torch.tensor([5, 9, 5, 9], dtype=torch.int32), torch.tensor([0, 40, 1, 33], dtype=torch.int16)
    wrong = {
        "offsets": (-1, 3, 2**63 - 1),
        "inside": (-1, 3, TILE + 1, 2**63 - 1),
        "groups": (-1, 1, 2**62),
        "tile_words": (-1, 3, 2**63 - 1),
    }
    for name, values in wrong.items():
        for value in values:
            tiles = {"offsets": [0, 2], "inside": [2, 2], "groups": [0, 0], "tile_words": [0, 2]}
            tiles[name][1] = value
            tiles = {name: torch.tensor(numbers) for name, numbers in tiles.items()}
            candidates = keys, positions, *(tiles[name] for name in ("offsets", "inside", "groups"))
            words, taken, ties = torch.full((6,), 64, dtype=torch.int32), *torch.full((2, 2), 7)
            if name != "tile_words":
                bins = torch.zeros(18, dtype=torch.int64)
                with pytest.raises(ValueError, match="candidate_histogram: the numbers of tile 1"):
                    bounds = torch.tensor([[1], [17], [0]])
                    _C.candidate_histogram(CandidateBins(*candidates, *bounds, bins[1:17].view(1, 16)), 2)
                assert not bins.any()
            of_words = words[1:5], tiles["tile_words"]
            with pytest.raises(ValueError, match="take_above: the numbers of tile 1"):
                _C.take_above(Above(*candidates, torch.tensor([6]), *of_words, taken, ties), 2)
            assert words.tolist() == [64, 64, 64 | 1 << 8, 64, 64, 64], (name, value)
            assert (taken.tolist(), ties.tolist()) == ([1, 0], [0, 0])
            with pytest.raises(ValueError, match="take_ties: the numbers of tile 1"):
                _C.take_ties(Ties(*candidates, torch.tensor([5]), *of_words, taken.fill_(9)), 2)
            assert words.tolist() == [64, 65, 64 | 1 << 8, 64, 64, 64], (name, value)


def test_a_cursor_that_leads_out_stores_nothing(isa):
    for start in (-3, 2, 2**63 - 1):
        tuned, words, counts = torch.ones(4), torch.zeros(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
        keys, positions = torch.full((7,), 3, dtype=torch.int32), torch.full((7,), 3, dtype=torch.int16)
        counts[3] = start
        above, inside, offsets, cursor = counts.split(1)
        stored = keys[1:6], positions[1:6], offsets, cursor, torch.zeros(1, dtype=torch.int64)
        bounds = torch.tensor([1]), torch.tensor([2**31])
        pair = Tensors(), Tensors([tuned]), [0]
        _C.delta_band(arguments.Band(*pair, *bounds, words, [0], above, inside, None, *stored), 1)
        assert counts[1:3].tolist() == [4, -1] and (keys == 3).all() and (positions == 3).all()


# --- processes --------------------------------------------------------------------------------------------------------

FORK = """
import os, sys
import numpy as np
import torch
import ltp_sparse._C as c
from ltp_sparse.backends.arguments import Histogram, Tensors
from ltp_sparse.backends.compiled import gomp_parallel

if sys.argv[1] == "openmp":
    address = gomp_parallel()
    assert address != 0
    c.use_openmp(address)

def count(tuned, threads):
    bins = np.zeros((1, 32768), np.int64)
    found = torch.from_numpy(bins), torch.from_numpy(np.zeros(1, np.int64))
    c.delta_histogram(Histogram(Tensors(), Tensors([torch.from_numpy(tuned)]), [0], None, *found), threads)
    return int(bins.sum())

tuned = np.ones(2_000_000, np.float32)
assert count(tuned, 4) == tuned.size
child = os.fork()
if child == 0:
    os._exit(0 if count(tuned, 4) == tuned.size else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert count(tuned, 4) == tuned.size
print("forked")
"""

GUARDED = """
import ctypes, itertools, mmap
import numpy as np
import torch
import ltp_sparse._C as c
from ltp_sparse.backends.arguments import Band, Histogram, Norm, Pack, Tensors, Update

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
keep = []

def guarded(values):
    "A copy whose last byte is the last before an unreadable page."
    values = np.ascontiguousarray(values)
    pages = -(-values.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    copy = np.frombuffer(memory, values.dtype, values.size, pages * PAGE - values.nbytes)
    copy[:] = values
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    return torch.from_numpy(copy.view(np.int16) if copy.dtype == np.uint16 else copy).view(values.shape)

isas = []
for isa in ("generic", "avx2", "avx512"):
    try:
        c.set_isa(isa)
        isas.append(isa)
    except ValueError:
        pass
rng = np.random.default_rng(0)
coefficients = guarded(np.array([[1, 1, 1, 0.1, 0.999, 0.001, 0.01, 1, 1e-8, 0.01, 7]]))
ranks = torch.empty(0, dtype=torch.int16)
for isa, n, density, encoding in itertools.product(isas, (1, 65, 1000, 4096, 65535), (0.1, 0.6, 1), (0, 1, 2)):
    c.set_isa(isa)
    mask = rng.random(n) < density
    mask[-1] = True
    if encoding == 0 and not mask.all():
        continue
    k = int(mask.sum())
    param, grad = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    anchor = guarded(np.zeros(k, np.float32))
    words = guarded(np.packbits(np.pad(mask, (0, -n % 64)), bitorder="little").view(np.int32))
    positions = guarded(np.flatnonzero(mask).astype(np.uint16))
    tiles, out = guarded(np.array([[0, 0, n, k, 0, 0, encoding, 0]])), guarded(np.zeros(1))
    index = tiles, words, ranks, positions
    for code, coded, master, packed, stochastic in (
        (0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 0, 1, 0), (1, 0, 0, 0, 1), (2, 0, 1, 0, 0), (2, 1, 1, 1, 0),
    ):
        halves = np.float32 if code == 0 else np.float16
        weight, dense = guarded(param.astype(halves)), guarded(grad.astype(halves))
        if code == 1:  # numpy has no bfloat16
            weight, dense = weight.view(torch.bfloat16), dense.view(torch.bfloat16)
        slots = guarded(np.zeros(k, np.float32))
        c.masked_pack_(Pack(*index, Tensors([dense]), slots, False), 1)
        given = slots if packed else dense
        types = (np.int8, np.uint8) if coded else (np.float32, np.float32)
        first, second = (guarded(np.zeros(k, dtype)) for dtype in types)
        scales = guarded(np.zeros(2 * -(-k // 256), np.float32))
        exact = guarded(np.ones(k, np.float32))
        exact = exact if master else None
        norm = *index, Tensors([given]), Tensors([weight]), coefficients, bool(packed), exact, anchor
        c.masked_sum_squares(Norm(*norm), out, 1)
        c.masked_adamw_(Update(*norm, first, second, scales.view(-1, 2) if coded else None, bool(stochastic)), 1)
        assert slots.all() and second.any() and scales.all() == bool(coded)
    for code, dtype in ((0, np.float32), (2, np.float16)):
        a, b = guarded(param.astype(dtype)), guarded(grad.astype(dtype))
        bins, counts, cursor = (guarded(np.zeros(size, np.int64)) for size in (32768, 3, 1))
        pair, flag = (Tensors([a]), Tensors([b]), [0]), guarded(np.zeros(1, np.int64))
        c.delta_histogram(Histogram(*pair, None, bins.view(1, -1), flag), 1)
        assert bins.sum() > 0.9 * n
        moved = int(bins.sum())
        keys, places = guarded(np.zeros(moved, np.int32)), guarded(np.zeros(moved, np.uint16))
        above, inside, offsets = counts.split(1)
        bounds = torch.tensor([1]), torch.tensor([2**31])
        stored = keys, places, offsets, cursor, flag
        c.delta_band(Band(*pair, *bounds, words, [0], above, inside, None, *stored), 1)
        assert counts[1] == moved and keys.all()
print("in bounds")
"""


def run_script(script: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openmp", "threads"])
def test_a_forked_child_has_threads_of_its_own(runtime):
    result = run_script(FORK, runtime)
    assert (result.returncode, result.stdout) == (0, "forked\n"), result.stderr


@pytest.mark.slow
def test_no_kernel_touches_memory_past_its_arrays():
    result = run_script(GUARDED)
    assert (result.returncode, result.stdout) == (0, "in bounds\n"), result.stderr


@pytest.mark.parametrize(
    ("value", "said"), [("generic", "generic"), ("sse9", "must be generic, avx2 or avx512, got sse9")]
)
def test_the_environment_chooses_the_instruction_set(monkeypatch, value, said):
    monkeypatch.setenv("LTP_SPARSE_ISA", value)
    result = run_script("import ltp_sparse._C as c; print(c.isa())")
    assert said in result.stdout + result.stderr
    assert (result.returncode == 0) == (value == "generic")
