"""The CUDA kernels' thread blocks, compiled for the CPU and run thread by thread: the bits of the reference.

This tests everything but what needs a GPU: races, the launch, and the compiler's own arithmetic.
"""

import ctypes
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.backends import Unpacked, using
from helpers.bits import DTYPES, bits
from helpers.builds import built
from helpers.selection_passes import (
    BANDS,
    KINDS,
    SELECTION_GROUPS,
    SELECTION_SIZES,
    TAKE,
    BandOutputs,
    key_at,
    pairs_of,
)
from helpers.selections import DELTAS, random_case, tune
from helpers.update_cases import MODES, rows_of
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.backends import choice, cuda, reference
from ltp_sparse.backends.arguments import NORM_GROUP, Pack, Sample, Sampled, Tensors, Total, Update
from ltp_sparse.backends.reference import Coefficient
from ltp_sparse.backends.work_items import WORK_ITEM, work_items
from ltp_sparse.ops import masked_pack_, masked_sum_squares, routes, samples, sources
from ltp_sparse.testing import UpdateProblem, update_problem
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE, unpack_bits
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.layout import Layout
from ltp_sparse.tickets.tile_table import Column, tile_indices

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZES = (1, 63, 257, 1000, 4096, 4097, 65_537, 70_000)
CASES = [
    pytest.param(dtype, grad_dtype, mode, id=f"{name}-grad_{grad_name}-{mode_name}")
    for (name, dtype), (grad_name, grad_dtype), (mode_name, mode) in itertools.product(
        DTYPES.items(), DTYPES.items(), MODES.items()
    )
    if grad_dtype in (dtype, torch.float32)
    and (dtype == torch.bfloat16 or not mode.get("stochastic"))
    and (dtype != torch.float32 or not mode.get("master"))
]


@pytest.fixture(scope="module")
def static_selection():
    pytest.importorskip("pybind11")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import static_selection
    return static_selection


@pytest.fixture(scope="module")
def library(static_selection):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    import pybind11

    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.parent.name != "cpu"]
    sources += [ROOT / "tests" / "backends" / "cuda_emulation.cpp", Path(static_selection.__file__)]
    folder = built("cuda-emulation", static_selection.build, sources, pybind11.__version__)
    module, counters = static_selection.load(folder / "emulation.so")
    yield SimpleNamespace(
        module=module, counters=counters, take_traps=counters.take_traps, set_histogram=counters.set_histogram,
        wrong_codes=counters.wrong_codes,
    )  # fmt: skip
    assert counters.take_traps() == counters.blocks_beyond_their_bins() == 0


class Emulation:
    """Launches of the operations on CPU tensors."""

    def __init__(self, library, problem: UpdateProblem, rows: Tensor, anchor: Tensor | None = None) -> None:
        self.module, self.problem = library.module, problem
        table = problem.table.with_ranks()
        packed = isinstance(problem.grads, Tensor)
        self.index = table.tiles, table.words, table.ranks, table.positions
        self.record = Update(
            *self.index, Tensors([problem.grads] if packed else problem.grads), Tensors(problem.params), rows, packed,
            problem.master, anchor, problem.exp_avg, problem.exp_avg_sq, problem.scales, problem.stochastic,
        )  # fmt: skip
        self.items = work_items(self.record)

    def sum_squares(self) -> Tensor:
        out = torch.zeros(len(self.problem.table.tiles), TILE // WORK_ITEM, dtype=torch.float64)
        self.module.masked_sum_squares(self._prepared(), self.items, out, 0)
        return out.sum(1)

    def norm(self, total: Total) -> None:
        self.module.gradient_norm(self._prepared(), self.items, total, 0)

    def update(self) -> None:
        self.module.masked_adamw_(self._prepared(), self.items, 0)

    def _prepared(self) -> Update:
        record = replace(self.record, prepared=torch.empty(len(self.problem.params), 8, dtype=torch.int64))
        self.module.prepare_norm(record, 0)
        return record

    def pack(self, out: Tensor, accumulate: bool) -> None:
        pack = Pack(*self.index, Tensors(self.problem.grads), out, accumulate)
        prepared = torch.empty(len(self.problem.grads), 8, dtype=torch.int64)
        self.module.prepare_pack(pack, prepared, 0)
        self.module.masked_pack_(pack, prepared, self.items, 0)


def problem_of(density: float, **options) -> UpdateProblem:
    problem = update_problem({f"p{n}": (n,) for n in SIZES}, density=density, **options)
    for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
        grad[~problem.ticket.mask(name)] = float("nan")
    return problem


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0], ids=["list16", "bitmap", "full"])
@pytest.mark.parametrize(("dtype", "grad_dtype", "mode"), CASES)
def test_bits_of_the_reference(library, dtype, grad_dtype, mode, density):
    for packed, with_anchor in itertools.product((False, True), repeat=2):
        options = {"dtype": dtype, "grad_dtype": grad_dtype, **mode}
        wanted, found = problem_of(density, **options), problem_of(density, **options)
        anchor = torch.linspace(-0.03, 0.03, found.table.k) if with_anchor else None
        with using("reference"):
            if packed:
                flat = torch.full((found.table.k,), 0.5)
                emulated = flat.clone()
                for accumulate in (False, True):
                    masked_pack_(wanted.grads, flat, wanted.table, accumulate=accumulate)
                    Emulation(library, found, rows_of(found, 1)).pack(emulated, accumulate)
                assert torch.equal(bits(flat), bits(emulated))
                wanted.grads = found.grads = flat
            else:
                wanted.grads[1] = found.grads[1] = None
            for step in (1, 2):
                rows = rows_of(found, step)
                emulation = Emulation(library, found, rows, anchor)
                sums = masked_sum_squares(wanted.params, wanted.grads, wanted.table, rows, anchor, master=wanted.master)
                torch.testing.assert_close(emulation.sum_squares(), sums, rtol=1e-12, atol=0)
                emulation.update()
                wanted.step(rows, anchor)
        for number, (a, b) in enumerate(zip(found.tensors(), wanted.tensors(), strict=True)):
            same = torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b)))
            assert same, (packed, with_anchor, number)


@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_random_bits_of_vectors_at_any_place(library, states):
    """A part of a parameter that is cut anywhere: aligned in memory, but not in the order of all entries."""
    n, problems = 4099, []
    for _ in range(2):
        problem = update_problem({"p": (n,)}, density=1.0, dtype=torch.bfloat16, states=states, stochastic=True)
        tiles = problem.table.tiles.clone()
        tiles[:, Column.START] = 1
        problem.table = replace(problem.table, tiles=tiles, sizes=(n + 1,))
        for tensors in (problem.params, problem.grads):
            own = tensors[0].detach()
            tensors[:] = [torch.cat([torch.zeros(4, dtype=own.dtype), own])[3:]]
            assert tensors[0][1:].data_ptr() % 8 == 0
        problems.append(problem)
    wanted, found = problems
    rows = found.coefficients.clone()
    rows[:, Coefficient.ROUNDING_KEY] = 12_345
    Emulation(library, found, rows).update()
    with using("reference"):
        wanted.step(rows)
    for a, b in zip(found.tensors(), wanted.tensors(), strict=True):
        assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b)))


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0], ids=["list16", "bitmap", "full"])
def test_norm_over_two_launches(library, density):
    """The tiles of the second one come after those of the first, in groups that both share."""
    problems = [
        update_problem({f"p{n}": (n,) for n in sizes}, density=density, seed=len(sizes))
        for sizes in (range(300, 380), (1, 70_000, 131_072))
    ]
    emulations = [Emulation(library, problem, rows_of(problem, 1)) for problem in problems]
    launches = [len(emulation.record.tiles) for emulation in emulations]
    tiles, groups = sum(launches), -(-sum(launches) // NORM_GROUP)
    sums = torch.full((tiles * cuda.SUMS_PER_TILE + groups,), float("nan"), dtype=torch.float64)
    arrived = torch.zeros(1 + groups + tiles, dtype=torch.int32)
    norm, clip = torch.full((2,), float("nan"), dtype=torch.float64)
    for _ in range(2):
        for emulation, first in zip(emulations, (0, launches[0]), strict=True):
            assert norm.isnan() or first == 0
            emulation.norm(Total(first, tiles, 0.5, sums, arrived, norm, clip))
        with using("reference"):
            wanted = torch.cat([masked_sum_squares(p.params, p.grads, p.table, rows_of(p, 1)) for p in problems])
        torch.testing.assert_close(norm, wanted.sum().sqrt(), rtol=1e-12, atol=0)
        torch.testing.assert_close(clip, (0.5 / (norm + 1e-6)).clamp(max=1), rtol=1e-12, atol=0)
        assert not arrived.any()
        norm.fill_(float("nan"))


def test_codes_are_exact_with_approximate_roots(library):
    codes, roots = ctypes.c_int64(), ctypes.c_int64()
    library.wrong_codes(ctypes.byref(codes), ctypes.byref(roots))
    assert codes.value == 0 < roots.value


class Two(nn.Module):
    """A launch for each of two dtypes; one of the tensors has tiles for more than one group of the norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(70, 40)
        self.wide = nn.Parameter(torch.randn(66 * TILE // 64, 64))
        self.last = nn.Linear(30, 5).bfloat16()


@pytest.mark.parametrize("options", [{"states": "8bit"}, {"rounding": "stochastic", "pull": 0.1}], ids=["8bit", "pull"])
def test_steps_of_the_reference(library, monkeypatch, options):
    """prepare_step, norm over two launches, clip and update, as the optimizer calls them."""
    monkeypatch.setattr(cuda, "extension", lambda: library.module)
    monkeypatch.setattr(cuda, "probe", lambda device: None)
    monkeypatch.setattr(choice, "_module", lambda name, device: {"compiled": cuda, "reference": reference}[name])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    results = []
    for name in ("compiled", "reference"):
        choice._backend.cache_clear()
        with using(name):
            model, generator = Two(), torch.Generator().manual_seed(1)
            ticket = ls.Ticket.random(model, density=0.02)
            optimizer = ls.MaskedAdamW(model, ticket, lr=1e-2, max_grad_norm=0.5, seed=2**33 + 1, **options)
            norms = []
            for number in range(4):
                for param in model.parameters():
                    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                if number == 1:
                    model.first.bias.grad = None
                optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(number == 2)), torch.tensor(3.0)
                optimizer.step()
                norms.append(float(optimizer.grad_norm))
            state = [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
            results.append((norms, [*model.parameters(), *state], optimizer._launches))
    (norms, found, launches), (their_norms, wanted, _) = results
    assert len(launches) == 2 and launches[0].prepared is not None
    assert norms == pytest.approx(their_norms, rel=1e-12)
    assert all(
        torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a.detach(), b.detach())))
        for a, b in zip(found, wanted, strict=True)
    )
    choice._backend.cache_clear()


# --- topk_delta: the passes of the compiled backend for CUDA tensors, on CPU tensors ---


@pytest.fixture
def passes(library, static_selection):
    """With `launch(blocks, bins)`: those of the histogram pass, the bins in shared memory."""
    with static_selection.emulated(library.module) as backend:
        backend.launch = library.set_histogram
        yield backend
    library.set_histogram(3, 32_768)


@pytest.mark.parametrize(("before", "after"), KINDS)
def test_histogram_of_the_reference(passes, rng, before, after):
    initial, tuned = pairs_of(before, after, rng)
    for prefixes, bins, blocks in ((None, 32_768, 3), (None, 16_384, 100), ([0, 0x3B00, 0x3A80], 32_768, 2)):
        passes.launch(blocks, bins)
        wanted, found = (torch.full((3, 32_768 if prefixes is None else 65_536), 5) for _ in range(2))
        flags = torch.zeros(2, 1, dtype=torch.int64)
        upper = None if prefixes is None else torch.tensor(prefixes)
        Unpacked(reference).delta_histogram(initial, tuned, SELECTION_GROUPS, upper, wanted, flags[0])
        Unpacked(passes).delta_histogram(initial, tuned, SELECTION_GROUPS, upper, found, flags[1])
        assert torch.equal(found, wanted) and (found > 5).any()
        assert flags.tolist() == [[0], [0]]


@pytest.mark.parametrize("bounds", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize(("before", "after"), KINDS)
def test_band_of_the_reference(passes, rng, before, after, bounds):
    initial, tuned = pairs_of(before, after, rng)
    for take in (None, torch.tensor(TAKE)):
        args = initial, tuned, *bounds, take, sum(SELECTION_SIZES)
        wanted, found = (
            BandOutputs(Unpacked(reference).delta_band, *args),
            BandOutputs(Unpacked(passes).delta_band, *args),
        )
        assert found.counts() == wanted.counts()
        assert found.candidates() == wanted.candidates()


@pytest.mark.parametrize("missing", [0, 1, 200_000, 1 << 20])
def test_band_stores_what_it_has_room_for(passes, rng, missing):
    args = *pairs_of("f32", "f32", rng), *BANDS["all that moved"], None
    wanted = BandOutputs(Unpacked(reference).delta_band, *args, 1 << 20)
    capacity = max(0, int(wanted.cursor) - missing)
    found = BandOutputs(Unpacked(passes).delta_band, *args, capacity)
    assert found.counts() == wanted.counts()
    stored = found.candidates()
    assert (None in stored) == (missing > 0)
    assert all(a is None or a == b for a, b in zip(stored, wanted.candidates(), strict=True))


@pytest.fixture
def candidates(rng):
    """Those of the reference: (keys, positions, offsets, inside), the group and the first word of every tile."""
    band = BandOutputs(
        Unpacked(reference).delta_band, *pairs_of("f32", "f32", rng), *BANDS["all that moved"], None, 1 << 20
    )
    layout = Layout(SELECTION_SIZES)
    of_tile = torch.arange(len(SELECTION_SIZES)).repeat_interleave(torch.tensor(layout.tile_offsets).diff())
    first_tile, first_word = torch.tensor(layout.tile_offsets)[of_tile], torch.tensor(layout.word_offsets)[of_tile]
    words = first_word + WORDS_PER_TILE * (torch.arange(layout.tiles) - first_tile)
    return (band.keys, band.positions, band.offsets, band.inside, torch.tensor(SELECTION_GROUPS)[of_tile]), words


def test_bins_of_candidates_of_the_reference(passes, candidates):
    low = torch.tensor([key_at(1e-3), 1, key_at(2.0**-9)])
    high = torch.tensor([key_at(1.5e-3), key_at(1e-2), key_at(2.0**-9) + 1])
    for shift in ([8, 17, 0], [0, 30, 3]):  # with these bins, some candidates lie beyond them
        wanted, found = (torch.full((3, 1 << 12), 5) for _ in range(2))
        for histogram, run in ((wanted, Unpacked(reference)), (found, Unpacked(passes))):
            run.candidate_histogram(*candidates[0], low, high, torch.tensor(shift), histogram)
        assert torch.equal(found, wanted) and (found > 5).any(1).all()


def test_candidates_are_marked_as_by_the_reference(passes, candidates):
    of_tiles, tile_words = candidates
    tiles = len(tile_words)
    cut = torch.tensor([key_at(1e-3), key_at(2.0**-9), 0x7F800000])
    results = []
    for chosen in (Unpacked(reference), Unpacked(passes)):
        words = torch.zeros(Layout(SELECTION_SIZES).words, dtype=torch.int32)
        taken, ties = torch.full((2, tiles), 77)
        chosen.take_above(*of_tiles, cut, words, tile_words, taken, ties)
        marked = [words.clone() for _ in range(3)]
        for of_take, take in zip(marked, (torch.zeros_like(ties), ties // 3 + 1, ties), strict=True):
            chosen.take_ties(*of_tiles, cut, of_take, tile_words, take)
        results.append([words, *marked, taken, ties])
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    words, none, some, every, taken, ties = results[0]
    assert torch.equal(none, words) and (some != words).any() and (every != some).any()
    assert taken.any() and (ties > 1).any() and 0 in taken.tolist()


def test_ties_of_a_tile_are_taken_in_order(passes, candidates):
    (keys, *of_tiles), tile_words = candidates
    keys = torch.full_like(keys, 9)
    cut, take = torch.tensor([9, 9, 9]), torch.tensor(TAKE)
    wanted, found = (torch.zeros(Layout(SELECTION_SIZES).words, dtype=torch.int32) for _ in range(2))
    Unpacked(reference).take_ties(keys, *of_tiles, cut, wanted, tile_words, take)
    Unpacked(passes).take_ties(keys, *of_tiles, cut, found, tile_words, take)
    assert torch.equal(found, wanted) and found.any()


def test_candidates_that_were_not_stored_are_left_alone(passes, candidates):
    (keys, positions, offsets, inside, groups), tile_words = candidates
    of_tiles = keys, positions, torch.full_like(offsets, -1), inside, groups
    cut, words = torch.zeros(3, dtype=torch.int64), torch.zeros(Layout(SELECTION_SIZES).words, dtype=torch.int32)
    taken, ties = torch.full((2, len(inside)), 77)
    histogram = torch.zeros(3, 16, dtype=torch.int64)
    Unpacked(passes).candidate_histogram(*of_tiles, cut, cut + 0x7FFFFFFF, cut + 27, histogram)
    Unpacked(passes).take_above(*of_tiles, cut, words, tile_words, taken, ties)
    Unpacked(passes).take_ties(*of_tiles, cut, words, tile_words, inside)
    assert not any(t.any() for t in (histogram, words, taken, ties))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_seen(passes, rng, dtype, value):
    initial, tuned = pairs_of(dtype, dtype, rng)
    tuned[8][40_000] = value
    histogram, nonfinite = torch.zeros(3, 32_768, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    Unpacked(passes).delta_histogram(initial, tuned, SELECTION_GROUPS, None, histogram, nonfinite)
    assert nonfinite.item() == 1
    args = initial, tuned, *BANDS["narrow"], None, 1 << 20
    wanted, found = (BandOutputs(Unpacked(which).delta_band, *args) for which in (reference, passes))
    assert found.counts() == wanted.counts() and found.nonfinite.item() == 1


# --- whole selections: what the last thread blocks decide ---


def sampled_of(tuned, plan, initial=(), room: int = 0) -> Sampled:
    """A selection to be made, its outputs poisoned."""
    layout = Layout(plan.sizes)

    def filled(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((n,), 77, dtype=dtype)

    groups = len(plan.wanted)
    return Sampled(
        Tensors(initial), Tensors(tuned), plan.groups, plan.budgets(),
        filled(sum(plan.runs) * reference.RUN, torch.int32).view(-1, reference.RUN), filled(groups), filled(groups),
        filled(layout.words, torch.int32), filled(layout.tiles), filled(groups, torch.float32),
        filled(room, torch.int32), filled(room, torch.int16),
    )  # fmt: skip


def brackets_of(library, sampled: Sampled) -> list[list[int]]:
    """[low, high] of every group, from the two launches that take samples."""
    library.counters.run_launches(ctypes.c_int64(2))
    cuda.select_sampled(sampled)
    library.counters.run_launches(ctypes.c_int64(1 << 40))
    return torch.stack([sampled.low, sampled.high], 1).tolist()


@pytest.mark.parametrize("blocks", [1, 3, 50])
@pytest.mark.parametrize("groups", [1, 5, 300])
def test_samples_lie_where_a_counter_hashes_to(passes, library, rng, monkeypatch, blocks, groups):
    """Those of `SamplePlan.places`, of several dtypes, of tensors shorter than a run and of groups without entries."""
    tune(monkeypatch.setattr, SAMPLES=6000, _SAMPLE_SHARE=2)
    passes.launch(blocks, 32_768)
    initial, tuned = pairs_of("f32", "f32", rng)
    initial = [t.half() if number % 4 == 2 else t for number, t in enumerate(initial)]
    tuned = [t.bfloat16() if number % 3 == 2 else t for number, t in enumerate(tuned)]
    tuned[7][40:50_000] = torch.inf
    sizes = [t.numel() for t in tuned]
    plan = samples.plan_samples(sizes, [number * 37 % groups for number in range(len(sizes))], [0] * groups)
    wanted = torch.full((sum(plan.runs), reference.RUN), 77, dtype=torch.int32)
    reference.sample_keys(Sample(Tensors(initial), Tensors(tuned), *plan.places(), wanted))
    sampled = sampled_of(tuned, plan, initial)
    assert brackets_of(library, sampled) == [[reference.NONFINITE_KEY, reference.NONFINITE_KEY + 1]] * groups
    assert torch.equal(sampled.samples, wanted) and (wanted == reference.NONFINITE_KEY - 1).any()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("groups", [1, 200])
@pytest.mark.parametrize("kind", DELTAS)
def test_brackets_are_those_of_the_samples(passes, library, rng, monkeypatch, kind, groups, blocks):
    """Where there is room: from the bin of the sample at the bottom to that at the top, both included."""
    tune(monkeypatch.setattr, SAMPLES=4000, _SAMPLE_SHARE=2)
    passes.launch(blocks, 32_768)
    tuned = [DELTAS[kind](n, rng) for n in (9000, 40, 300, 2500)]
    ks = [0] * groups
    for group, k in ((0, 2000), (groups // 2, 20), (groups - 1, 100)):
        ks[group] += k
    source = sources.TensorSource([], tuned)
    plan = samples.plan_samples(source.sizes, [0, groups // 2, groups - 1, 0], ks)
    bounds = torch.stack(samples.sampled_bracket(backends.Backend(reference), source, plan), 1).tolist()
    rest = 31 - 2 * cuda._digit_bits(groups)
    for group, (low, high) in enumerate(bounds):
        if ks[group] and high <= reference.NONFINITE_KEY:
            bounds[group] = [max(low >> rest << rest, 1), ((high - 1 >> rest) + 1) << rest]
    assert brackets_of(library, sampled_of(tuned, plan, room=1 << 20)) == bounds


def test_a_crowd_has_a_bracket_of_its_key(passes, library, rng, monkeypatch):
    """Where the bands overflow the room: of the group whose middle it is; not where a bin has two keys."""
    tune(monkeypatch.setattr, SAMPLES=4000, _SAMPLE_SHARE=2)
    levels = torch.tensor([0.3, 0.1 + 2e-8, 0.1]).repeat(3000)
    tuned = [DELTAS["normal"](9000, rng), levels.round(decimals=1), levels]
    plan = samples.plan_samples([9000] * 3, [0, 1, 2], [2000, 4000, 4500])
    wide, crowd, two = brackets_of(library, sampled_of(tuned, plan, room=100))
    assert crowd == [key_at(0.1), key_at(0.1) + 1] and two[0] <= key_at(0.1) < two[1] - 1 and wide[1] - wide[0] > 1000


@pytest.mark.parametrize("route", ["sample", "histogram"])
@pytest.mark.parametrize("room", [40, 5000])
def test_selection_of_the_reference(passes, monkeypatch, route, room):
    """Every route at a few hundred entries, with tensors of several dtypes and budgets in one call."""
    tune(monkeypatch.setattr, SAMPLES=200, _SAMPLE_SHARE=2, _SPARE_CANDIDATES=room)
    for seed in range(40):
        passes.launch(seed % 5 + 1, 32_768)
        initial, tuned, ks, groups = random_case(seed)
        wanted, found = (
            routes.select_topk(p, sources.TensorSource(initial, tuned), groups, ks, route=route)
            for p in (backends.Backend(reference), passes)
        )
        for name in ("words", "counts", "thresholds"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), f"seed {seed}, {name}"


DECIDED = {
    # deltas, room for candidates, groups
    "a narrow band": ("normal", 20_000, 1),
    "a crowd of one key without room for it": ("levels", 3000, 1),
    "the same, of several dtypes": ("levels of two dtypes", 3000, 1),
    "budgets": ("normal", 100_000, 147),
    "budgets among crowds": ("levels", 100_000, 147),
    "less has moved than is wanted": ("mostly-zero", 20_000, 1),
}


@pytest.mark.parametrize(("kind", "room", "groups"), DECIDED.values(), ids=DECIDED)
def test_eight_launches_and_one_wait(passes, library, static_selection, rng, monkeypatch, kind, room, groups):
    """Whatever the number of tensors and budgets. Of torch memory, and zeros before the first launch."""
    tune(monkeypatch.setattr, SAMPLES=100_000, _SAMPLE_SHARE=2, _SPARE_CANDIDATES=room)
    two_dtypes = kind == "levels of two dtypes"
    kind = kind.split(" ")[0]
    tuned = [DELTAS[kind](700 + 13 * number, rng) for number in range(147)]
    if two_dtypes:
        tuned[1::2] = [t.bfloat16() for t in tuned[1::2]]
    of_tensor = [number % groups for number in range(147)]
    pools = [sum(t.numel() for t, group in zip(tuned, of_tensor, strict=True) if group == g) for g in range(groups)]
    ks = [2 * pool // 5 for pool in pools]
    source = sources.TensorSource([], tuned)
    wanted = routes.select_topk(backends.Backend(reference), source, of_tensor, ks, route="histogram")
    with static_selection.Counted(library.counters) as counted:
        found = routes.select_topk(passes, source, of_tensor, ks)
    assert counted.launches == (10 if two_dtypes else 8)
    assert counted.reads == ["tolist"] and not counted.between and counted.before["zeros"] == 1
    for name in ("words", "counts", "thresholds"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("kind", ["normal", "levels"])
def test_the_host_reads_once_by_histogram(passes, library, static_selection, rng, monkeypatch, kind):
    """Where the route is decided; all else stays on the device."""
    tune(monkeypatch.setattr, _SPARE_CANDIDATES=600)
    tuned = [DELTAS[kind](n, rng) for n in (700, 1, 1300)]
    with static_selection.Counted(library.counters) as counted:
        routes.select_topk(passes, sources.TensorSource([], tuned), [0, 0, 0], [600], route="histogram")
    assert counted.reads == ["tolist"]


MISLED = {
    # (k that the samples are asked for, room for candidates) -> a band too high, too low, too wide
    "too large": (100, 1200),
    "too small": (3000, 1200),
    "more than there is room for": (None, 10),
}


@pytest.mark.parametrize(("k", "room"), MISLED.values(), ids=MISLED)
def test_a_wrong_bracket_is_seen(passes, rng, monkeypatch, k, room):
    """Of one group of two; the histogram gives the selection then."""
    tune(monkeypatch.setattr, SAMPLES=2000, _SAMPLE_SHARE=2, _SPARE_CANDIDATES=1200)
    tuned, groups, ks = [DELTAS["normal"](n, rng) for n in (1700, 1, 2300)], [0, 1, 0], [600, 1]
    plan_samples, on_device, outcomes = samples.plan_samples, routes._decided_on_device, []

    def misled(sizes, groups, ks, more):
        wrong = plan_samples(sizes, groups, ks if k is None else [k, 1], more)
        tune(monkeypatch.setattr, _SPARE_CANDIDATES=room)
        return replace(wrong, wanted=ks)

    monkeypatch.setattr(routes, "plan_samples", misled)
    monkeypatch.setattr(routes, "_decided_on_device", lambda *args: outcomes.append(on_device(*args)) or outcomes[-1])
    source = sources.TensorSource([], tuned)
    wanted = routes.select_topk(backends.Backend(reference), source, groups, ks, route="histogram")
    found = routes.select_topk(passes, source, groups, ks)
    assert outcomes == [None]
    for name in ("words", "counts", "thresholds"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_delta_that_is_not_finite_ends_the_selection(passes, rng, value):
    tuned = [DELTAS["normal"](n, rng) for n in (700, 1300)]
    tuned[1][70] = value
    with pytest.raises(routes.NonFiniteDelta, match="tensor 1 "):
        routes.select_topk(passes, sources.TensorSource([], tuned), [0, 0], [600])


# --- numbers that lead out of the memory given ---


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("density", "mode"), [(0.02, "plain"), (0.3, "8bit"), (1.0, "plain"), (0.3, "plain")])
def test_tiles_that_lead_out_trap_untouched(library, density, mode, packed):
    """Only the tile that is wrong traps; all others are updated."""
    kind = {0.02: "list", 0.3: "bitmap", 1.0: "full"}[density]
    cases = {"param": (0, 2**40), "length": (2, 0), "active": (3, 0), "slot": (4, 2**62), "block": (7, -1)}
    cases |= {"list": {"index": (5, 2**40)}, "bitmap": {"index": (5, -2)}, "full": {"encoding": (6, 9)}}[kind]
    for name, (column, value) in (cases | {"end": (0, 0)}).items():
        wanted, problem = (problem_of(density, **MODES[mode]) for _ in range(2))
        if packed:
            wanted.grads = problem.grads = torch.full((problem.table.k,), 0.5)
        table = problem.table = problem.table.with_ranks()
        of_tile = table.tiles[:, 0] == 3  # 1000 entries
        row = int(of_tile.nonzero()[0])
        rows = rows_of(problem, 1)
        rows[:, Coefficient.APPLY] = 1
        emulation = Emulation(library, problem, rows)  # the work items are those of the table as it should be
        active, index = (int(table.tiles[row, c]) for c in (3, 5))
        if name != "end":
            table.tiles[row, column] = value
        elif kind == "list":
            table.positions[index + active - 1] = 1000
        elif kind == "bitmap":
            table.words[index + 31] |= 1 << 20
        else:
            continue
        emulation.sum_squares()
        emulation.update()
        looks_by_slot = packed or name != "slot"  # the norm does not, where gradients are dense
        assert library.take_traps() == 1 + looks_by_slot, name
        with using("reference"):
            kept = wanted.params[3].clone()
            wanted.step(rows, None)
        assert torch.equal(problem.params[3], kept)
        for i in (0, 1, 2, 4, 5, 6, 7):
            assert torch.equal(bits(problem.params[i]), bits(wanted.params[i])), (name, i)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0], ids=["list16", "bitmap", "full"])
def test_work_items_that_lead_out_trap_untouched(library, density):
    problem = problem_of(density)
    rows = rows_of(problem, 1)
    rows[:, Coefficient.APPLY] = 1
    emulation = Emulation(library, problem, rows)
    last = len(emulation.items) - 1
    first = int(emulation.items[last, 1])
    wrong = [(0, -1), (0, 2**30), (1, -WORK_ITEM), (1, 4 * WORK_ITEM), (1, 1)]
    for column, value in [*wrong, (2, -1), (3, 2**30), (3, 0)] if density == 0.3 else wrong:
        emulation.items = work_items(emulation.record).clone()
        emulation.items[last, column] = value
        before = problem.params[-1].clone()
        emulation.update()
        assert library.take_traps() == 1, (column, value)
        changed = (bits(before) != bits(problem.params[-1])).view(-1)
        assert changed.any() and not changed[TILE + first :].any()


@pytest.mark.parametrize("density", [0.02, 0.07, 0.3, 1.0])
def test_work_items_hold_every_active_entry_once(density):
    problem = problem_of(density)
    table = problem.table.with_ranks()
    words = unpack_bits(table.words)
    found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64)] for _ in problem.params]
    items = work_items(table)
    assert (items[:, 1] % WORK_ITEM == 0).all()
    for tile, first, group, end_group in items.tolist():
        param, start, length, active, _, index, encoding, _ = table.tiles[tile].tolist()
        count = min(WORK_ITEM, active - first)
        assert count > 0
        if encoding == Encoding.BITMAP:
            assert 0 <= group < end_group <= (length + 63) // 64
            held = words[32 * index :][64 * group : 64 * end_group].nonzero().view(-1) + 64 * group
            skipped = first - (int(table.ranks[index // 2 + group]) & 0xFFFF)
            assert 0 <= skipped < 64 and held[-1] // 64 == end_group - 1
            held = start + held[skipped : skipped + count]
        else:
            held = tile_indices(table.tiles[tile].tolist(), table.words, table.positions)[first : first + count]
        assert len(held) == count
        found[param].append(held)
    for name, held in zip(problem.ticket.names, found, strict=True):
        assert torch.equal(torch.cat(held), problem.ticket.mask(name).view(-1).nonzero().view(-1))


def test_candidates_that_lead_out_trap_untouched(passes, library, candidates):
    (keys, positions, *_), tile_words = candidates
    cut, count = torch.zeros(3, dtype=torch.int64), len(tile_words)
    for spoilt, values in ((0, (2**62,)), (1, (-1, TILE + 1)), (2, (-1, 3, 2**62)), (3, (-1, 2**62))):
        for value in values:
            of_tiles = [t.clone() for t in (*candidates[0][2:], tile_words)]
            of_tiles[spoilt][-1] = value
            words, taken, ties = (
                torch.zeros(Layout(SELECTION_SIZES).words, dtype=torch.int32),
                *torch.full((2, count), 77),
            )
            chosen = keys, positions, *of_tiles[:3]
            Unpacked(passes).take_above(*chosen, cut, words, of_tiles[3], taken, ties)
            Unpacked(passes).take_ties(*chosen, cut, words, of_tiles[3], taken)
            assert library.take_traps() == 2
            assert (taken[-1], ties[-1]) == (77, 77) and (taken[:-1] != 77).all() and words.any()
            assert not words[int(tile_words[-1]) :].any()
            if spoilt < 3:
                Unpacked(passes).candidate_histogram(*chosen, cut, cut + 1, cut, torch.zeros(3, 1, dtype=torch.int64))
                assert library.take_traps() == 1
