"""What the update is tested with: modes, the combinations of dtypes that have them, and a problem with awkward rows."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from helpers.bits import DTYPES
from ltp_sparse.backends.coefficients import Coefficient
from ltp_sparse.backends.rounding import rounding_keys
from ltp_sparse.ops import adamw_coefficients
from ltp_sparse.testing import UpdateProblem, update_problem

MODES = {
    "plain": {},
    "8bit": {"states": "8bit"},
    "master": {"master": True},
    "8bit-master": {"states": "8bit", "master": True},
    "stochastic": {"stochastic": True},
    "8bit-stochastic": {"states": "8bit", "stochastic": True},
}
CASES = [
    (dtype, grad_dtype, mode)
    for dtype, grad_dtype, mode in itertools.product(DTYPES, DTYPES, MODES)
    if grad_dtype in (dtype, "f32")
    and (dtype == "bf16" or "stochastic" not in mode)
    and (dtype != "f32" or "master" not in mode)
]
"""(dtype of the parameters, dtype of the gradients, mode), by name."""


def options_of(dtype: str, grad_dtype: str, mode: str) -> dict:
    """The options of `update_problem` for a case."""
    return {"dtype": DTYPES[dtype], "grad_dtype": DTYPES[grad_dtype], **MODES[mode]}


def problem_of(sizes: tuple[int, ...], density: float, **options) -> UpdateProblem:
    """A problem whose gradients of inactive entries are NaN, so that reading one is seen."""
    problem = update_problem({f"p{number}": (n,) for number, n in enumerate(sizes)}, density=density, **options)
    for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
        grad[~problem.ticket.mask(name)] = float("nan")
    return problem


def rows_of(problem: UpdateProblem, step: int) -> Tensor:
    """The coefficients of a step with weight decay and a pull, in which parameter 2 is not updated."""
    steps = torch.full((len(problem.params),), step)
    rows = adamw_coefficients(steps, lr=1e-2, weight_decay=0.1, pull=0.3)
    rows[:, Coefficient.ROUNDING_KEY] = rounding_keys(3, steps, torch.arange(len(rows)))
    rows[2, Coefficient.APPLY] = 0
    return rows
