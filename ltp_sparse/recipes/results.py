"""Results: a row of JSON with its hash per line. Several processes can append to a file, also after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltp_sparse.weights.files import destination, sync_folder
from ltp_sparse.weights.reading import FileFormatError, reader, sha256_of

RESULTS = "results.jsonl"
FAILURES = "failures.jsonl"
HASH = "sha256"
"""Key of a line's hash; rows are without it."""


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row and waits until it is on disk; a line that an earlier kill left unfinished is ended first.

    Raises:
        OSError: `path` is no regular file, or cannot be written; nothing is added then.
    """
    if HASH in row:
        raise ValueError(f"results: expected a row without the key {HASH!r}, which is that of its hash")
    row = json.loads(json.dumps(row))  # as it will be read: keys are strings
    line = json.dumps({**row, HASH: sha256_of(row)}, ensure_ascii=False, sort_keys=True) + "\n"
    path = destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.seek(0, os.SEEK_END)
        if before and os.pread(file.fileno(), 1, before - 1) != b"\n":
            line = "\n" + line
        try:
            rest = memoryview(line.encode())
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException as error:
            file.truncate(before)
            if isinstance(error, OSError):
                raise OSError(error.errno, f"no row could be added: {error.strerror}", str(path)) from error
            raise
    if not before:
        sync_folder(path.parent)


@reader("results")
def read(path: Path) -> list[dict[str, Any]]:
    """All rows, none if there is no file. An unfinished line is left out with a warning.

    Rows without a hash, which earlier versions wrote, are taken as they are, and a warning counts them.

    Raises:
        FileFormatError: a line is not what was written.
    """
    rows, bare = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also of a character that was cut in two
            warnings.warn(f"{path}, {place}: unfinished, left out; repeat the run it belongs to", stacklevel=2)
            continue
        if not isinstance(row, dict):
            raise FileFormatError(path, f"expected a row, an object of JSON, got {type(row).__name__}", place)
        known = row.pop(HASH, None)
        if known is None and not any(_is_hash_of_the_rest(row, key) for key in row):
            bare.append(number)
        elif known != sha256_of(row):
            raise FileFormatError(
                path, "the hash does not match the row: it is damaged; delete the line and repeat its run", place
            )
        rows.append(row)
    if bare:
        warnings.warn(
            f"{path}: {len(bare)} of {len(rows)} rows cannot be verified, the first in line {bare[0]}: they have no "
            "hash, as those of earlier versions",
            stacklevel=2,
        )
    return rows


def _is_hash_of_the_rest(row: Mapping[str, Any], key: str) -> bool:
    """Whether the damaged part of a line is the key of its hash."""
    value = row[key]
    return isinstance(value, str) and len(value) == 64 and value == sha256_of({k: row[k] for k in row if k != key})
