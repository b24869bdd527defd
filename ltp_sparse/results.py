"""Files of JSON lines, a row per result: safe to append to from several processes, and after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltp_sparse.reading import reader

RESULTS = "results.jsonl"
FAILURES = "failures.jsonl"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row and waits until it is on disk; a line that an earlier kill left unfinished is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() and not _ends_with_newline(file):
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


@reader("results")
def read(path: Path) -> list[dict[str, Any]]:
    """All rows; an unfinished line is left out with a warning. No file: no rows."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:  # also of a character that was cut in two
            warnings.warn(f"{path}, line {number}: unfinished, left out; repeat the run it belongs to", stacklevel=2)
    return rows


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
