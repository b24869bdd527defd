"""The CUDA kernels' thread blocks, compiled for the CPU and run thread by thread: the bits of the reference.

This tests everything but what needs a GPU: races, the launch, and the compiler's own arithmetic.
"""

import ctypes
import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.backends import Unpacked, using
from helpers.bits import DTYPES, bits
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
from helpers.selections import DELTAS, random_case
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.backends import cuda, reference
from ltp_sparse.backends.arguments import NORM_GROUP, Pack, Tensors, Total, Update
from ltp_sparse.backends.reference import Coefficient
from ltp_sparse.backends.rounding import rounding_keys
from ltp_sparse.backends.work_items import WORK_ITEM, work_items
from ltp_sparse.ops import adamw_coefficients, masked_pack_, masked_sum_squares, routes, sources
from ltp_sparse.testing import UpdateProblem, update_problem
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE, unpack_bits
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.layout import Layout
from ltp_sparse.tickets.tile_table import tile_indices

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZES = (1, 63, 257, 1000, 4096, 4097, 65_537, 70_000)
MODES = {
    "plain": {},
    "8bit": {"states": "8bit"},
    "master": {"master": True},
    "8bit-master": {"states": "8bit", "master": True},
    "stochastic": {"stochastic": True},
    "8bit-stochastic": {"states": "8bit", "stochastic": True},
}
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
def library(once):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")

    headers = pytest.importorskip("pybind11").get_include(), sysconfig.get_paths()["include"]

    def build(folder: Path) -> None:
        flags = [
            "-std=c++17",
            "-O1",
            "-DLTP_HD=inline",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-attributes",
            "-ffp-contract=off",
        ]
        # what a GPU refuses ends the process
        flags += ["-fsanitize=alignment,shift", "-fsanitize-undefined-trap-on-error"]
        flags += ["-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *(f"-isystem{header}" for header in headers)]
        source = Path(__file__).with_name("cuda_emulation.cpp")
        subprocess.run(["c++", *flags, "-o", str(folder / "emulation.so"), str(source)], check=True)

    path = once("cuda-emulation", build) / "emulation.so"
    loaded = ctypes.CDLL(str(path))
    for count in (loaded.take_traps, loaded.blocks_beyond_their_bins, loaded.wrong_fourth_roots):
        count.restype = ctypes.c_int64
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield SimpleNamespace(
        module=module, take_traps=loaded.take_traps, set_histogram=loaded.set_histogram,
        blocks_beyond=loaded.blocks_beyond_their_bins, wrong_fourth_roots=loaded.wrong_fourth_roots,
    )  # fmt: skip
    assert loaded.take_traps() == loaded.blocks_beyond_their_bins() == 0


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


def rows_of(problem: UpdateProblem, step: int) -> Tensor:
    steps = torch.full((len(problem.params),), step)
    rows = adamw_coefficients(steps, lr=1e-2, weight_decay=0.1, pull=0.3)
    rows[:, Coefficient.ROUNDING_KEY] = rounding_keys(3, steps, torch.arange(len(rows)))
    rows[2, Coefficient.APPLY] = 0
    return rows


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
    assert library.wrong_fourth_roots() == 0


# --- topk_delta: the passes of the compiled backend for CUDA tensors, on CPU tensors ---


@pytest.fixture
def passes(library, monkeypatch):
    """With `launch(blocks, bins)`: those of the histogram pass, the bins in shared memory."""
    monkeypatch.setattr(cuda, "extension", lambda: library.module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    backend = backends.Backend(cuda)
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


@pytest.mark.parametrize(("before", "after"), KINDS)
def test_samples_of_the_reference(passes, rng, before, after):
    """Of tensors of several dtypes in one call, and of some shorter than a run."""
    initial, tuned = pairs_of(before, after, rng)
    tuned = [t.bfloat16() if number % 3 == 2 else t for number, t in enumerate(tuned)]
    tuned[7][40:50] = torch.inf
    tensors = torch.tensor([0, 1, 3, 4, 4, 5, 6, 7, 7, 9, 9, 9])
    runs = torch.tensor([0, 0, 1, 0, 1, 4094, 63, 2, 4095, 0, 4096, 8749])
    wanted, found = (torch.full((12, reference.RUN), 77, dtype=torch.int32) for _ in range(2))
    Unpacked(reference).sample_keys(initial, tuned, tensors, runs, wanted)
    Unpacked(passes).sample_keys(initial, tuned, tensors, runs, found)
    assert torch.equal(found, wanted)
    assert (found[0, 1:] == 0).all() and (found[7] == reference.NONFINITE_KEY - 1).any()


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


@pytest.mark.parametrize("route", ["sample", "histogram"])
def test_selection_of_the_reference(passes, monkeypatch, route):
    """Every route at a few hundred entries, with tensors of several dtypes and budgets in one call."""
    monkeypatch.setattr(routes, "SAMPLES", 200)
    monkeypatch.setattr(routes, "_SAMPLE_SHARE", 2)
    monkeypatch.setattr(routes, "_SPARE_CANDIDATES", 40)
    for seed in range(40):
        initial, tuned, ks, groups = random_case(seed)
        wanted, found = (
            routes.select_topk(p, sources.TensorSource(initial, tuned), groups, ks, route=route)
            for p in (reference, passes)
        )
        for name in ("words", "counts", "thresholds"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), f"seed {seed}, {name}"


@pytest.mark.parametrize("kind", ["normal", "levels"])
@pytest.mark.parametrize("route", ["sample", "histogram"])
def test_the_host_reads_once(passes, rng, monkeypatch, route, kind):
    """Where the route is decided; all else stays on the device."""
    for name, value in {"SAMPLES": 200, "_SAMPLE_SHARE": 2, "_SPARE_CANDIDATES": 600}.items():
        monkeypatch.setattr(routes, name, value)
    tuned = [DELTAS[kind](n, rng) for n in (700, 1, 1300)]
    reads = []
    for name in ("tolist", "item", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        original = getattr(Tensor, name)

        def counting(self, *args, name=name, original=original):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counting)
    routes.select_topk(passes, sources.TensorSource([], tuned), [0, 0, 0], [600], route=route)
    assert reads == ["tolist"]


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


def test_samples_that_lead_out_trap_untouched(passes, library):
    tuned = [torch.ones(100), torch.ones(3)]
    for tensor, run in ((-1, 0), (2, 0), (0, -1), (0, 6), (1, 1), (0, 2**60)):
        keys = torch.full((2, reference.RUN), 77, dtype=torch.int32)
        Unpacked(passes).sample_keys([], tuned, torch.tensor([0, tensor]), torch.tensor([5, run]), keys)
        assert library.take_traps() == reference.RUN
        assert (keys[0] != 77).all() and (keys[1] == 77).all()
