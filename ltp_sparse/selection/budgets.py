"""Budgets: how many entries each group of parameters gets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

from torch import Size

from ltp_sparse.tickets.counts import as_share, entries_for
from ltp_sparse.weights.names import layer_of

Budget = str | Mapping[str, float]
"""The division of k: "global", "layer", "tensor", or shares of k by regular expression over names."""

_LABELS: dict[str, Callable[[str], str]] = {"global": lambda name: "all", "layer": layer_of, "tensor": str}
"""Division -> the label of a parameter's group."""


def share_out(
    shapes: Mapping[str, Size], budget: Budget, *, density: float | None, k: int | None
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Divides a budget among groups of parameters.

    Args:
        shapes: name -> shape of the parameters of the pool.
        budget: "global" is one group. "layer" and "tensor" select floor(density * entries) from every layer
            (embeddings, layer 0, ...) or parameter. With shares by regular expression (SC-SFT), each group gets
            floor(share * k) entries; a parameter belongs to the first expression that matches its name, and without a
            match it is not in the pool.
        density: share of all entries to select.
        k: the number of entries to select, instead of `density`.

    Returns:
        (names of the pool, group of each name, labels of the groups, number of entries to select from each group)

    Raises:
        ValueError: an expression matches nothing, shares exceed 1, or a group has fewer entries than requested.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    if isinstance(budget, Mapping):
        matched = {name: next((p for p in budget if re.search(p, name)), None) for name in sizes}
        label_of = {name: pattern for name, pattern in matched.items() if pattern is not None}
        for pattern in budget:
            if pattern not in label_of.values():
                raise ValueError(f"budget: the expression {pattern!r} matches no parameter of the pool")
        shares = {pattern: as_share(share, f"budget: the share of {pattern!r}") for pattern, share in budget.items()}
        if not shares:
            raise ValueError("budget: expected shares by regular expression, got an empty mapping")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"budget: the shares must not exceed 1, got {sum(budget.values())}")
    elif isinstance(budget, str) and budget in _LABELS:
        label_of = {name: _LABELS[budget](name) for name in sizes}
    else:
        raise ValueError(f"budget must be global, layer, tensor or shares by expression, got {budget!r}")

    labels = list(dict.fromkeys(label_of.values()))
    pools = {label: sum(sizes[name] for name, at in label_of.items() if at == label) for label in labels}
    total = entries_for(sum(sizes.values()), density=density, k=k)
    if isinstance(budget, Mapping):
        ks = [math.floor(shares[label] * total) for label in labels]
    else:
        part = Fraction(total, sum(sizes.values())) if density is None else as_share(density)
        ks = [total] if budget == "global" else [math.floor(part * pools[label]) for label in labels]
    for label, wanted in zip(labels, ks, strict=True):
        if wanted > pools[label]:
            raise ValueError(f"budget: {wanted:,} entries are requested from {label!r}, which has {pools[label]:,}")
    names = list(label_of)
    return names, [labels.index(label_of[name]) for name in names], labels, ks
