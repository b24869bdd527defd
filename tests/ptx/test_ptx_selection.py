"""The passes of `topk_delta` as PTX, and whole selections: the results of the reference, and nothing to report."""

import itertools

import pytest
import torch
from helpers import emulated_device as device
from helpers.backends import Unpacked, using
from helpers.bits import DTYPES
from helpers.emulated_gpu import ARCHITECTURES, COMPILED, GPU_BACKENDS
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
from helpers.selections import ROUTES, SMALL_ROUTES, random_case, tune

from ltp_sparse import backends
from ltp_sparse.backends import reference
from ltp_sparse.ops import routes, sources
from ltp_sparse.tickets.bits import WORDS_PER_TILE
from ltp_sparse.tickets.layout import Layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test builds the emulator

CPU = torch.device("cpu")
SIZES = (1, 31, 0, 32, 33, 700, 1024, 4000, 65_537)
SMALL = (1, 31, 0, 32, 33, 700, 1024, 4000)
SHUFFLED = [(1, 1), (2, 5), (3, 40)]
"""(seed, longest burst) of schedules in which threads run at random."""
FEW = {name: BANDS[name] for name in ("all that moved", "ties")}


def passes_of(backend):
    with using(backend):
        return Unpacked(backends.resolve(CPU))


def generator():
    return torch.Generator().manual_seed(7)


def _histogram(backend, before, after, sizes):
    initial, tuned = pairs_of(before, after, generator(), sizes)
    groups = SELECTION_GROUPS[: len(sizes)]
    for prefixes in (None, torch.tensor([0, 0x3B00, 0x3A80])):
        wanted, found = (torch.full((3, 32_768 if prefixes is None else 65_536), 5) for _ in range(2))
        flags = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        Unpacked(reference).delta_histogram(initial, tuned, groups, prefixes, wanted, flags[0])
        passes_of(backend).delta_histogram(initial, tuned, groups, prefixes, found, flags[1])
        assert torch.equal(found, wanted) and torch.equal(*flags)


def _band(backend, before, after, sizes, bounds):
    """With room for all candidates, for some, and for none."""
    groups = SELECTION_GROUPS[: len(sizes)]
    initial, tuned = pairs_of(before, after, generator(), sizes)
    every = torch.tensor([TAKE[tile % len(TAKE)] for tile in range(Layout(sizes).tiles)])
    for take, room in ((None, sum(sizes)), (every, sum(sizes)), (None, sum(sizes) // 7), (None, 0)):
        wanted = BandOutputs(Unpacked(reference).delta_band, initial, tuned, *bounds, take, sum(sizes), groups)
        found = BandOutputs(passes_of(backend).delta_band, initial, tuned, *bounds, take, room, groups)
        assert found.counts() == wanted.counts()
        candidates = found.candidates()
        assert int(wanted.cursor) > room or None not in candidates
        assert all(a is None or a == b for a, b in zip(candidates, wanted.candidates(), strict=True))


def _samples(backend, before, after, sizes):
    """Of tensors of several dtypes in one call."""
    initial, tuned = pairs_of(before, after, generator(), sizes)
    tuned = [t.bfloat16() if number % 3 == 2 else t for number, t in enumerate(tuned)]
    there = [number for number, n in enumerate(sizes) if n]
    tensors = torch.tensor([there[i % len(there)] for i in range(77)])
    runs = torch.tensor([7919 * i % max(1, sizes[t] // reference.RUN) for i, t in enumerate(tensors.tolist())])
    wanted, found = (torch.full((77, reference.RUN), 77, dtype=torch.int32) for _ in range(2))
    Unpacked(reference).sample_keys(initial, tuned, tensors, runs, wanted)
    passes_of(backend).sample_keys(initial, tuned, tensors, runs, found)
    assert torch.equal(found, wanted)


def _candidates(backend, sizes):
    band = BandOutputs(
        Unpacked(reference).delta_band, *pairs_of("f32", "f32", generator(), sizes), *BANDS["all that moved"], None,
        sum(sizes), SELECTION_GROUPS[: len(sizes)],
    )  # fmt: skip
    layout = Layout(sizes)
    of_tile = torch.arange(len(sizes)).repeat_interleave(torch.tensor(layout.tile_offsets).diff())
    first_tile, first_word = torch.tensor(layout.tile_offsets)[of_tile], torch.tensor(layout.word_offsets)[of_tile]
    tile_words = first_word + WORDS_PER_TILE * (torch.arange(layout.tiles) - first_tile)
    of_tiles = band.keys, band.positions, band.offsets, band.inside, torch.tensor(SELECTION_GROUPS)[of_tile]
    low = torch.tensor([key_at(1e-3), 1, key_at(2.0**-9)])
    high = torch.tensor([key_at(1.5e-3), key_at(1e-2), key_at(2.0**-9) + 1])
    cut = torch.tensor([key_at(1e-3), key_at(2.0**-9), 0x7F800000])
    results = []
    for passes in (Unpacked(reference), passes_of(backend)):
        histograms = [torch.full((3, 1 << 12), 5) for _ in range(2)]
        for histogram, shift in zip(histograms, ([8, 17, 0], [0, 30, 3]), strict=True):
            passes.candidate_histogram(*of_tiles, low, high, torch.tensor(shift), histogram)
        words = torch.zeros(layout.words, dtype=torch.int32)
        taken, ties = (torch.full((layout.tiles,), 77) for _ in range(2))
        passes.take_above(*of_tiles, cut, words, tile_words, taken, ties)
        marked = [words.clone() for _ in range(3)]
        for of_take, take in zip(marked, (torch.zeros_like(ties), ties // 3 + 1, ties), strict=True):
            passes.take_ties(*of_tiles, cut, of_take, tile_words, take)
        results.append([*histograms, words, *marked, taken, ties])
    assert all(map(torch.equal, *results))


def _selections(backend, seeds):
    with pytest.MonkeyPatch.context() as patch:
        tune(patch.setattr, **SMALL_ROUTES)
        for seed, route in itertools.product(seeds, ROUTES):
            initial, tuned, ks, groups = random_case(seed)
            wanted, found = (
                routes.select_topk(passes, sources.TensorSource(initial, tuned), groups, ks, route=route)
                for passes in (backends.Backend(reference), passes_of(backend).functions)
            )
            for name in ("words", "counts", "thresholds"):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), f"seed {seed}, {route}, {name}"


@pytest.mark.parametrize(("before", "after"), [("f32", "f32"), ("bf16", "bf16"), (None, "f16")])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_passes_of_the_reference(gpu, backend, before, after):
    sizes = SIZES if before == "f32" else SMALL  # a second tile once: the emulator is slow
    if backend == "compiled":
        gpu.run(_histogram, backend, before, after, sizes)
    gpu.run(_band, backend, before, after, sizes, BANDS["all that moved"])
    gpu.run(_samples, backend, before, after, sizes)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_candidates_of_the_reference(gpu, backend):
    gpu.run(_candidates, backend, SIZES)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_selections_of_the_reference(gpu, backend):
    gpu.run(_selections, backend, range(2))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_schedules_of_a_selection(gpu, backend):
    for seed, burst in SHUFFLED[1:]:
        settings = {"random": 1, "seed": seed, "burst": burst, "resident": 1 + seed, "processors": 1 + seed}
        gpu.run(_band, backend, "bf16", "f32", SMALL, BANDS["ties"], **settings)
        gpu.run(_candidates, backend, SMALL, **settings)
        gpu.run(_selections, backend, (100 + seed,), **settings)


# --- all of it: `make ptx` ---


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize(("before", "after"), KINDS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_pass(gpu, backend, before, after, sm):
    for bounds in BANDS.values():
        gpu.run(_band, backend, before, after, SELECTION_SIZES, bounds, sm=sm)
    gpu.run(_samples, backend, before, after, SELECTION_SIZES, sm=sm)
    for seed, burst in SHUFFLED:
        settings = {"random": 1, "seed": seed, "burst": burst, "resident": 1 + seed, "processors": seed, "sm": sm}
        for bounds in FEW.values():
            gpu.run(_band, backend, before, after, SMALL, bounds, **settings)
        gpu.run(_samples, backend, before, after, SMALL, **settings)


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize(("before", "after"), KINDS)
@pytest.mark.parametrize("backend", COMPILED)
def test_every_histogram(gpu, backend, before, after, sm):
    """With the shared memory of several devices, so that one launch or several fill the bins."""
    for shared, processors in ((232_448, 5), (101_376, 1), (166_912, 3), (49_152, 200)):
        gpu.run(_histogram, backend, before, after, SELECTION_SIZES, shared=shared, processors=processors, sm=sm)
    gpu.run(_histogram, backend, before, after, SMALL, random=1, burst=3, sm=sm)


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_many_selections(gpu, backend, sm):
    gpu.run(_candidates, backend, SELECTION_SIZES, sm=sm)
    gpu.run(_selections, backend, range(60), sm=sm)
    for seed, burst in SHUFFLED:
        settings = {"random": 1, "seed": seed, "burst": burst, "resident": 1 + seed, "processors": seed, "sm": sm}
        gpu.run(_candidates, backend, SMALL, **settings)
        gpu.run(_selections, backend, range(100 * seed, 100 * seed + 12), **settings)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_whole_matrix(gpu, backend, dtype):
    gpu.run(_band, backend, dtype, dtype, (768 * 768, 768), BANDS["narrow"])


SPOILT = {
    "histogram_kernelIff": (_histogram, ("compiled", "f32", "f32", (5000, 70_000))),
    "band_kernelIff": (_band, ("compiled", "f32", "f32", (5000, 70_000), BANDS["ties"])),
    "take_above_kernel": (_selections, ("compiled", range(12))),  # its barriers are those of the last block's decision
    "take_ties_kernel": (_candidates, ("compiled", (5000, 70_000))),
}


@pytest.mark.ptx
@pytest.mark.parametrize("kernel", SPOILT)
@pytest.mark.parametrize("backend", COMPILED)
def test_barriers_are_missed(gpu, backend, kernel):
    assert gpu.run(device.is_noticed, kernel, r"bar\.sync", *SPOILT[kernel], random=1, seed=3, burst=20)
