"""Inputs for tests and benchmarks: the tensor shapes of XLM-R, weights before and after tuning, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Size, Tensor

from ltp_sparse.deltas.entries import gather
from ltp_sparse.ops import adamw_coefficients, masked_adamw_
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.tickets.tile_table import TileTable


def xlmr_shapes(
    *,
    layers: int = 12,
    hidden: int = 768,
    intermediate: int = 3072,
    vocabulary: int = 250_002,
    positions: int = 514,
    embeddings: bool = True,
) -> dict[str, Size]:
    """Canonical name -> shape of the maskable parameters (docs/papers.md): base model, no LayerNorms, no pooler.

    The defaults are XLM-R-base: 147 tensors of 277,414,656 entries, 85,017,600 of them outside the embeddings.

    Args:
        layers: number of layers.
        hidden: hidden size.
        intermediate: inner size of the feed-forward part.
        vocabulary: rows of the word embedding.
        positions: rows of the position embedding.
        embeddings: whether the embeddings are included.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if embeddings:
        shapes["roberta.embeddings.word_embeddings.weight"] = (vocabulary, hidden)
        shapes["roberta.embeddings.position_embeddings.weight"] = (positions, hidden)
        shapes["roberta.embeddings.token_type_embeddings.weight"] = (1, hidden)
    for layer in range(layers):
        linears = {
            **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), (hidden, hidden)),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (intermediate, hidden),
            "output.dense": (hidden, intermediate),
        }
        for linear, shape in linears.items():
            shapes[f"roberta.encoder.layer.{layer}.{linear}.weight"] = shape
            shapes[f"roberta.encoder.layer.{layer}.{linear}.bias"] = shape[:1]
    return {name: Size(shape) for name, shape in shapes.items()}


def random_weights(shapes: Mapping[str, Sequence[int]], *, seed: int = 0, scale: float = 0.02) -> dict[str, Tensor]:
    """Name -> float32 tensor, normal with standard deviation `scale` (XLM-R's initialisation)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu").mul_(scale)
        for name, shape in shapes.items()
    }


def tuned_weights(
    initial: Mapping[str, Tensor], *, seed: int = 1, scale: float = 1e-3, untouched_rows: float = 0.0
) -> dict[str, Tensor]:
    """Name -> weights after a tuning run: normal deltas of standard deviation `scale`, in the dtype of `initial`.

    Args:
        initial: weights before tuning.
        seed: seed of the deltas.
        scale: standard deviation of the deltas.
        untouched_rows: share of the rows of every embedding matrix that keep their values, as for absent words.
    """
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in initial.items():
        delta = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").mul_(scale)
        if untouched_rows and "embeddings" in name:
            delta[torch.rand(len(delta), generator=generator, dtype=torch.float32, device="cpu") < untouched_rows] = 0
        tuned[name] = delta.add_(tensor).to(tensor.dtype)
    return tuned


@dataclass
class UpdateProblem:
    """The arguments of one `masked_adamw_` call with zero moments, and its ticket.

    Attributes:
        ticket: the active entries.
        params: the weights, in the order of the ticket.
        grads: their gradients.
        exp_avg, exp_avg_sq: moments of the k active entries, float32 [k], or codes of 8 bits if there are `scales`.
        table: the tiles of the ticket.
        coefficients: float64, as from `adamw_coefficients`.
        scales: float32 [blocks, 2], the scales of 8-bit moments.
        master: float32 [k], the masters of the active entries.
        stochastic: whether weights are rounded stochastically.
    """

    ticket: Ticket
    params: list[Tensor]
    grads: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    table: TileTable
    coefficients: Tensor
    scales: Tensor | None = None
    master: Tensor | None = None
    stochastic: bool = False

    def args(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, TileTable, Tensor]:
        """The positional arguments of `masked_adamw_`."""
        return self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.table, self.coefficients

    def step(self, coefficients: Tensor | None = None, anchor: Tensor | None = None) -> None:
        """One update, by default with the problem's coefficients."""
        masked_adamw_(
            *self.args()[:5], self.coefficients if coefficients is None else coefficients, anchor,
            scales=self.scales, master=self.master, stochastic=self.stochastic,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """All tensors that an update writes."""
        optional = (self.scales, self.master)
        return [*self.params, self.exp_avg, self.exp_avg_sq, *(tensor for tensor in optional if tensor is not None)]

    def slots(self) -> list[slice]:
        """The slots of every parameter in the packed buffers."""
        ends = list(accumulate(self.table.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.table.counts, strict=True)]


def update_problem(
    shapes: Mapping[str, Sequence[int]],
    *,
    density: float,
    seed: int = 0,
    lr: float = 2e-5,
    weight_decay: float = 0.01,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    states: str = "float32",
    master: bool = False,
    stochastic: bool = False,
) -> UpdateProblem:
    """A first update of random weights on a uniformly random ticket of exactly floor(density * n) entries.

    Args:
        shapes: name -> shape of the parameters.
        density: active share.
        seed: seed of weights, gradients and ticket.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        dtype: dtype of the weights.
        grad_dtype: dtype of the gradients; None: that of the weights.
        states, master, stochastic: as in `MaskedAdamW`.
    """
    ticket = Ticket.full(shapes) if density == 1 else Ticket.random(shapes, density=density, seed=seed)
    params = random_weights({name: ticket.shapes[name] for name in ticket.sets}, seed=seed)
    grads = random_weights(ticket.shapes, seed=seed + 1, scale=1e-3)
    table = TileTable.build(list(ticket.sets.values()))
    coded = states == "8bit"
    rounded = [param.to(dtype) for param in params.values()]
    coefficients = adamw_coefficients(
        torch.ones(len(params), dtype=torch.float32, device="cpu"), lr=lr, weight_decay=weight_decay, seed=seed
    )
    return UpdateProblem(
        ticket,
        rounded,
        [grad.to(grad_dtype or dtype) for grad in grads.values()],
        torch.zeros(table.k, dtype=torch.int8 if coded else torch.float32, device="cpu"),
        torch.zeros(table.k, dtype=torch.uint8 if coded else torch.float32, device="cpu"),
        table,
        coefficients,
        torch.zeros(table.blocks, 2, dtype=torch.float32, device="cpu") if coded else None,
        torch.cat([gather(p, s).float() for p, s in zip(rounded, ticket.sets.values(), strict=True)])
        if master
        else None,
        stochastic,
    )
