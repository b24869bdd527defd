"""Stage 1 of LTP: the ticket of the weights that moved most while a masked language model was tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ltp_sparse.backends.reference import delta_keys
from ltp_sparse.selection import Weights, pools, select
from ltp_sparse.selection.budgets import Budget
from ltp_sparse.selection.sources import Score, ScoreFunction, Sides
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.checkpoints import Readable, read_piece
from ltp_sparse.weights.names import layer_of
from ltp_sparse.weights.versions import Missing

_LARGEST_KEY = 0x7F7FFFFF  # the bits of the largest finite float32

STRATEGIES: dict[str, Callable[[str], bool]] = {
    "vanilla": pools.maskable,
    "decoupled": pools.maskable,
    "frozen_embedding": pools.without_embeddings,
}
"""What may move in tuning and be selected. "vanilla" wants a tied LM head, "decoupled" a decoupled one."""


def find_ticket(
    initial: Weights,
    tuned: Weights | None,
    *,
    strategy: str = "decoupled",
    density: float = 0.2,
    budget: Budget = "global",
    of: str = "model",
    segment: str | None = None,
    intersect: bool = False,
    order: str = "most",
    score: Score | None = None,
    allow_missing: Missing = False,
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Ticket:
    """The winning ticket: the entries of the strategy's pool that tuning moved most.

    With the global budget, `density` counts against all maskable entries (277,414,656 of XLM-R-base) for every
    strategy, so that "20 %" is the same number of entries; in a segment, and for the other budgets, against the pool.

    Args:
        initial, tuned: modules, mappings from names to tensors, or safetensors checkpoints; at least one of them must
            hold the whole base model. With a score, `tuned` is None.
        strategy: that of the tuning.
        budget: "global" (across layers), "layer" (layer separate), "tensor", or shares, see `select`.
        of: what `density` counts against with the global budget: "model", or "pool", the strategy's: of
            "frozen_embedding" the encoder.
        segment: "lower", "middle" or "upper" third of the layers only.
        order: "most" changed; or "least", a control: in every tensor as many as "most" takes there, those that moved
            least of all that moved.
        score: ranks by it instead of by change, see `select`.
        allow_missing: which parameters of the pool may be on one side only, see `select`.
        intersect: with `segment`: the part of the whole model's ticket that lies in the segment.
        metadata: added to the ticket's, e.g. `MLMResult.metadata`.

    Raises:
        ValueError: unknown strategy or segment, a parameter on one side only, or a budget above its pool.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"find_ticket: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if order not in ("most", "least"):
        raise ValueError(f"find_ticket: order must be most or least, got {order!r}")
    if of not in ("model", "pool"):
        raise ValueError(f"find_ticket: of must be model or pool, got {of!r}")
    if order == "least" and score is not None:
        raise ValueError("find_ticket: order='least' is a control of what moved; it takes no score")
    if intersect and segment is None:
        raise ValueError("find_ticket: intersect=True keeps the part inside a segment; pass segment=, too")
    sides = Sides.of(initial, tuned, score, what="find_ticket")
    sizes = [{name: tensor.numel() for name, tensor in side.items()} for side in (sides.base, sides.after)]
    maskable = max(sum(n for name, n in of.items() if pools.maskable(name)) for of in sizes)
    num_layers = len({layer_of(name) for of in sizes for name in of} - {"embeddings", "other"})
    in_segment = None if segment is None else pools.segment(segment, num_layers)
    pool = STRATEGIES[strategy] if in_segment is None or intersect else in_segment
    of_model = budget == "global" and of == "model" and pool is not in_segment
    ticket = select(
        sides.base,
        sides.after if score is None else None,
        score=score,
        k=entries_for(maskable, density=density, k=None) if of_model else None,
        density=None if of_model else density,
        budget=budget,
        pool=pool,
        allow_missing=allow_missing,
        method="ltp",
        metadata=metadata,
        progress=progress,
    )
    if order == "least":
        ticket = _least_changed(ticket, sides)
    if intersect:
        ticket = ticket.restrict(in_segment)
    ticket.metadata |= {"strategy": strategy, "density": density, "maskable": maskable, "k": ticket.k}
    if segment is not None:
        ticket.metadata |= {"segment": segment, "intersect": intersect}
    return ticket


def _least_changed(most: Ticket, sides: Sides) -> Ticket:
    """In every tensor as many entries as `most` has there: those that moved least, of those that moved."""
    sets = dict(most.sets)
    for name in most.active_names:
        base, after = {name: sides.base[name]}, {name: sides.after[name]}
        sets |= select(base, score=least_changed(base, after), k=most.sets[name].k).sets
    return Ticket(sets, most.shapes, {**most.metadata, "method": "ltp, least changed"}, most.fingerprint)


def least_changed(before: Mapping[str, Readable], after: Mapping[str, Readable]) -> ScoreFunction:
    """A score for `select` that is the larger the less an entry has moved, and 0, never selected, if it has not.

    Its bits are those of the largest finite float32 minus those of |after - before|: exactly the reverse order.
    """

    def score(name: str, start: int, stop: int) -> Tensor:
        pieces = (read_piece(tensors[name], start, stop) for tensors in (before, after))
        keys = delta_keys(*pieces)
        return torch.where(keys > 0, _LARGEST_KEY - keys, 0).view(torch.float32)

    return score
