"""The report of a results folder of `make gpu`; `python benchmarks/gpu/report.py FOLDER` makes it again from the CSV.

`report.md` has a table per operation, plotted as PNG where matplotlib is installed, and the targets at its end. At most
the eight files `KEPT` lie in such a folder; all others are packed into `rest.zip`.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import targets

ROOT = Path(__file__).parents[2]
PEERS = ("bitsandbytes", "torchao", "flashoptim")
"""Packages that are compared with; beside them, CUB."""
ARCHIVE = "rest.zip"
KEPT = (
    "environment.json", "report.md", "backend_choice.json", ARCHIVE,
    "masked_adamw.csv", "masked_adamw.png", "topk_delta.csv", "topk_delta.png",
)  # fmt: skip

Rows = list[dict[str, str]]


class View(NamedTuple):
    """How the rows of an operation are shown.

    panel:  columns whose values get a table column, and together a column of panels in the plot
    line:   columns whose values get a table column, and together a line in the plot
    ratios: columns of ratios to a peer, and the peer's name
    plain:  values that are left out of the labels of the plot, as most rows have them
    """

    panel: tuple[str, ...]
    line: tuple[str, ...]
    ratios: dict[str, str]
    plain: tuple[str, ...] = ()


VIEWS = {
    "masked_adamw": View(
        ("precision", "masks"),
        ("provider", "mode", "gradients"),
        {"ratio_to_fused": "torch fused"},
        ("uniform", "static"),
    ),
    "topk_delta": View(
        ("dtype", "deltas"), ("provider",), {"ratio_to_topk": "sub + abs + cat + topk", "ratio_to_cub_flat": "CUB"}
    ),
}
NUMBERS = {
    "p50_ms": ("ms", "{:.4f}", 1),
    "host_ms": ("host ms", "{:.4f}", 1),
    "touched_sectors": ("sectors", "{:.0f} %", 100),
    "gbps": ("GB/s", "{:.0f}", 1),
    "share_of_copy": ("of a copy", "{:.0f} %", 100),
}
"""Column of numbers -> its title, format and factor; those that a CSV file lacks are left out."""


def read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def table(rows: Rows, view: View) -> str:
    columns = (*view.panel, *view.line)
    numbers = {column: spec for column, spec in NUMBERS.items() if column in rows[0]}
    heads = ["entries", "density", *columns, *(title for title, _, _ in numbers.values())]
    heads += [f"against {peer}" for peer in view.ratios.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{int(row['n']):,}", f"{float(row['density']):g}", *(row[column] for column in columns)]
        if row["verified"] == "False":
            lines.append(f"| {' | '.join(cells)} | differs from the reference: no figures |")
            continue
        for column, (_, form, factor) in numbers.items():
            cells.append(form.format(factor * float(row[column])) if row[column] else "")
        cells += [f"{float(row[ratio]):.2f}x" if row[ratio] else "" for ratio in view.ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Rows, view: View, title: str, path: Path) -> None:
    """Milliseconds over density: a row of panels per size, one beside the other per precision.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    def label(row: dict[str, str], columns: tuple[str, ...]) -> str:
        return ", ".join(row[column] for column in columns if row[column] not in view.plain)

    sizes, kinds = unique(row["n"] for row in rows), unique(label(row, view.panel) for row in rows)
    figure = Figure(figsize=(4.5 * len(kinds) + 3, 4 * len(sizes)), layout="constrained")
    figure.suptitle(title)
    lines = {name: f"C{number % 10}" for number, name in enumerate(unique(label(row, view.line) for row in rows))}
    for line, n in zip(figure.subplots(len(sizes), len(kinds), squeeze=False), sizes, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            for number, (name, color) in enumerate(lines.items()):
                mine = [
                    row for row in rows if (row["n"], label(row, view.panel), label(row, view.line)) == (n, kind, name)
                ]
                points = sorted((float(row["density"]), float(row["p50_ms"])) for row in mine if row["p50_ms"])
                style = "--" if number >= 10 else "-"
                axes.plot(
                    *(zip(*points, strict=True) if points else ((), ())), style, marker=".", color=color, label=name
                )
            axes.set(xscale="log", yscale="log", xlabel="density", ylabel="ms", title=f"{int(n):,} entries, {kind}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=120)


def write(folder: Path) -> None:
    """Writes tables, and plots where matplotlib is installed; says so where it is not."""
    facts = json.loads((folder / "environment.json").read_text())
    device = facts["device"]
    place = folder.resolve().relative_to(ROOT) if folder.resolve().is_relative_to(ROOT) else folder
    command = f"python benchmarks/gpu/report.py {place}"
    lines = [
        f"# {device}: torch {facts['torch']}, commit {facts['commit']}, {facts['time']}\n",
        f"Versions and clocks: environment.json. Logs and other files: {ARCHIVE}. Packages compared with: "
        + ", ".join(f"{peer} {facts[peer]}" for peer in (*PEERS, "CUB"))
        + f". For `auto` to go by these results: `python benchmarks/choose_backends.py --from {place}`.\n",
    ]
    results = {name: read(folder / f"{name}.csv") for name in VIEWS}
    for name, view in VIEWS.items():
        if not (rows := results[name]):
            continue
        lines += [f"## {name}\n", table(rows, view), ""]
        try:
            plot(rows, view, f"{name} on {device}", folder / f"{name}.png")
            lines.append(f"![{name}]({name}.png)\n")
        except ImportError as error:
            lines.append(f"No plot ({error}): `{command}` makes it where matplotlib is installed.\n")
            print(f"{name}: no plot ({error}); {command} makes it where matplotlib is installed")
    lines += [f"## Targets on an H200, held against {device}\n", targets.table(results), ""]
    (folder / "report.md").write_text("\n".join(lines))


def pack(folder: Path) -> None:
    """Moves all files but those `KEPT` into the archive, under names with the time: runs are collected there."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    with zipfile.ZipFile(folder / ARCHIVE, "a", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in KEPT:
                archive.write(path, f"{path.stem}-{stamp}{path.suffix}")
                path.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
