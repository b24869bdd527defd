"""The metadata of a selected ticket."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ltp_sparse.selection.budgets import Budget
from ltp_sparse.tickets.counts import as_share


class ShortTicket(UserWarning):
    """Fewer entries moved than were requested."""


def describe(
    ks: Sequence[int],
    labels: Sequence[str],
    thresholds: Tensor,
    *,
    found: int,
    pool: int,
    density: float | None,
    budget: Budget,
    method: str,
    left_out: Mapping[str, int],
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The metadata of a ticket.

    Args:
        ks: the requested number of entries of each group.
        labels: the names of the groups.
        thresholds: float32 [G], the smallest selected score of each group; infinite if nothing was selected.
        found: the number of entries of the ticket.
        pool: the number of entries of the pool.
        density, budget, method, metadata: as in `select`.
        left_out: reason -> number of parameters left out for it.

    Warns:
        ShortTicket: fewer entries were found than requested.
    """
    if found < sum(ks):
        warnings.warn(
            f"select: {sum(ks):,} entries were requested, but only {found:,} of {pool:,} moved; the ticket holds "
            "these. Tune longer, or lower the density",
            ShortTicket,
            stacklevel=3,
        )
    left_out = {what: count for what, count in left_out.items() if count}
    return {
        "method": method,
        "density": float(as_share(density)) if density is not None else sum(ks) / pool,
        "budget": {pattern: float(as_share(share)) for pattern, share in budget.items()}
        if isinstance(budget, Mapping)
        else budget,
        "requested_k": sum(ks),
        "k": found,
        "thresholds": {label: t for label, t in zip(labels, thresholds.tolist(), strict=True) if t != float("inf")},
        **({"left_out": left_out} if left_out else {}),
        **(metadata or {}),
    }
