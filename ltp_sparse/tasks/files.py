"""Text files, plain or gzipped, row by row, with errors that name the place."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def existing(*candidates: Path) -> Path:
    """The first candidate that is a file; an error that names all of them otherwise."""
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"none of these files is there: {', '.join(map(str, candidates))}. Pass the folder of the original files as "
        "the data folder, or none to load from the Hub by name"
    )


def folder_of(data: Path, *names: str) -> Path:
    """`data` itself, or its folder of one of these names where several data sets lie side by side."""
    return next((data / name for name in names if (data / name).is_dir()), data)


def read_lines(path: Path) -> Iterator[str]:
    """Lines without their line feed. Only a line feed ends a line: other control characters occur inside sentences.

    A byte order mark, which spreadsheets write, is no part of the first one.
    """
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield line.removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from error


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a tab-separated file without header and without quoting."""
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        where = f"{path}, row {number}"
        if len(cells) != len(columns):
            raise ValueError(f"{where}: expected {len(columns)} columns ({', '.join(columns)}), got {len(cells)}")
        yield where, dict(zip(columns, cells, strict=True))


def read_table(
    path: Path, columns: Sequence[str] = (), *, quoted: bool = False, comma: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a file with a header line.

    columns: must be in the header. quoted: cells may be in double quotes and hold line breaks. comma: instead of tabs.
    """
    lines = (line + "\n" for line in read_lines(path))
    reader = csv.reader(
        lines, delimiter="," if comma else "\t", quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    header = next(reader, [])
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path}: expected a header with {', '.join(columns)}; {missing[0]!r} is not in {header}")
    for number, cells in enumerate(reader, 1):
        where = f"{path}, row {number}"
        if len(cells) != len(header):
            raise ValueError(f"{where}: expected {len(header)} columns ({', '.join(header)}), got {len(cells)}")
        yield where, dict(zip(header, cells, strict=True))


def read_jsonl(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a file with a JSON object a line; `keys` must be there. Blank lines are passed over."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise ValueError(f"{where}: expected an object with {', '.join(keys)}, got {str(row)[:80]}")
        yield where, row
