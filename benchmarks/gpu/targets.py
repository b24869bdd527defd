"""What is to be reached on an H200, and whether the rows of a results folder reach it: the last table of the report.

All bars stand here. They are for XLM-R-base (277 million entries) with uniformly random masks and, of `masked_adamw_`,
for replayed steps; ours is the fastest backend. Ratios are those of one run, in one cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Rows = Sequence[Mapping[str, str]]
Results = Mapping[str, Rows]
"""Operation -> rows of its CSV file."""
Value = Callable[[Results], float | None]
"""A number of the results; None: not measured."""

OURS, FUSED, FLASH = "MaskedAdamW (", "torch AdamW(fused=True)", "flashoptim FlashAdamW"
MULTIPLIED, GATHERED = "grad.mul_(mask) + fused", "index_select + fused + index_copy_"
FLASH_FLOOR_MS = 0.79  # 12.25 bytes an entry at 4.3 TB/s: what FlashAdamW needs at least, where it is not installed
SAMPLE, HISTOGRAM, SELECTION = "topk_delta, sample (", "topk_delta, histogram (", "topk_delta, "
TOPK, KTHVALUE = "sub + abs + cat + topk(sorted=False)", "sub + abs + cat + kthvalue"
CUB = "CUB DeviceTopK on weights in one tensor"
TEMPORARY = 0.205 + 8e6 / 277_414_656  # contract 2 of docs/contracts.md


class Target(NamedTuple):
    """bar: the least, or with `at_most` the largest, value that is good enough, in `unit`."""

    what: str
    bar: float
    unit: str
    value: Value
    at_most: bool = False


def numbers(rows: Rows, column: str, provider: str, **cell: object) -> list[float]:
    """A column of the verified rows of one cell, of providers whose names begin so."""
    return [
        float(row[column])
        for row in rows
        if row["verified"] == "True"
        and row["provider"].startswith(provider)
        and row[column]
        and all(float(row[key]) == value if key == "density" else row[key] == value for key, value in cell.items())
    ]


def step(density: float, provider: str = OURS, precision: str = "float32", column: str = "p50_ms") -> Value:
    """By default milliseconds; of what cannot be captured in a graph, those of an eager step."""
    cell = {"model": "base", "density": density, "precision": precision, "masks": "uniform"}

    def value(results: Results) -> float | None:
        mode = "eager" if provider == FLASH else "graph"
        found = numbers(results["masked_adamw"], column, provider, mode=mode, **cell)
        return (max if column == "share_of_copy" else min)(found, default=None)

    return value


def selection(provider: str, model: str = "base", dtype: str = "float32") -> Value:
    """Milliseconds."""
    cell = {"model": model, "density": 0.2, "dtype": dtype, "deltas": "normal"}
    return lambda results: min(numbers(results["topk_delta"], "p50_ms", provider, **cell), default=None)


def temporary(results: Results) -> float | None:
    """Of the route that takes the most."""
    cell = {"model": "base", "density": 0.2, "dtype": "float32", "deltas": "normal"}
    found = numbers(results["topk_delta"], "temporary_bytes_per_entry", SELECTION, **cell)
    return max(found, default=None)


def ratio(mine: Value, other: Value) -> Value:
    """How many times faster ours is."""

    def value(results: Results) -> float | None:
        ours, theirs = mine(results), other(results)
        return None if ours is None or theirs is None else theirs / ours

    return value


def flash(results: Results) -> float:
    """FlashAdamW's milliseconds."""
    measured = step(0.2, FLASH, "bfloat16-8bit")(results)
    return FLASH_FLOOR_MS if measured is None else measured


BF16, CODED = "bfloat16", "bfloat16-8bit"
FASTER = [(0.2, FUSED, 1.9), (0.2, MULTIPLIED, 2.5), (0.2, GATHERED, 1.4)]
FASTER += [(0.05, FUSED, 4.3), (0.01, FUSED, 13), (0.5, FUSED, 1.3), (0.75, FUSED, 1.09)]
TARGETS = [
    *(
        Target(f"step, float32, {100 * at:g} %: against {peer}", bar, "x", ratio(step(at), step(at, peer)))
        for at, peer, bar in FASTER
    ),
    Target("step, float32, 20 %: share of a copy's bandwidth", 0.86, "", step(0.2, column="share_of_copy")),
    Target(f"step, bfloat16, 20 %: against {FUSED}", 1.35, "x", ratio(step(0.2, OURS, BF16), step(0.2, FUSED, BF16))),
    Target(
        f"step, bfloat16, 8-bit states, 20 %: against {FLASH}, or {FLASH_FLOOR_MS} ms without it",
        1.5, "x", ratio(step(0.2, OURS, CODED), flash),
    ),
    Target("state, float32, 20 %", 1.76, " bytes/entry", step(0.2, column="state_bytes_per_entry"), at_most=True),
    Target(
        "state, 8-bit, 20 %", 0.56, " bytes/entry", step(0.2, OURS, CODED, "state_bytes_per_entry"), at_most=True
    ),
    Target("selection, float32, 20 %: sampled bracket", 0.75, " ms", selection(SAMPLE), at_most=True),
    Target("selection, float32, 20 %: histogram", 1.35, " ms", selection(HISTOGRAM), at_most=True),
    Target(f"selection, float32, 20 %: against {TOPK}", 8, "x", ratio(selection(SELECTION), selection(TOPK))),
    Target(f"selection, float32, 20 %: against {CUB}", 2, "x", ratio(selection(SELECTION), selection(CUB))),
    Target(
        f"selection, float32, 20 %: against {KTHVALUE}", 1000, "x", ratio(selection(SELECTION), selection(KTHVALUE))
    ),
    Target("selection, float32, 20 %: temporary memory", TEMPORARY, " bytes/entry", temporary, at_most=True),
    Target("selection, 7B, bfloat16, 20 %", 20, " ms", selection(SELECTION, "7b", BF16), at_most=True),
]  # fmt: skip


def table(results: Results) -> str:
    """Markdown: every target with its bar, what was measured, and whether that is enough."""
    lines = ["| target | bar | measured | met |", "|---|---|---|---|"]
    for target in TARGETS:
        value = target.value(results)
        bar = f"at {'most' if target.at_most else 'least'} {target.bar:.4g}{target.unit}"
        if value is None:
            lines.append(f"| {target.what} | {bar} | not measured | |")
            continue
        met = value <= target.bar if target.at_most else value >= target.bar
        lines.append(f"| {target.what} | {bar} | {value:.4g}{target.unit} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)
