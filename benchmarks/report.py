"""Turns the CSV files of a results folder into `README.md` (tables and the project's aims) and PNG plots."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

Rows = list[dict[str, str]]

SELECTION_BYTES = 0.205, 8e6
"""Temporary memory of a selection: bytes per entry, and a constant (contract 2 of docs/contracts.md)."""

STATE_BYTES = {"MaskedAdamW": 1.76, "MaskedAdamW, 8-bit states": 0.56}
"""Bytes of optimizer state per entry at a density of 20 %, at most."""

VERSION_MEGABYTES = {"1 %": 0.25, "5 %": 1.2}
"""Size of a published version of 154 million bfloat16 weights at a learning rate of 3e-6, by the ticket's density."""


def read(folder: Path) -> Rows:
    """The rows of all operations."""
    rows: Rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if "op" in row]
    return rows


def pick(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row[key] == str(value) for key, value in wanted.items())]


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def share(row: dict[str, str]) -> str:
    """The density of a row, e.g. "20 %"."""
    return f"{100 * int(row['k']) / int(row['n']):.2g} %".replace("1e+02", "100")


def cell(row: dict[str, str]) -> str:
    if row["metric"] != "time":
        return f"{float(row['p50']):.4g}"
    copied = f", {100 * float(row['share_of_copy']):.0f} % of copy" if row["share_of_copy"] else ""
    return f"{float(row['p50']):.4g} ms ({float(row['ratio']):.2f}x{copied})"


def table(rows: Rows) -> str:
    """Providers down, densities across."""
    shares = unique(share(row) for row in rows)
    lines = ["| | " + " | ".join(shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for provider in unique(row["provider"] for row in rows):
        cells = {share(row): cell(row) for row in pick(rows, provider=provider)}
        lines.append(f"| {provider} | " + " | ".join(cells.get(s, "") for s in shares) + " |")
    return "\n".join(lines)


def bars(rows: Rows) -> str:
    """Every aim of the project with rows, beside the measured value."""
    lines = ["| bar | entries | required | measured | |", "|---|---|---|---|---|"]
    times = pick(rows, metric="time")

    def best(prefix: str, group: Rows) -> dict[str, str] | None:
        return next((row for row in group if row["provider"].startswith(prefix)), None)

    def compare(
        op: str, density: str, prefix: str, peer: str, bar: float, *, slower: bool = False, dtype: str = "float32"
    ) -> None:
        """`bar`: times faster than the peer, at least, or with `slower` times slower, at most."""
        for n in unique(row["n"] for row in pick(times, op=op, dtype=dtype)):
            group = [row for row in pick(times, op=op, n=n, dtype=dtype) if share(row) == density]
            mine, other = best(prefix, group), best(peer, group)
            if mine and other:
                faster = float(other["p50"]) / float(mine["p50"])
                found, met = (1 / faster, 1 / faster <= bar) if slower else (faster, faster >= bar)
                required = f"at most {bar:g}x slower" if slower else f"at least {bar:g}x its speed"
                case = density if dtype == "float32" else f"{density}, {dtype}"
                what = f"{mine['provider']} against {other['provider']}, {case}"
                lines.append(f"| {what} | {int(n):,} | {required} | {found:.2f}x | {'met' if met else '**missed**'} |")

    compare("topk_delta", "20 %", "topk_delta, sampled", "abs + torch.topk", 20)
    compare("topk_delta", "20 %", "topk_delta, sampled", "abs + np.partition", 5)
    compare("topk_delta", "20 %", "topk_delta, sampled", "list of floats", 100)
    compare("topk_delta", "20 %", "select, ", "abs + torch.topk", 40)
    compare("topk_delta", "20 %", "select, ", "abs + np.partition", 7)
    compare("topk_delta", "20 %", "select, ", "topk_delta, sampled", 1.3, slower=True)
    for density, minimum in (("20 %", 1.8), ("5 %", 2.3), ("1 %", 7.0), ("75 %", 1.0)):
        compare("masked_adamw_", density, "MaskedAdamW", "torch AdamW(fused=True)", minimum)
    compare("masked_adamw_", "20 %", "MaskedAdamW", "index_select", 2.5)
    compare("masked_adamw_", "20 %", "MaskedAdamW", "torch AdamW()", 10)
    for dtype in ("float32", "bfloat16"):
        for threads in ("1 thread", "2 threads"):
            reading = "select, the band pass", f"reading both files once, {threads}"
            compare("select from checkpoints", "20 %", *reading, 0.7, dtype=dtype)
    for op, density, ours in (("masked_adamw_", "20 %", "MaskedAdamW"), ("topk_delta", "20 %", "topk_delta, sampled")):
        compare(op, density, f"{ours} (generic)", f"{ours} (avx512)", 1.8, slower=True)

    for row in rows:
        place = row["op"], row["metric"], share(row), row["dtype"]
        if place == ("masked_adamw_", "state", "20 %", "float32") and row["provider"] in STATE_BYTES:
            lines.append(limit(f"optimizer state, {row['provider']}, 20 %", row, STATE_BYTES[row["provider"]]))
        if row["metric"] == "temporary memory" and row["provider"].startswith("topk_delta"):
            per_entry, constant = SELECTION_BYTES
            case = share(row) if row["dtype"] == "float32" else f"{share(row)}, {row['dtype']}"
            what = f"temporary memory, {row['provider'].partition(', ')[2]}, {case}"
            lines.append(limit(what, row, per_entry + constant / int(row["n"])))
        published = row["op"], row["provider"], row["metric"]
        if published == ("sync of a step, lr 3e-06", "ls.sync, a ticket", "size") and share(row) in VERSION_MEGABYTES:
            found, most = float(row["p50"]), VERSION_MEGABYTES[share(row)]
            verdict = "met" if found <= most else "**missed**"
            what = f"size of a version, {share(row)}, lr 3e-6, bfloat16"
            lines.append(f"| {what} | {int(row['n']):,} | at most {most:g} MB | {found:.3f} MB | {verdict} |")
    return "\n".join(lines)


def limit(what: str, row: dict[str, str], most: float) -> str:
    found = float(row["p50"])
    verdict = "met" if found <= most else "**missed**"
    return f"| {what} | {int(row['n']):,} | at most {most:.3f} bytes/entry | {found:.3f} | {verdict} |"


def plot(title: str, rows: Rows, path: Path) -> None:
    """Milliseconds over density, a panel per size."""
    from matplotlib.figure import Figure

    sizes = unique(row["n"] for row in rows)
    figure = Figure(figsize=(5.5 * len(sizes), 4.5), layout="constrained")
    for axes, n in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for provider in unique(row["provider"] for row in pick(rows, n=n)):
            points = sorted((int(row["k"]) / int(n), float(row["p50"])) for row in pick(rows, n=n, provider=provider))
            style = {"color": "black", "linestyle": "--"} if provider == "copy" else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=provider, **style)
        axes.set(xscale="log", yscale="log", xlabel="density", title=f"{title}, {int(n):,} entries")
    figure.axes[0].set_ylabel("ms")
    figure.axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def write(folder: Path) -> Path:
    """Writes the report of a results folder; returns its path."""
    rows = read(folder)
    first = rows[0]
    commits = ", ".join(unique(row["commit"] for row in rows))
    parts = [
        f"# Benchmarks: {folder.name}\n\nMade by `make bench` ({first['device']}; {first['versions']}; "
        f"{first['time'][:10]}; commits of the rows: {commits}). Medians; all providers of a table ran interleaved in "
        "one process, after their results had been verified. In brackets: how many times faster than the baseline "
        "(the provider at 1.00x), and the modelled memory traffic per second relative to a plain copy.\n\n## Bars\n",
        bars(rows),
    ]
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        mine = pick(rows, op=op, dtype=dtype)
        for n in unique(row["n"] for row in mine):
            for metric in unique(row["metric"] for row in mine):
                group = pick(mine, n=n, metric=metric)
                unit = group[0]["unit"]
                parts += [f"\n## {op}: {metric} ({unit}), {int(n):,} {dtype} entries\n", table(group)]
        timed = pick(mine, metric="time")
        if timed and len(unique(row["k"] for row in pick(timed, n=timed[0]["n"]))) > 1:
            stem = re.sub(r"_?\W+|_$", "-", op if dtype == "float32" else f"{op}, {dtype}").strip("-")
            name = f"{stem}.png"
            plot(f"{op}, {dtype}", timed, folder / name)
            parts.append(f"\n![{op}, {dtype}]({name})")
    path = folder / "README.md"
    path.write_text("\n".join(parts) + "\n")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
