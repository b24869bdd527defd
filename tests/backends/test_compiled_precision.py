"""The C++ backend in every precision, on every instruction set: the bits of the reference."""

import copy
import itertools

import pytest
import torch
from helpers.backends import instruction_sets, using
from helpers.bits import DTYPES, bits
from helpers.update_cases import MODES

from ltp_sparse.backends.reference import Coefficient
from ltp_sparse.backends.rounding import rounding_keys, tiles_have_keys
from ltp_sparse.ops import adamw_coefficients, masked_sum_squares
from ltp_sparse.testing import UpdateProblem, update_problem
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.tickets.tile_table import Column

SIZES = (1, 63, 64, 65, 255, 256, 257, 1000, 4097, 65_536, 65_537, 131_073)
CASES = [
    pytest.param(
        dtype,
        grad_dtype,
        mode,
        id=f"{name}-grad_{grad_name}-{mode_name}",
        marks=[] if (name, grad_name) == ("bf16", "f32") else pytest.mark.slow,
    )
    for (name, dtype), (grad_name, grad_dtype), (mode_name, mode) in itertools.product(
        DTYPES.items(), DTYPES.items(), MODES.items()
    )
    if grad_dtype in (dtype, torch.float32)
    and (dtype == torch.bfloat16 or not mode.get("stochastic"))
    and (dtype != torch.float32 or not mode.get("master"))
]


def problems(density: float, **options) -> UpdateProblem:
    """Inactive entries have NaN and infinite gradients; a parameter has no gradient, another is not to be updated."""
    problem = update_problem({f"p{n}": (n,) for n in SIZES}, density=density, **options)
    for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
        inactive = ~problem.ticket.mask(name)
        poison = torch.tensor([float("nan"), float("inf"), -float("inf")])[torch.arange(grad.numel()) % 3]
        grad[inactive] = poison.to(grad.dtype)[inactive]
    problem.grads[3] = None
    return problem


def coefficients(problem: UpdateProblem, step: int) -> torch.Tensor:
    steps = torch.full((len(problem.params),), step)
    rows = adamw_coefficients(steps, lr=1e-2, weight_decay=0.1, pull=0.3)
    rows[:, Coefficient.GRAD_FACTOR] = -1.0 if step == 2 else 0.5
    rows[:, Coefficient.ROUNDING_KEY] = rounding_keys(3, steps, torch.arange(len(rows)))
    rows[5, Coefficient.APPLY] = 0
    return rows


def run(backend: str, problem: UpdateProblem, with_anchor: bool) -> list[torch.Tensor]:
    problem = copy.deepcopy(problem)
    anchor = torch.linspace(-0.03, 0.03, problem.table.k) if with_anchor else None
    sums = []
    with using(backend):
        for step in range(1, 4):
            rows = coefficients(problem, step)
            sums.append(
                masked_sum_squares(problem.params, problem.grads, problem.table, rows, anchor, master=problem.master)
            )
            problem.step(rows, anchor)
    return [*problem.tensors(), *sums]


@pytest.mark.parametrize(
    "with_anchor", [pytest.param(False, id="plain"), pytest.param(True, id="pull", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("dtype", "grad_dtype", "mode"), CASES)
def test_bits_of_the_reference(compiled, dtype, grad_dtype, mode, with_anchor):
    for density in (0.02, 0.3, 0.9, 1.0):
        problem = problems(density, dtype=dtype, grad_dtype=grad_dtype, **mode)
        wanted = run("reference", problem, with_anchor)
        for isa in instruction_sets(compiled):
            compiled.set_isa(isa)
            found = run("compiled", problem, with_anchor)
            for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
                assert a.dtype == b.dtype, number
                if a.dtype == torch.float64:  # sums of squares: the reference adds in another order
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
                else:
                    assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b))), (
                        isa,
                        density,
                        number,
                    )


def test_the_cases_meet_every_encoding():
    found = {
        encoding
        for density in (0.02, 0.3, 1.0)
        for encoding in problems(density).table.tiles[:, Column.ENCODING].tolist()
    }
    assert found == set(Encoding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_rounding_is_torchs(compiled, dtype):
    """Every float32 exponent, both sides of every tie, denormals, overflow and infinities, through a master."""
    base = torch.arange(0, 0x7F80, dtype=torch.int32) << 16
    values = torch.cat(
        [
            (base + offset).view(torch.float32)
            for offset in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001)
        ]
    )
    values = torch.cat([values, -values, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    for isa in instruction_sets(compiled):
        compiled.set_isa(isa)
        problem = update_problem({"a": values.shape}, density=1, dtype=dtype, master=True)
        problem.master.copy_(values)
        problem.grads[0].zero_()
        rows = problem.coefficients.clone()
        rows[:, Coefficient.DECAY_STEP], rows[:, Coefficient.STEP_SIZE] = 0, 0
        with using("compiled"):
            problem.step(rows)
        finite = values.isfinite()  # an infinite weight has no step: the update makes a NaN of it
        assert torch.equal(bits(problem.params[0][finite]), bits(values.to(dtype)[finite]))
        assert bool(problem.params[0][~finite].isnan().all())


@pytest.mark.parametrize(
    ("start", "n", "have"),
    [
        (0, 1 << 33, True),
        (65536, 1 << 33, True),
        (1, (1 << 32) - 1, True),
        (1, 1 << 32, False),
        ((1 << 32) + 1, 9, True),
    ],
)
def test_a_tile_of_a_shard_has_one_key(start, n, have):
    assert tiles_have_keys(start, n) == have
