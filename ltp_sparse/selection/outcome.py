"""The metadata that a selection leaves in its ticket."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ltp_sparse.selection.budgets import Budget
from ltp_sparse.tickets.counts import as_share


class ShortTicket(UserWarning):
    """Fewer entries have moved than were asked for."""


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
    """The metadata of a ticket that asked for `ks` entries by group and `found` so many in a pool of `pool` entries.

    Args:
        left_out: what -> how many parameters are not in the pool for that reason; zeros are left out

    Warns:
        ShortTicket: `found` is less.
    """
    if found < sum(ks):
        warnings.warn(
            f"select: {sum(ks):,} entries were asked for, only {found:,} of {pool:,} have moved; "
            "the ticket holds these. Tune longer, or lower the density",
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
