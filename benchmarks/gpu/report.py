"""Writes the report of a results folder of `make gpu` from its CSV files: `python benchmarks/gpu/report.py FOLDER`.

It has tables of the operations, launches, floors and targets. --plot adds plots of milliseconds over density (PNG).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import rows as csv_rows
import targets

Rows = list[dict[str, str]]

BASELINES = {"step": targets.FUSED, "selection": targets.TOPK, "copy": targets.COPY}
NUMBERS = {
    "p50_ms": ("ms", "{:.4f}", 1),
    "host_ms": ("host ms", "{:.4f}", 1),
    "nodes": ("graph nodes", "{:.0f}", 1),
    "gbps": ("GB/s", "{:.0f}", 1),
    "share": ("of the floor", "{:.0f} %", 100),
    "memory_per_entry": ("bytes held or taken per entry", "{:.3f}", 1),
    "ratio": ("against {baseline}", "{:.2f}x", 1),
}
"""Column of numbers -> its title, format and factor."""
WORDS = ("precision", "kind", "provider", "mode", "clocks_mhz")


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def table(rows: Rows, floors: targets.Floors, baseline: str) -> str:
    heads = ["entries", "density", *WORDS, *(title.format(baseline=baseline) for title, _, _ in NUMBERS.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        entries = f"{int(row['n']):,}" if row["n"] else row["model"]
        cells = [entries, f"{float(row['density']):g}", *(row[column] for column in WORDS)]
        if row["error"]:
            lines.append(f"| {' | '.join(cells)} | no figures: {row['error'].replace('|', '/')} |")
            continue
        values = {name: float(row[name]) for name in NUMBERS if row.get(name)}
        values["share"] = floors.share(row)
        if row["bytes"]:
            values["gbps"] = float(row["bytes"]) / float(row["p50_ms"]) / 1e6
        for column, (_, form, factor) in NUMBERS.items():
            value = values.get(column)
            cells.append("" if value is None else form.format(factor * value))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scenes(rows: Rows) -> dict[tuple[str, str], Rows]:
    """(scene, backend) -> launches of the last recording."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        key = row["scene"], row["backend"]
        found[key] = [*(found.get(key, []) if int(row["number"]) else []), row]
    return found


def launch_table(found: dict[tuple[str, str], Rows]) -> str:
    lines = ["| what | backend | launches | waits | us | of them busy | largest gap (us) | longest |", "|---" * 8 + "|"]
    for (scene, backend), rows in found.items():
        ran = [row for row in rows if row["wait"] != "True"]
        span = max((float(row["start_us"]) + float(row["us"]) for row in ran), default=0.0)
        busy = sum(float(row["us"]) for row in ran)
        gap = max((float(row["gap_us"]) for row in ran if row["gap_us"]), default=0.0)
        longest = max(ran, key=lambda row: float(row["us"]), default={"name": ""})["name"].replace("|", "/")[:60]
        cells = (scene, backend, len(ran), len(rows) - len(ran), f"{span:.1f}", f"{busy / span if span else 0:.0%}")
        lines.append(f"| {' | '.join(map(str, cells))} | {gap:.1f} | `{longest}` |")
    return "\n".join(lines)


def floor_table(rows: Rows) -> str:
    lines = ["| what | dtype | density | fetches | ms | GB/s |", "|---" * 6 + "|"]
    for row in rows:
        cells = (*(row[name] for name in ("name", "dtype", "density", "fetch_bytes")), f"{float(row['p50_ms']):.4f}")
        lines.append(f"| {' | '.join(cells)} | {float(row['bytes']) / float(row['p50_ms']) / 1e6:.0f} |")
    return "\n".join(lines)


def plot(rows: Rows, title: str, path: Path) -> None:
    """Milliseconds over density: a row of panels for each size, a column for each precision and kind."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["p50_ms"]]
    sizes, kinds = unique(row["n"] for row in rows), unique(f"{row['precision']}, {row['kind']}" for row in rows)
    figure = Figure(figsize=(4.5 * len(kinds) + 3, 4 * len(sizes)), layout="constrained")
    figure.suptitle(title)
    lines = unique(f"{row['provider']}, {row['mode']}" for row in rows)
    for panels, n in zip(figure.subplots(len(sizes), len(kinds), squeeze=False), sizes, strict=True):
        for axes, kind in zip(panels, kinds, strict=True):
            for number, name in enumerate(lines):
                points = sorted(
                    (float(row["density"]), float(row["p50_ms"]))
                    for row in rows
                    if (row["n"], f"{row['precision']}, {row['kind']}", f"{row['provider']}, {row['mode']}")
                    == (n, kind, name)
                )
                style = "--" if number >= 10 else "-"
                xy = zip(*points, strict=True) if points else ((), ())
                axes.plot(*xy, style, color=f"C{number % 10}", marker=".", label=name)
            axes.set(xscale="log", yscale="log", xlabel="density", ylabel="ms", title=f"{int(n):,} entries, {kind}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=120)


def write(folder: Path, *, plots: bool = False) -> None:
    facts = json.loads((folder / "environment.json").read_text())
    device = facts["device"]
    floor_rows, launches = csv_rows.read(folder / "floors.csv"), scenes(csv_rows.read(folder / "launches.csv"))
    floors, rows = targets.Floors(floor_rows), csv_rows.latest(csv_rows.read(folder / "rows.csv"))
    results = targets.Results(rows, floors, launches)
    skipped = [f"{name} {value}" for name, value in facts.items() if str(value).startswith("skipped")]
    lines = [
        f"# {device}: torch {facts['torch']}, commit {facts['commit']}, {facts['time']}\n",
        "Versions: environment.json. For `auto` to go by these results: `python benchmarks/choose_backends.py --from "
        f"FOLDER`. {'; '.join(skipped)}\n",
    ]
    for op, baseline in BASELINES.items():
        if mine := [row for row in rows if row["op"] == op]:
            lines += [f"## {op}\n", table(mine, floors, baseline), ""]
            if plots:
                plot(mine, f"{op} on {device}", folder / f"{op}.png")
                lines.append(f"![{op}]({op}.png)\n")
    lines += ["## Launches\n", launch_table(launches), ""] if launches else []
    lines += ["## Floors\n", floor_table(floor_rows), ""] if floor_rows else []
    lines += [f"## Targets on an H200, held against {device}\n", targets.table(results), ""]
    (folder / "report.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plot", action="store_true", help="needs matplotlib")
    args = parser.parse_args()
    write(args.folder, plots=args.plot)


if __name__ == "__main__":
    main()
