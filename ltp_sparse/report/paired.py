"""Paired comparisons: every label against a reference label, run by run on the same seed and data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ltp_sparse.recipes.recipe import look_up
from ltp_sparse.report.escaping import Bold, Sheet, plain

MARGIN = 1.5
"""Points within which two labels count as equal, unless a recipe says another number."""

_EXACT = 20


@dataclass(frozen=True)
class Comparison:
    """A label minus the reference, in points.

    Attributes:
        label: the label.
        facts: what both have in common besides the seed (shots, ...); empty for pooled comparisons.
        runs: the number of pairs, one per seed of a study.
        mean: the mean difference.
        interval: the 95 % interval of the mean (Student's t); infinite for a single pair.
        p_value: two-sided p-value of the sign-flip permutation test: exact up to 20 pairs of one study, else by
            Student's t.
        adjusted: the p-value after Holm's correction for all comparisons that were made with this one.
        equal_p: p-value of two one-sided t tests: small if the difference is within the margin.
    """

    label: str
    facts: tuple[Any, ...]
    runs: int
    mean: float
    interval: tuple[float, float]
    p_value: float
    adjusted: float
    equal_p: float

    def verdict(self, margin: float = MARGIN) -> str:
        """What the interval shows: equal within the margin, different, or neither."""
        low, high = self.interval
        differs = low > 0 or high < 0
        if -margin < low and high < margin:
            return f"equal within {margin:g}" + (", not the same" if differs else "")
        return "different" if differs else "not shown"

    def cells(self) -> tuple[str, str]:
        """The mean, bold if its interval leaves out 0, and the interval, which a single pair does not have."""
        (low, high), mean = self.interval, f"{self.mean:+.2f}"
        interval = "" if math.isinf(high) else f"{low:+.2f} to {high:+.2f}"
        return Bold(mean) if low > 0 or high < 0 else mean, interval


def compare(
    rows: Iterable[Mapping[str, Any]], reference: str, by: Sequence[str], *, margin: float = MARGIN, last: bool = False
) -> list[Comparison]:
    """Every label against a reference, for each set of facts in common.

    A seed is one pair. Its difference is the mean over all else that both have, such as languages of training.

    Args:
        rows: results.
        reference: the label to compare with.
        by: dotted paths of facts, as in the recipe; "label" is ignored.
        margin: the margin of `Comparison.equal_p`, in points.
        last: compare the scores of the last update instead of those of the best epoch on dev.

    Returns:
        The comparisons; labels without a pair have none.
    """
    groups = _differences(rows, reference, by, last).items()
    return _holm([_comparison(label, facts, differences, margin) for (label, facts), differences in groups])


def pool(
    rows: Iterable[Mapping[str, Any]], reference: str, by: Sequence[str], *, margin: float = MARGIN, last: bool = False
) -> list[Comparison]:
    """One comparison of each label over all sets of facts, if there are several.

    The difference of a seed is its mean over these sets; seeds that lack one of them are left out.

    Args:
        rows, reference, by, margin, last: as in `compare`.

    Returns:
        The comparisons; labels with a single set of facts, or without a common seed, have none.
    """
    labels: dict[str, list[Mapping[Any, float]]] = {}
    for (label, _), differences in _differences(rows, reference, by, last).items():
        labels.setdefault(label, []).append(differences)
    found = []
    for label, groups in labels.items():
        seeds = [seed for seed in groups[0] if all(seed in group for group in groups)]
        if len(groups) > 1 and seeds:
            means = {seed: statistics.fmean(group[seed] for group in groups) for seed in seeds}
            found.append(_comparison(label, (), means, margin))
    return _holm(found)


def combine(studies: Iterable[Sequence[Comparison]], *, margin: float = MARGIN) -> list[Comparison]:
    """One comparison of each label over studies that have no run in common, if several have it.

    A study counts as much as any other, by its pooled comparison or its only one. Intervals and p-values are Student's
    t with the degrees of freedom of Welch and Satterthwaite.

    Args:
        studies: the comparisons of each study with the same reference, by `pool` and `compare`.
        margin: the margin of `Comparison.equal_p`, in points.

    Returns:
        The comparisons, with Holm's correction over labels. A study is left out for a label of which it has a single
        pair, or several comparisons and no pooled one; a label needs two studies.
    """
    labels: dict[str, list[Comparison]] = {}
    for study in studies:
        for label in dict.fromkeys(comparison.label for comparison in study):
            mine = [comparison for comparison in study if comparison.label == label]
            pooled = [comparison for comparison in mine if not comparison.facts]
            one, *others = pooled or mine
            if not others and one.runs > 1:
                labels.setdefault(label, []).append(one)
    return _holm([_welch(label, parts, margin) for label, parts in labels.items() if len(parts) > 1])


def _welch(label: str, parts: Sequence[Comparison], margin: float) -> Comparison:
    """The mean of the comparisons of several studies, with the degrees of freedom of Welch and Satterthwaite."""
    from scipy.special import stdtrit

    mean, n = statistics.fmean(part.mean for part in parts), len(parts)
    # what each study adds to the variance of the mean, from its interval
    variances = [((part.interval[1] - part.mean) / float(stdtrit(part.runs - 1, 0.975)) / n) ** 2 for part in parts]
    error = math.sqrt(sum(variances))
    weighted = sum(variance**2 / (part.runs - 1) for variance, part in zip(variances, parts, strict=True))
    freedom = sum(variances) ** 2 / weighted if weighted else 1.0
    half = float(stdtrit(freedom, 0.975)) * error
    p_value = min(1.0, 2 * _above(abs(mean), error, freedom))
    equal_p = _equivalence(mean, margin, error, freedom)
    runs = sum(part.runs for part in parts)
    return Comparison(label, (), runs, mean, (mean - half, mean + half), p_value, p_value, equal_p)


def _differences(
    rows: Iterable[Mapping[str, Any]], reference: str, by: Sequence[str], last: bool
) -> dict[tuple[str, tuple[Any, ...]], dict[Any, float]]:
    """(label, facts) -> seed -> points above the reference, for seeds that both have."""
    paths = [path for path in by if path != "label"]
    runs: dict[tuple[str, tuple[Any, ...]], dict[Any, dict[Any, list[float]]]] = {}
    for row in rows:
        group = runs.setdefault((str(row["label"]), tuple(look_up(row, path) for path in paths)), {})
        part = look_up(row, "train.task"), look_up(row, "train.language")
        score = (row["last_update"] if last else row)["mean"]
        group.setdefault(row["seed"], {}).setdefault(part, []).append(score)
    found = {}
    for (label, facts), ours in runs.items():
        theirs = runs.get((reference, facts), {})
        differences = {}
        for seed, parts in ours.items():
            common = [part for part in parts if part in theirs.get(seed, {})]
            if common:
                scores = ([statistics.fmean(side[part]) for part in common] for side in (parts, theirs[seed]))
                one, other = map(statistics.fmean, scores)
                differences[seed] = 100 * (one - other)
        if label != reference and differences:
            found[label, facts] = differences
    return found


def _comparison(label: str, facts: tuple[Any, ...], differences: Mapping[Any, float], margin: float) -> Comparison:
    values = list(differences.values())
    n, (mean, interval), p_value = len(values), mean_interval(values), _sign_flips(values)
    equal_p = 1.0 if n == 1 else _equivalence(mean, margin, _error(values), n - 1)
    return Comparison(label, facts, n, mean, interval, p_value, p_value, equal_p)


def _holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Adds the adjusted p-values: of m, the i-th smallest times m - i + 1, and none below the one before."""
    order = sorted(range(len(comparisons)), key=lambda i: comparisons[i].p_value)
    found, least = list(comparisons), 0.0
    for position, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - position) * comparisons[i].p_value))
        found[i] = replace(comparisons[i], adjusted=least)
    return found


def comparison_sheet(
    comparisons: Sequence[Comparison], reference: str, by: Sequence[str], margin: float = MARGIN
) -> Sheet:
    """Comparisons as a table; differences are bold if their interval leaves out 0.

    Args:
        comparisons: the results of `compare` or `pool`.
        reference: the label that they are compared with.
        by: dotted paths of the facts, as in `compare`.
        margin: the margin of `Comparison.equal_p`, in points.
    """
    paths = [path for path in by if path != "label"]
    out = [
        ["label", *paths, "pairs", f"minus {reference}", "95 % interval", "p", "p, Holm", f"p, {margin:g}", "finding"]
    ]
    for found in comparisons:
        facts = found.facts or ("all",) * len(paths)
        p_values = [f"{p:.3f}" for p in (found.p_value, found.adjusted)]
        cells = [*found.cells(), *p_values, "" if found.runs == 1 else f"{found.equal_p:.3f}"]
        out.append([found.label, *map(plain, facts), str(found.runs), *cells, found.verdict(margin)])
    return Sheet(out, [False] * (1 + len(paths)) + [True] * 6 + [False])


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean and its 95 % interval (Student's t), which is infinite for a single value."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return mean, (-math.inf, math.inf)
    from scipy.special import stdtrit  # the quantile of Student's t, without the half second that scipy.stats takes

    half = float(stdtrit(n - 1, 0.975)) * _error(values)
    return mean, (mean - half, mean + half)


def _equivalence(mean: float, margin: float, error: float, freedom: float) -> float:
    """The larger p-value of two one-sided t tests: of a mean of at most -margin, and of at least margin."""
    return max(_above(mean + margin, error, freedom), _above(margin - mean, error, freedom))


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def _above(distance: float, error: float, freedom: float) -> float:
    """One-sided p-value (Student's t) of a mean with this standard error that is this far above a bound."""
    from scipy.special import stdtr

    if error == 0:
        return float(distance <= 0)
    return float(stdtr(freedom, -distance / error))


def _sign_flips(differences: Sequence[float]) -> float:
    """Share of sign patterns whose sum is at least as far from 0."""
    total = abs(math.fsum(differences))
    if (n := len(differences)) > _EXACT:
        return min(1.0, 2 * _above(total / n, _error(differences), n - 1))
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float((np.abs(sums) >= total - 1e-9).mean())
