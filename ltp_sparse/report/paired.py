"""Paired comparisons: every label against a reference label, run by run on the same seed and data."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltp_sparse.recipes.recipe import look_up
from ltp_sparse.report.escaping import Bold, Sheet, plain

_EXACT = 15


@dataclass(frozen=True)
class Comparison:
    """A label minus the reference, in points.

    Attributes:
        facts: what both have in common besides the seed (shots, ...)
        runs: pairs
        mean: of the differences
        interval: 95 % interval of the mean (Student's t); infinite for a single pair
        p_value: two-sided, of the sign-flip permutation test: exact up to 15 pairs
    """

    label: str
    facts: tuple[Any, ...]
    runs: int
    mean: float
    interval: tuple[float, float]
    p_value: float


def compare(rows: Sequence[Mapping[str, Any]], reference: str, by: Sequence[str]) -> list[Comparison]:
    """Every label against `reference`, over seeds; runs of the same facts and seed make a pair.

    Args:
        by: facts as in the recipe; "label" itself is left out. Labels without such pairs are left out, too.
    """
    paths = [path for path in by if path != "label"]
    runs: dict[str, dict[tuple[Any, ...], dict[Any, float]]] = {}
    for row in rows:
        facts = tuple(look_up(row, path) for path in paths)
        runs.setdefault(str(row["label"]), {}).setdefault(facts, {})[row["seed"]] = row["mean"]
    found = []
    for label, of_label in runs.items():
        for facts, scores in of_label.items():
            theirs = runs.get(reference, {}).get(facts, {})
            differences = [100 * (score - theirs[seed]) for seed, score in scores.items() if seed in theirs]
            if label != reference and differences:
                found.append(
                    Comparison(label, facts, len(differences), *mean_interval(differences), _sign_flips(differences))
                )
    return found


def comparison_table(comparisons: Sequence[Comparison], reference: str, by: Sequence[str]) -> str:
    """A Markdown table; differences whose interval leaves out 0 are bold."""
    return comparison_sheet(comparisons, reference, by).markdown()


def comparison_sheet(comparisons: Sequence[Comparison], reference: str, by: Sequence[str]) -> Sheet:
    """The same, for any format."""
    paths = [path for path in by if path != "label"]
    out = [["label", *paths, "pairs", f"minus {reference}", "95 % interval", "p"]]
    for found in comparisons:
        low, high = found.interval
        mean = f"{found.mean:+.2f}"
        text = "" if math.isinf(high) else f"{low:+.2f} to {high:+.2f}"
        clear = low > 0 or high < 0
        cells = [Bold(mean) if clear else mean, text, f"{found.p_value:.3f}"]
        out.append([found.label, *map(plain, found.facts), str(found.runs), *cells])
    return Sheet(out, [False] * (1 + len(paths)) + [True] * 4)


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean, and its 95 % interval by Student's t; infinite for a single value."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return mean, (-math.inf, math.inf)
    from scipy.special import stdtrit  # the quantile of Student's t, without the half second that scipy.stats takes

    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return mean, (mean - half, mean + half)


def _sign_flips(differences: Sequence[float]) -> float:
    """Share of sign patterns whose sum is at least as far from 0; above 15 pairs, by the normal approximation."""
    total = abs(math.fsum(differences))
    if len(differences) > _EXACT:
        spread = math.sqrt(math.fsum(d * d for d in differences))
        return 2 * (1 - statistics.NormalDist().cdf(total / spread)) if spread else 1.0
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(value >= total - 1e-12 for value in sums) / len(sums)
