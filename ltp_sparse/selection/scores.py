"""Ready-made scores for `select(model, score=...)`, which takes the entries with the largest absolute score.

ticket = ls.select(model, score=scores.magnitude(model), density=0.2)
ticket = ls.select(model, score=scores.fisher(model, (model(**batch).loss for batch in batches)), density=0.005)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ltp_sparse.ops.sources import Reader
from ltp_sparse.selection.sources import ScoreFunction
from ltp_sparse.tickets.ticket import Pool, in_pool
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.versions import Weights, open_weights


def magnitude(weights: Weights) -> ScoreFunction:
    """|weight| (Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015).

    Args:
        weights: a module, a mapping from names to tensors, or the path of a checkpoint, which is streamed.
    """
    readers = {name: Reader.of(tensor) for name, tensor in open_weights(weights).items()}

    def score(name: str, start: int, stop: int) -> Tensor:
        reader = readers[name]
        piece = reader.read(start, stop)
        if reader.release is None:
            return piece
        piece = piece.clone()
        reader.release(start, stop)
        return piece

    return score


def gradient_magnitude(model: nn.Module, losses: Iterable[Tensor], pool: Pool = None) -> dict[str, Tensor]:
    """Sum of |gradient| over losses; see `fisher` for the arguments."""
    return _accumulated(model, losses, pool, lambda weight, gradient: gradient.abs())


def fisher(model: nn.Module, losses: Iterable[Tensor], pool: Pool = None) -> dict[str, Tensor]:
    """Sum of gradient^2 over losses, as in FISH masks (Sung et al., "Training Neural Networks with Fixed Sparse Masks",
    NeurIPS 2021). With one example per loss it is the diagonal of the empirical Fisher information.

    Args:
        model: its weights and `.grad` do not change.
        losses: scalars computed from the model. Pass a generator, so that one graph exists at a time.
        pool: which parameters are scored; the others need no memory.

    Returns:
        Canonical name -> float32 tensor in the parameter's shape, zero where no loss depends on an entry.

    Raises:
        ValueError: the pool holds no parameter, or one of it does not require a gradient.
    """
    return _accumulated(model, losses, pool, lambda weight, gradient: gradient.square())


def movement(model: nn.Module, losses: Iterable[Tensor], pool: Pool = None) -> dict[str, Tensor]:
    """Sum of -weight * gradient over losses, or 0 if it is negative: how far descent moves a weight away from zero.

    Movement pruning (Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020) keeps the weights
    with the largest sums. Weights that move towards zero score 0 and are never selected. See `fisher` for the
    arguments. To follow a training run, let the generator `losses` step the optimizer between its losses.
    """
    totals = _accumulated(model, losses, pool, lambda weight, gradient: -weight * gradient)
    return {name: total.clamp_(min=0) for name, total in totals.items()}


SCORES: dict[str, Callable[[nn.Module, Iterable[Tensor], Pool], dict[str, Tensor]]] = {
    "gradient": gradient_magnitude,
    "fisher": fisher,
    "movement": movement,
}
"""Name -> score that is computed from losses."""


def _accumulated(
    model: nn.Module, losses: Iterable[Tensor], pool: Pool, term: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    named = canonical_parameters(model)
    parameters = {name: named[name] for name in in_pool(named, pool)}
    if frozen := [name for name, parameter in parameters.items() if not parameter.requires_grad]:
        raise ValueError(
            f"scores: {frozen[0]!r} does not require a gradient; call requires_grad_(), or leave it out with pool="
        )
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            for total, parameter, gradient in zip(totals.values(), parameters.values(), gradients, strict=True):
                if gradient is not None:
                    dense = gradient.to_dense() if gradient.is_sparse else gradient
                    total += term(parameter.float(), dense.float())
    return totals
