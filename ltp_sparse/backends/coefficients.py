"""The coefficients of an update: one row of numbers per parameter, computed from hyperparameters and step counts."""

from __future__ import annotations

from torch import Tensor


class Coefficient:
    """Columns of the `coefficients` of `masked_adamw_`: float64 [P, COUNT], a row per parameter."""

    APPLY = 0  # 1: update; 0: leave the parameter and its state as they are
    GRAD_FACTOR = 1  # clip factor / loss scale, negative to maximize
    DECAY_STEP = 2  # lr * weight_decay
    ONE_MINUS_BETA1 = 3
    BETA2 = 4
    ONE_MINUS_BETA2 = 5
    STEP_SIZE = 6  # lr / (1 - beta1 ** step)
    INV_SQRT_BC2 = 7  # 1 / sqrt(1 - beta2 ** step)
    EPS = 8
    PULL = 9  # weight of sign(param - anchor) in the gradient
    ROUNDING_KEY = 10  # 32 bits from `rounding_keys`, the seed of the random bits of weights and 8-bit moments
    COUNT = 11


HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "sign", "pull")
"""Columns of the hyperparameters from which coefficients are computed; the sign is -1 to maximize."""


def write_coefficients(
    rows: Tensor,
    *,
    hyper: Tensor,
    apply: Tensor,
    steps: Tensor,
    keys: Tensor,
    grad_scale: Tensor | None = None,
    pull_factor: Tensor | None = None,
) -> None:
    """Writes the coefficients of a step, without waiting for the device. `csrc/common/adamw.h` and Triton do the same.

    Args:
        rows: float64 [P, COUNT]; written.
        hyper: float64 [P, len(HYPER)].
        apply: float64 [P]; see `Coefficient`.
        steps: float64 [P], updates taken, this one included: at least 1, except where `apply` is 0.
        keys: float64 [P], from `rounding_keys`.
        grad_scale: one number, the loss scale that the gradients contain.
        pull_factor: one number that multiplies the pull.
    """
    lr, beta1, beta2, eps, weight_decay, sign, pull = hyper.unbind(1)
    # a parameter without an update yet would divide by 0; its row is not applied
    steps = steps.clamp(min=1)
    columns = {
        Coefficient.APPLY: apply,
        Coefficient.GRAD_FACTOR: sign if grad_scale is None else sign / grad_scale.double(),
        Coefficient.DECAY_STEP: lr * weight_decay,
        Coefficient.ONE_MINUS_BETA1: 1 - beta1,
        Coefficient.BETA2: beta2,
        Coefficient.ONE_MINUS_BETA2: 1 - beta2,
        Coefficient.STEP_SIZE: lr / (1 - beta1**steps),
        Coefficient.INV_SQRT_BC2: 1 / (1 - beta2**steps).sqrt(),
        Coefficient.EPS: eps,
        # a norm counts the pull of parameters with a gradient only
        Coefficient.PULL: apply * (pull if pull_factor is None else pull * pull_factor),
        Coefficient.ROUNDING_KEY: keys,
    }
    for column, values in columns.items():
        rows[:, column] = values
