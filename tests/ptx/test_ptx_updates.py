"""Updates, norms, packing, copies and digests as PTX: the bits of the reference, and nothing to report."""

import pytest
import torch
from helpers import emulated_device as device
from helpers.backends import using
from helpers.bits import bits
from helpers.emulated_gpu import ARCHITECTURES, COMPILED, GPU_BACKENDS
from helpers.selection_passes import unaligned
from helpers.update_cases import CASES, options_of, problem_of, rows_of

import ltp_sparse as ls
from ltp_sparse.backends import digests
from ltp_sparse.ops import masked_gather, masked_pack_, masked_scatter_, masked_sum_squares, masked_swap_
from ltp_sparse.tickets.bits import tiles_of
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test builds the emulator

DENSITIES = {"list16": 0.02, "sparse bitmap": 0.07, "bitmap": 0.4, "full": 1.0}
SIZES = (1, 63, 257, 1000, 4097)
LARGE = (1, 257, 4097, 65_700)
SMALL = (1, 63, 257, 700)
SHUFFLED = [(1, 1), (2, 5), (3, 40)]
"""(seed, longest burst) of schedules in which threads run at random."""


def assert_same(found, wanted):
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.dtype == torch.float64:  # sums, in another order
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        else:
            assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b))), number


def shifted(problem):
    """Nothing is where a vector could be loaded."""
    problem.params, problem.grads = ([unaligned(t) for t in tensors] for tensors in (problem.params, problem.grads))
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if (tensor := getattr(problem, name)) is not None:
            setattr(problem, name, unaligned(tensor))
    return problem


def _update(backend, sizes, case, variant, density):
    """Two steps and their norms, on both backends."""
    results = []
    for chosen in ("reference", backend):
        problem = problem_of(sizes, density, **options_of(*case))
        problem.table = problem.table.with_ranks()
        if variant == "unaligned":
            problem = shifted(problem)
        k = problem.table.k
        anchor = torch.linspace(-0.03, 0.03, k) if variant == "anchor" else None
        if variant == "packed":
            problem.grads = torch.linspace(-1e-3, 1e-3, k)
        else:
            problem.grads[1] = None
        norms = []
        with using(chosen):
            for step in (1, 2):
                rows = rows_of(problem, step)
                norms.append(
                    masked_sum_squares(
                        problem.params, problem.grads, problem.table, rows, anchor, master=problem.master
                    )
                )
                problem.step(rows, anchor)
        results.append([*problem.tensors(), *norms])
    assert_same(*results)


def _pack(backend, sizes, dtype, density, shift):
    results = []
    for chosen in ("reference", backend):
        problem = problem_of(sizes, density, **options_of(dtype, dtype, "plain"))
        grads = [unaligned(grad) for grad in problem.grads] if shift else problem.grads
        out = torch.full((problem.table.k,), 0.5)
        with using(chosen):
            for accumulate in (False, True):
                masked_pack_(grads, out, problem.table.with_ranks(), accumulate=accumulate)
        results.append([out])
    assert_same(*results)


def _copy(backend, sizes, dtype, density):
    """Gather, scatter and swap of any bits."""
    results = []
    for chosen in ("reference", backend):
        generator = torch.Generator().manual_seed(7)
        tensors = [torch.randint(0, 100, (n,), generator=generator).to(dtype) for n in sizes]
        masks = [torch.rand(n, generator=generator) < density for n in sizes]
        table = TileTable.build([IndexSet.from_mask(mask) for mask in masks], ranks=True)
        with using(chosen):
            slots = masked_gather(tensors, table)
            held = slots.clone()
            masked_scatter_(tensors, slots + 1, table)
            masked_swap_(tensors, slots, table)
        results.append([held, slots, *tensors])
    assert_same(*results)


OPTIMIZERS = {
    "f32": (torch.float32, {}),
    "bf16-8bit-stochastic": (torch.bfloat16, {"states": "8bit", "rounding": "stochastic"}),
}


def _clipped_steps(backend, sizes, name):
    """Of the optimizer: it counts steps on the device, and the last thread blocks of the norm compute the clip."""
    results, (dtype, options) = [], OPTIMIZERS[name]
    for chosen in ("reference", backend):
        generator = torch.Generator().manual_seed(7)
        params = {str(n): torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes}
        ticket = ls.Ticket.random(params, density=0.3)
        with using(chosen):
            optimizer = ls.MaskedAdamW(params, ticket, lr=1e-2, max_grad_norm=0.5, **options)
            norms = []
            for _ in range(3):
                for param in params.values():
                    param.grad = torch.randn(param.shape, generator=generator).to(dtype)
                optimizer.step()
                norms.append(optimizer.grad_norm.clone())
        results.append([*(param.detach() for param in params.values()), *norms])
    assert_same(*results)


def _digests(sizes, dtype):
    tensors = [torch.arange(n).remainder(251).to(dtype) for n in sizes]
    wanted, found = (torch.zeros(sum(map(tiles_of, sizes)), 2, dtype=torch.int64) for _ in range(2))
    digests.on_host(tensors, wanted)
    digests.on_gpu(tensors, found)
    assert torch.equal(found, wanted)


def every_case(own_gradients_only: bool = False):
    return [
        pytest.param(case, id="-".join((case[0], f"grad_{case[1]}", case[2])))
        for case in CASES
        if not own_gradients_only or case[0] == case[1]
    ]


@pytest.mark.parametrize("case", every_case(own_gradients_only=True))
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_update_of_the_reference(gpu, backend, case):
    for density in DENSITIES.values():
        gpu.run(_update, backend, SIZES, case, "plain", density)


@pytest.mark.parametrize("variant", ["anchor", "packed", "unaligned"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_variants_of_an_update(gpu, backend, variant):
    for density in DENSITIES.values():
        gpu.run(_update, backend, SIZES, ("f32", "f32", "plain"), variant, density)


@pytest.mark.parametrize("case", [("f32", "f32", "plain"), ("bf16", "bf16", "8bit-stochastic")], ids="-".join)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_schedules_of_an_update(gpu, backend, case):
    for (seed, burst), density in zip(SHUFFLED, (0.07, 0.4, 1.0), strict=True):
        gpu.run(_update, backend, SMALL, case, "plain", density, random=1, seed=seed, burst=burst)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_packing_of_the_reference(gpu, backend, dtype):
    for density in DENSITIES.values():
        gpu.run(_pack, backend, SIZES, dtype, density, False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS[1:])
def test_copies_of_the_reference(gpu, backend, dtype):
    for density in DENSITIES.values():
        gpu.run(_copy, backend, SIZES, dtype, density)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_clipped_steps_of_the_reference(gpu, backend, name):
    gpu.run(_clipped_steps, backend, (700, 4097, 65_700 if name == "f32" else 9000), name)
    gpu.run(_clipped_steps, backend, SMALL, name, random=1, seed=2, burst=5)


@pytest.mark.parametrize("backend", GPU_BACKENDS[1:])
def test_digests_of_the_host(gpu, backend):
    gpu.run(_digests, (1, 63, 65_537), torch.float32)


# --- all of it: `make ptx` ---


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("variant", ["plain", "anchor", "packed", "unaligned"])
@pytest.mark.parametrize("case", every_case())
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_update(gpu, backend, case, variant, sm):
    if variant == "packed" and case[1] != "f32":
        pytest.skip("packed gradients are float32")
    for density in DENSITIES.values():  # a second tile where few are active: the others would be slow, and the same
        gpu.run(_update, backend, LARGE if density < 0.1 else SIZES, case, variant, density, sm=sm)
    for (seed, burst), density in zip(SHUFFLED, (0.07, 0.4, 1.0), strict=True):
        gpu.run(_update, backend, SMALL, case, variant, density, sm=sm, random=1, seed=seed, burst=burst)


@pytest.mark.ptx
@pytest.mark.parametrize("case", [("f32", "f32", "plain"), ("bf16", "bf16", "stochastic")], ids="-".join)
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_whole_matrix(gpu, backend, case, density):
    """768 x 768, and what awkward_rows want beside it."""
    gpu.run(_update, backend, (768 * 768, 768, 1), case, "plain", density)


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_packing(gpu, backend, dtype, sm):
    for density in DENSITIES.values():
        for shift in (False, True):
            gpu.run(_pack, backend, LARGE, dtype, density, shift, sm=sm)
        gpu.run(_pack, backend, SMALL, dtype, density, False, sm=sm, random=1, seed=1, burst=3)


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS[1:])
def test_every_copy(gpu, backend, dtype, sm):
    for density in DENSITIES.values():
        gpu.run(_copy, backend, LARGE if density < 0.1 else SIZES, dtype, density, sm=sm)
        gpu.run(_copy, backend, SMALL, dtype, density, sm=sm, random=1, seed=1, burst=3)


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_clipped_step(gpu, backend, name, sm):
    for seed, burst in SHUFFLED:
        settings = {"random": 1, "seed": seed, "burst": burst, "resident": 1 + seed, "sm": sm}
        gpu.run(_clipped_steps, backend, (700, 4097, 9000), name, **settings)


@pytest.mark.ptx
@pytest.mark.parametrize("sm", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS[1:])
def test_every_digest(gpu, backend, dtype, sm):
    gpu.run(_digests, (1, 63, 1000, 4097, 65_536, 140_000), dtype, sm=sm)


SPOILT = {
    "update_kernel": (_update, ("compiled", (65_536, 700, 1), ("f32", "f32", "plain"), "plain", 0.07)),
    "update_coded_kernel": (_update, ("compiled", (9000, 700, 1), ("bf16", "bf16", "8bit"), "plain", 0.4)),
    "sum_squares_kernel": (_update, ("compiled", (9000, 700, 1), ("f32", "f32", "plain"), "plain", 0.4)),
    "pack_kernel": (_pack, ("compiled", (65_536,), "f32", 0.07, False)),
}


@pytest.mark.ptx
@pytest.mark.parametrize("kernel", SPOILT)
@pytest.mark.parametrize("backend", COMPILED)
def test_barriers_are_missed(gpu, backend, kernel):
    assert gpu.run(device.is_noticed, kernel, r"bar\.sync", *SPOILT[kernel], random=1, seed=3, burst=20)
