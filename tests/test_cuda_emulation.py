"""The CUDA kernels' thread blocks, compiled for the CPU and run thread by thread: the bits of the reference.

This tests everything but what needs a GPU: races, the launch, and the compiler's own arithmetic.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import DTYPES, bits, using
from torch import Tensor

from ltp_sparse import backends
from ltp_sparse.ops import adamw_coefficients, masked_pack_, masked_sum_squares
from ltp_sparse.reference import Coefficient
from ltp_sparse.rounding import rounding_keys
from ltp_sparse.testing import UpdateProblem, update_problem

ROOT = Path(__file__).parents[1]
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
def library(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("cuda") / "emulation.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    source = Path(__file__).with_name("cuda_emulation.cpp")
    subprocess.run(["c++", *flags, f"-I{ROOT / 'csrc'}", "-o", str(path), str(source)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.table_size.restype = ctypes.c_size_t
    return loaded


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None and tensor.numel() else None)


class Emulation:
    """The arguments of a launch; keeps their memory alive."""

    def __init__(self, library, problem: UpdateProblem, rows: Tensor, anchor: Tensor | None, parts: int) -> None:
        self.library, self.problem, self.parts = library, problem, parts
        table = problem.table.with_ranks()
        self.packed = isinstance(problem.grads, Tensor)
        grads = [problem.grads] * len(problem.params) if self.packed else problem.grads
        pairs = [
            [param.data_ptr(), 0 if grad is None else grad.data_ptr()]
            for param, grad in zip(problem.params, grads, strict=True)
        ]
        self.codes = backends.DTYPES[problem.params[0].dtype], backends._grad_code([g for g in grads if g is not None])
        self.keep = [torch.tensor(pairs), table, rows, anchor]
        self.place = pointer(table.tiles), ctypes.c_int64(len(table.tiles))
        self.index = pointer(table.words), pointer(table.ranks), pointer(table.positions)
        self.table = ctypes.create_string_buffer(library.table_size())
        library.store_table(
            self.table, pointer(self.keep[0]), *self.codes, int(self.packed), *self.place, *self.index,
            pointer(rows), pointer(anchor), pointer(problem.master), parts,
        )  # fmt: skip

    def sum_squares(self) -> Tensor:
        out = torch.full((len(self.problem.table.tiles), self.parts), float("nan"), dtype=torch.float64)
        self.library.emulated_masked_sum_squares(self.table, pointer(out))
        return out.sum(1)

    def update(self) -> None:
        p = self.problem
        self.library.emulated_masked_adamw_(
            self.table, pointer(p.exp_avg), pointer(p.exp_avg_sq), pointer(p.scales), int(p.stochastic)
        )

    def pack(self, out: Tensor, accumulate: bool) -> None:
        grads = torch.tensor([0 if grad is None else grad.data_ptr() for grad in self.problem.grads])
        code = self.codes[1]
        table = ctypes.create_string_buffer(self.library.table_size())
        self.library.store_table(
            table, pointer(grads), code, code, 0, *self.place, *self.index, None, None, None, self.parts
        )
        self.library.emulated_masked_pack_(table, pointer(out), int(accumulate))


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
    for packed, with_anchor, parts in ((False, False, 16), (False, True, 3), (True, False, 1)):
        options = {"dtype": dtype, "grad_dtype": grad_dtype, **mode}
        wanted, found = problem_of(density, **options), problem_of(density, **options)
        anchor = torch.linspace(-0.03, 0.03, found.table.k) if with_anchor else None
        with using("reference"):
            if packed:
                flat = torch.full((found.table.k,), 0.5)
                emulated = flat.clone()
                for accumulate in (False, True):
                    masked_pack_(wanted.grads, flat, wanted.table, accumulate=accumulate)
                    Emulation(library, found, rows_of(found, 1), None, parts).pack(emulated, accumulate)
                assert torch.equal(bits(flat), bits(emulated))
                wanted.grads = found.grads = flat
            else:
                wanted.grads[1] = found.grads[1] = None
            for step in (1, 2):
                rows = rows_of(found, step)
                emulation = Emulation(library, found, rows, anchor, parts)
                sums = masked_sum_squares(wanted.params, wanted.grads, wanted.table, rows, anchor, master=wanted.master)
                torch.testing.assert_close(emulation.sum_squares(), sums, rtol=1e-12, atol=0)
                emulation.update()
                wanted.step(rows, anchor)
        for number, (a, b) in enumerate(zip(found.tensors(), wanted.tensors(), strict=True)):
            assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b))), (packed, parts, number)
