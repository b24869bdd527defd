"""Targets on an H200, compared with the rows of a results folder: the last table of the report.

All are for XLM-R-base (277 million entries) with uniformly random masks or normal deltas, steps replayed from a graph,
and our fastest backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

Rows = Sequence[Mapping[str, str]]

OURS, SELECTED, SELECT, HISTOGRAM = "MaskedAdamW (", "topk_delta (", "select (", "topk_delta, histogram ("
FUSED, FLASH = "torch AdamW(fused=True)", "flashoptim FlashAdamW"
MULTIPLIED, GATHERED = "grad.mul_(mask) + fused", "index_select + fused + index_copy_"
TOPK, KTHVALUE = "sub + abs + cat + topk(sorted=False)", "sub + abs + cat + kthvalue"
COPY = "copy_ of whole tensors"
COPIES = {"masked_gather": 1.5, "masked_scatter_": 1.5, "masked_swap_": 0.8}
"""How many times faster than COPY; by the bytes it could be 1.8, 1.8 and .95 times in float32 at 20 %."""
CUB = "CUB DeviceTopK on weights in one tensor"
FASTER = {
    0.75: (1.09, 1.4, 1.9), 0.5: (1.3, 1.7, 1.7), 0.2: (1.9, 2.5, 1.4), 0.05: (4.3, 5.5, 1.4), 0.01: (13, 18, 2),
    0.0005: (100, 150, 10),
}  # fmt: skip
"""Density -> how many times faster a float32 step is than those of FUSED, MULTIPLIED and GATHERED."""
SHARES = {0.75: 0.87, 0.5: 0.87, 0.2: 0.86, 0.05: 0.7, 0.01: 0.5}
"""Density -> share of the floor that a float32 step reaches."""
FLASH_FLOOR_MS = 0.79  # 12.25 bytes an entry at 4.3 TB/s: what FlashAdamW needs at least, where it is not installed
TEMPORARY = 0.205 + 8e6 / 277_414_656  # contract 2 of docs/contracts.md
LAUNCHES = {"step": 2, "clipped": 3, "topk_delta": 8}
BF16, CODED = "bfloat16", "bfloat16-8bit"


class Floors:
    """The time that the memory of this device needs for the bytes of a row, from the measurements of `floors.py`.

    Bytes in whole sectors go at the rate of scattered updates of the nearest density, all others at that of a copy.
    """

    def __init__(self, rows: Rows) -> None:
        rates = [(row, float(row["bytes"]) / float(row["p50_ms"])) for row in rows]
        self.copy = next((rate for row, rate in reversed(rates) if row["name"] == "copy"), None)
        self.scattered: dict[tuple[bool, float], float] = {}
        scattered = [(row, rate) for row, rate in rates if row["name"] == "scattered"]
        widest = max((int(row["fetch_bytes"] or 0) for row, _ in scattered), default=0)  # the default of the device
        for row, rate in scattered:
            if int(row["fetch_bytes"] or 0) == widest:
                self.scattered[row["dtype"] == "float32", float(row["density"])] = rate

    def ms(self, row: Mapping[str, str]) -> float | None:
        """Milliseconds for the bytes of a row; None if they are unknown or no copy was measured."""
        if self.copy is None or not row["bytes"]:
            return None
        in_sectors = float(row["sector_bytes"] or 0)
        rates = {at: rate for (wide, at), rate in self.scattered.items() if wide == (row["precision"] == "float32")}
        if not in_sectors or not rates:
            return float(row["bytes"]) / self.copy
        nearest = min(rates, key=lambda at: abs(math.log(at / float(row["density"]))))
        return in_sectors / rates[nearest] + (float(row["bytes"]) - in_sectors) / self.copy

    def share(self, row: Mapping[str, str]) -> float | None:
        """The floor of a row divided by its measured time."""
        floor = self.ms(row)
        return None if floor is None else floor / float(row["p50_ms"])


class Results(NamedTuple):
    rows: Rows
    floors: Floors
    launches: Mapping[tuple[str, str], Rows]
    """(scene, backend) -> the launches and waits in it"""

    def best(self, provider: str, density: float = 0.2, precision: str = "float32", **cell: str) -> Mapping[str, str]:
        """The fastest row of the providers with this prefix; {} if there is none with times."""
        cell = {"model": "base", "precision": precision} | cell
        found = [
            row
            for row in self.rows
            if row["p50_ms"]
            and row["provider"].startswith(provider)
            and row["kind"] in ("uniform", "normal")
            and row["mode"] == ("graph" if row["op"] == "step" and provider != FLASH else "eager")
            and float(row["density"]) == density
            and all(row[name] == value for name, value in cell.items())
        ]
        return min(found, key=lambda row: float(row["p50_ms"]), default={})

    def number(self, provider: str, column: str = "p50_ms", **cell: object) -> float | None:
        text = self.best(provider, **cell).get(column)  # type: ignore[arg-type]
        return float(text) if text else None

    def faster(self, ours: str, peer: str, **cell: object) -> float | None:
        """How many times faster; by the ratios to the baseline if both have one, as both took turns with it."""
        for column in ("ratio", "p50_ms"):
            mine, theirs = self.number(ours, column, **cell), self.number(peer, column, **cell)
            if mine and theirs:
                return mine / theirs if column == "ratio" else theirs / mine
        return None

    def share(self, density: float) -> float | None:
        row = self.best(OURS, density)
        return self.floors.share(row) if row else None

    def counts(self, scene: str, waits: bool) -> float | None:
        """Launches or waits in a scene, of the backend with the fewest."""
        found = [rows for (name, _), rows in self.launches.items() if name == scene]
        return min((sum((row["wait"] == "True") == waits for row in rows) for rows in found), default=None)


Value = Callable[[Results], float | None]
"""None: not measured."""


class Target(NamedTuple):
    """A target: `value` must be at least `bar`, or with `at_most` at most `bar`, in `unit`."""

    what: str
    bar: float
    unit: str
    value: Value
    at_most: bool = False


def against_flash(results: Results) -> float | None:
    """How many times faster than FlashAdamW, or than the time that it needs at least, where it is not installed."""
    measured = results.faster(OURS, FLASH, precision=CODED)
    ours = results.number(OURS, precision=CODED)
    return measured or (FLASH_FLOOR_MS / ours if ours else None)


def select_overhead(results: Results) -> float | None:
    """The time of `ls.select` divided by that of its passes."""
    whole, passes = results.number(SELECT), results.number(SELECTED)
    return whole / passes if whole and passes else None


# Values of targets, by the methods of `Results` with the same names.


def number(provider: str, column: str = "p50_ms", **cell: object) -> Value:
    return lambda results: results.number(provider, column, **cell)


def faster(ours: str, peer: str, **cell: object) -> Value:
    return lambda results: results.faster(ours, peer, **cell)


def share(density: float) -> Value:
    return lambda results: results.share(density)


def counts(scene: str, *, waits: bool) -> Value:
    return lambda results: results.counts(scene, waits)


def targets() -> Iterator[Target]:
    for density, bars in FASTER.items():
        for peer, bar in zip((FUSED, MULTIPLIED, GATHERED), bars, strict=True):
            what = f"step, float32, {100 * density:g} %: against {peer}"
            yield Target(what, bar, "x", faster(OURS, peer, density=density))
    for density, bar in SHARES.items():
        what = f"step, float32, {100 * density:g} %: share of the measured floor"
        yield Target(what, bar, "", share(density))
    yield Target("step, bfloat16, 20 %", 0.7, " ms", number(OURS, precision=BF16), at_most=True)
    yield Target(f"step, bfloat16, 20 %: against {FUSED}", 1.35, "x", faster(OURS, FUSED, precision=BF16))
    yield Target("step, bfloat16, 8-bit states, 20 %", 0.55, " ms", number(OURS, precision=CODED), at_most=True)
    what = f"step, bfloat16, 8-bit states, 20 %: against {FLASH}, or {FLASH_FLOOR_MS} ms without it"
    yield Target(what, 1.5, "x", against_flash)
    for precision, bar in (("float32", 1.76), (CODED, 0.56)):
        value = number(OURS, "memory_per_entry", precision=precision)
        yield Target(f"state, {precision}, 20 %", bar, " bytes/entry", value, at_most=True)
    yield Target("selection, float32, 20 %", 0.75, " ms", number(SELECTED), at_most=True)
    yield Target("selection, float32, 20 %: by histogram", 1.35, " ms", number(HISTOGRAM), at_most=True)
    for peer, bar in ((TOPK, 8), (CUB, 2), (KTHVALUE, 1000)):
        yield Target(f"selection, float32, 20 %: against {peer}", bar, "x", faster(SELECTED, peer))
    temporary = number(SELECTED, "memory_per_entry")
    yield Target("selection, float32, 20 %: temporary memory", TEMPORARY, " bytes/entry", temporary, at_most=True)
    yield Target("ls.select, float32, 20 %: against topk_delta alone", 1.3, "x", select_overhead, at_most=True)
    yield Target("selection, 7B, bfloat16, 20 %", 20, " ms", number(SELECTED, precision=BF16, model="7b"), at_most=True)
    for operation, bar in COPIES.items():
        yield Target(f"{operation}, float32, 20 %: against {COPY}", bar, "x", faster(operation, COPY))
    for what, scene in (
        ("step", "step, float32, 20 %"),
        ("step", "step, bfloat16, 20 %"),
        ("clipped", "step, float32, 20 %, clipped"),
        ("topk_delta", "topk_delta, float32, 20 %"),
    ):
        yield Target(f"{scene}: launches", LAUNCHES[what], "", counts(scene, waits=False), at_most=True)
    scene = "topk_delta, float32, 20 %"
    yield Target(f"{scene}: waits", 1, "", counts(scene, waits=True), at_most=True)


def table(results: Results) -> str:
    """Markdown: every target with its bar, the measured value, and whether it is met."""
    lines = ["| target | bar | measured | met |", "|---|---|---|---|"]
    for target in targets():
        value = target.value(results)
        bar = f"at {'most' if target.at_most else 'least'} {target.bar:.4g}{target.unit}"
        if value is None:
            lines.append(f"| {target.what} | {bar} | not measured | |")
            continue
        met = value <= target.bar if target.at_most else value >= target.bar
        lines.append(f"| {target.what} | {bar} | {value:.4g}{target.unit} | {'yes' if met else '**no**'} |")
    return "\n".join(lines)
