"""The coefficients of an update: a row of numbers per parameter, made here and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor


class Coefficient:
    """Columns of the `coefficients` of `masked_adamw_`: float64 [P, COUNT], a row per parameter."""

    APPLY = 0  # 1: update, 0: leave everything of this parameter as it is
    GRAD_FACTOR = 1  # clip factor / loss scale, negative to maximize
    DECAY_STEP = 2  # lr * weight_decay
    ONE_MINUS_BETA1 = 3
    BETA2 = 4
    ONE_MINUS_BETA2 = 5
    STEP_SIZE = 6  # lr / (1 - beta1 ** step)
    INV_SQRT_BC2 = 7  # 1 / sqrt(1 - beta2 ** step)
    EPS = 8
    PULL = 9  # weight of sign(param - anchor) in the gradient
    ROUNDING_KEY = 10  # 32 bits, for the random bits of weights and 8-bit moments: `rounding_keys`
    COUNT = 11


def write_options(rows: Tensor, *, lr: Tensor, betas: Tensor, eps: Tensor, weight_decay: Tensor) -> None:
    """Writes the coefficients that stay as they are from step to step.

    Args:
        rows: float64 [P, COUNT].
        lr, eps, weight_decay: float64 [P].
        betas: float64 [P, 2].
    """
    rest = 1 - betas
    rows[:, Coefficient.DECAY_STEP] = lr * weight_decay
    rows[:, Coefficient.ONE_MINUS_BETA1] = rest[:, 0]
    rows[:, Coefficient.BETA2] = betas[:, 1]
    rows[:, Coefficient.ONE_MINUS_BETA2] = rest[:, 1]
    rows[:, Coefficient.EPS] = eps


def write_step(
    rows: Tensor,
    *,
    apply: Tensor,
    grad_factor: Tensor,
    steps: Tensor,
    lr: Tensor,
    betas: Tensor,
    pull: Tensor,
    keys: Tensor | None = None,
) -> None:
    """Writes the other ones, those of one step. No host synchronisation.

    Args:
        rows: float64 [P, COUNT].
        apply, grad_factor, lr, pull: float64 [P]; see `Coefficient`.
        steps: float64 [P], updates taken, this one included. At least 1, but where `apply` is 0.
        betas: float64 [P, 2].
        keys: float64 [P], `rounding_keys`, if something is rounded at random.
    """
    columns = rows.unbind(1)
    # a parameter that has never been updated has no bias correction yet; its row is not applied
    first, second = (1 - betas ** steps.clamp(min=1)[:, None]).unbind(1)
    torch.div(lr, first, out=columns[Coefficient.STEP_SIZE])
    torch.rsqrt(second, out=columns[Coefficient.INV_SQRT_BC2])
    columns[Coefficient.APPLY].copy_(apply)
    columns[Coefficient.GRAD_FACTOR].copy_(grad_factor)
    columns[Coefficient.PULL].copy_(pull)
    if keys is not None:
        columns[Coefficient.ROUNDING_KEY].copy_(keys)
