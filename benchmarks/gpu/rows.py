"""The CSV files of a results folder. Rows are written one by one; of several rows with the same key the last counts."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

MEASURED_CSV, FLOORS_CSV, LAUNCHES_CSV = "rows.csv", "floors.csv", "launches.csv"

CELL = ("op", "model", "density", "precision", "kind")
KEY = (*CELL, "provider", "mode")
MEASURED = (
    *KEY, "n", "k", "p50_ms", "p20_ms", "p80_ms", "ratio", "host_ms", "nodes", "bytes", "sector_bytes",
    "memory_per_entry", "clocks_mhz", "code", "error",
)  # fmt: skip
"""Columns of `MEASURED_CSV`.

kind: of the masks, or of the deltas
mode: graph; eager; or fresh: eager, with gradients at other addresses in every step
ratio: time of the baseline of the operation in the same rounds / p50_ms
nodes: of the graph
sector_bytes: those of `bytes` that are read or written in whole sectors
memory_per_entry: bytes of state, or of temporary memory
code: digest of our sources, for our rows
error: the reason, if there are no times
"""

FLOORS = ("name", "dtype", "density", "fetch_bytes", "n", "k", "p50_ms", "bytes")
LAUNCHES = ("scene", "backend", "code", "number", "name", "wait", "start_us", "us", "gap_us")
"""Columns of `LAUNCHES_CSV`; gap_us: time since the end of the earlier launches"""


def current() -> Path:
    """The file with the key of the current measurement. It is still there if the process has crashed."""
    return Path(tempfile.gettempdir(), "measured-now.json")


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(_text(row[name]) for name in KEY)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def read(path: Path) -> list[dict[str, str]]:
    """The complete lines; a last line without an end was cut off and is ignored."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def latest(found: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The last of each key."""
    return list({key_of(row): row for row in found}.values())


def append(path: Path, fields: Sequence[str], row: Row) -> None:
    """Appends a row, after removing a last line without an end."""
    line = io.StringIO()
    writer = csv.DictWriter(line, fields, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        if not file.seek(0, os.SEEK_END):
            writer.writeheader()
        writer.writerow({name: _text(value) for name, value in row.items()})
        file.write(line.getvalue().encode())


def failure(key: Row, error: str, code: str = "") -> dict[str, Any]:
    """The row of a failed measurement."""
    return {**key, "error": " ".join(error.split())[:300], "code": code}
