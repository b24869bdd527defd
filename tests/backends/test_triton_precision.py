"""The Triton kernels in every precision: the bits of the reference, in the interpreter where there is no GPU."""

import itertools

import pytest
import torch
from helpers.backends import using
from helpers.bits import DTYPES, bits
from helpers.update_cases import MODES, rows_of
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.ops import adamw_coefficients, masked_pack_, masked_sum_squares
from ltp_sparse.testing import UpdateProblem, update_problem
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable

if reason := backends.unavailable_reason("triton", torch.device("cpu")):
    pytest.skip(f"triton on the CPU: {reason}", allow_module_level=True)

SHAPES = {"a": (1000,), "b": (63,), "c": (5,), "d": (257,)}
CASES = [
    pytest.param(dtype, mode, id=f"{name}-{mode_name}")
    for (name, dtype), (mode_name, mode) in itertools.product(DTYPES.items(), MODES.items())
    if (dtype == torch.bfloat16 or not mode.get("stochastic")) and (dtype != torch.float32 or not mode.get("master"))
]


pytestmark = pytest.mark.slow


def poisoned(density: float, **options) -> UpdateProblem:
    problem = update_problem(SHAPES, density=density, **options)
    for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
        grad[~problem.ticket.mask(name)] = float("nan")
    return problem


def run(backend: str, density: float, with_anchor: bool, packed: bool, **options) -> list[Tensor]:
    problem = poisoned(density, **options)
    anchor = torch.linspace(-0.03, 0.03, problem.table.k) if with_anchor else None
    found = []
    with using(backend):
        if packed:
            flat = torch.full((problem.table.k,), 0.5)
            masked_pack_(problem.grads, flat, problem.table)
            masked_pack_(problem.grads, flat, problem.table, accumulate=True)
            found.append(flat)
            problem.grads = flat
        else:
            problem.grads[1] = None
        for step in (1, 2):
            rows = rows_of(problem, step)
            sums = masked_sum_squares(problem.params, problem.grads, problem.table, rows, anchor, master=problem.master)
            found.append(sums)
            problem.step(rows, anchor)
    return [*found, *problem.tensors()]


@pytest.mark.parametrize("density", [0.04, 0.4, 1.0], ids=["list16", "bitmap", "full"])
@pytest.mark.parametrize(("dtype", "mode"), CASES)
def test_bits_of_the_reference(dtype, mode, density):
    # odd cases take packed gradients, float32 gradients and the pull in turn
    number = list(MODES.values()).index(mode) + list(DTYPES.values()).index(dtype)
    options = {"dtype": dtype, **mode, "grad_dtype": torch.float32 if number % 3 == 1 else None}
    for packed in (False, True):
        args = density, bool(number % 2) ^ packed, packed
        wanted, found = run("reference", *args, **options), run("triton", *args, **options)
        for position, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert a.dtype == b.dtype
            if a.dtype == torch.float64:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
            else:
                assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b))), (packed, position)


def test_8bit_blocks_of_a_bitmap_of_two_tiles():
    """Active entries are found by their rank, through empty and full groups alike."""
    mask = torch.zeros(70_000, dtype=torch.bool)
    mask[100:400] = True
    mask[5000:60_000:97] = True
    mask[65_530:65_560] = True
    mask[-3:] = True
    mask[30_000:36_000] = True
    outcomes = []
    for backend in ("reference", "triton"):
        problem = update_problem({"a": (70_000,)}, density=0.5, states="8bit")
        table = TileTable.build([IndexSet.from_mask(mask)], ranks=True)
        assert table.tiles[:, Column.ENCODING].tolist() == [Encoding.BITMAP] * 2
        problem.table = table
        problem.exp_avg, problem.exp_avg_sq = (
            torch.zeros(table.k, dtype=torch.int8),
            torch.zeros(table.k, dtype=torch.uint8),
        )
        problem.scales = torch.zeros(table.blocks, 2)
        with using(backend):
            for step in (1, 2):
                problem.step(coefficients_of_one(step))
        outcomes.append(problem.tensors())
    assert all(map(torch.equal, *outcomes))


def coefficients_of_one(step: int) -> Tensor:
    return adamw_coefficients(torch.tensor([step]), lr=1e-2)
