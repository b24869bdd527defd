"""The number of entries that a share of a model stands for."""

from __future__ import annotations

import math
import numbers
from decimal import Decimal
from fractions import Fraction
from typing import Any

from torch import Tensor


def as_share(share: Any, what: str = "density") -> Fraction:
    """A share in [0, 1] in exact decimals: 0.2 means one fifth.

    Args:
        share: an int, a float, a Fraction, a Decimal or a numpy number.
        what: its name, for messages.

    Raises:
        TypeError: `share` is no number; True and "0.2" do not count as numbers.
        ValueError: `share` is not in [0, 1].
    """
    if isinstance(share, Tensor):
        raise TypeError(f"{what} must be a number, got a tensor; pass {what}={share.tolist()}")
    if isinstance(share, bool) or not isinstance(share, numbers.Real | Decimal):
        raise TypeError(f"{what} must be a number in [0, 1], e.g. 0.2, got {share!r} ({type(share).__name__})")
    if not 0 <= float(share) <= 1:
        raise ValueError(f"{what} must be in [0, 1], got {share}")
    return Fraction(str(share))


def entries_for(pool: int, *, density: float | None = None, k: int | None = None) -> int:
    """floor(density * pool), computed in exact decimals (`as_share`), or k.

    Args:
        pool: entries of the pool.
        density: the share.
        k: the number, instead of `density`.

    Raises:
        TypeError: `density` is no number, or `k` no integer.
        ValueError: neither or both are given, or the value does not fit the pool.
    """
    if (density is None) == (k is None):
        raise ValueError(f"pass either density= or k=, got density={density} and k={k}")
    if density is not None:
        return math.floor(as_share(density) * pool)
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise TypeError(f"k must be a whole number, the entries to take, got {k!r} ({type(k).__name__})")
    if not 0 <= k <= pool:
        raise ValueError(f"k must be in [0, {pool:,}], the entries of the pool, got {k:,}")
    return int(k)
