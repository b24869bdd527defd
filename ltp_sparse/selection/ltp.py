"""Stage 1 of LTP: the ticket of the weights that moved most in masked-language-model tuning."""

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
"""Strategy -> which parameters train and may be selected. "vanilla" needs a tied head, "decoupled" a decoupled one."""


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
    """Selects the winning ticket: the entries of the strategy's pool that moved most in tuning.

    With the global budget, `density` is a share of all maskable entries (277,414,656 in XLM-R-base) for every strategy,
    so that 20 % is always the same number of entries. For a segment, and with other budgets, it is a share of the pool.

    Args:
        initial: a module, a mapping from names to tensors, or a safetensors checkpoint.
        tuned: the tuned weights in any of these forms; None with a score. At least one of the two must have the whole
            base model.
        strategy: the strategy of the tuning, a key of `STRATEGIES`.
        density: share of the entries to select.
        budget: "global" (across layers), "layer" (each layer by itself), "tensor", or shares, see `select`.
        of: with the global budget, the entries of which `density` is a share: "model", or "pool", which for
            "frozen_embedding" has no embeddings.
        segment: selects from the "lower", "middle" or "upper" third of the layers only.
        intersect: with `segment`, selects from the whole model and keeps the part inside the segment.
        order: "most" selects the entries that moved most. "least" is a control: of the entries that moved, it selects
            those that moved least, in every tensor as many as "most" selects.
        score: ranks the entries in place of their change, see `select`.
        allow_missing: which parameters of the pool can be absent on one side, see `select`.
        metadata: further entries for the ticket's metadata, e.g. `MLMResult.metadata`.
        progress: show a progress bar.

    Returns:
        The ticket, with strategy, density, the number of maskable entries and k in its metadata.

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
        raise ValueError("find_ticket: order='least' ranks entries by their change; leave out score=")
    if intersect and segment is None:
        raise ValueError("find_ticket: intersect=True keeps the part inside a segment; pass segment= as well")
    sides = Sides.of(initial, tuned, score, what="find_ticket")
    sizes = [{name: tensor.numel() for name, tensor in side.items()} for side in (sides.base, sides.after)]
    maskable = max(sum(n for name, n in side.items() if pools.maskable(name)) for side in sizes)
    num_layers = len({layer_of(name) for side in sizes for name in side} - {"embeddings", "other"})
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
    """In every tensor, the entries that moved least but did move, as many of them as `most` has there."""
    sets = dict(most.sets)
    for name in most.active_names:
        base, after = {name: sides.base[name]}, {name: sides.after[name]}
        sets |= select(base, score=least_changed(base, after), k=most.sets[name].k).sets
    return Ticket(sets, most.shapes, {**most.metadata, "method": "ltp, least changed"}, most.fingerprint)


def least_changed(before: Mapping[str, Readable], after: Mapping[str, Readable]) -> ScoreFunction:
    """A score for `select` that is larger for entries that moved less. Entries that did not move score 0.

    The bits of a score are those of the largest finite float32 minus those of |after - before|, which exactly reverses
    the order.
    """

    def score(name: str, start: int, stop: int) -> Tensor:
        keys = delta_keys(*(read_piece(tensors[name], start, stop) for tensors in (before, after)))
        return torch.where(keys > 0, _LARGEST_KEY - keys, 0).view(torch.float32)

    return score
