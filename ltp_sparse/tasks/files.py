"""Readers of text, tables and JSON lines, plain or gzipped, row by row, with errors that name the place.

For all of them: text is UTF-8, lines end with a line feed, blank lines in tables are skipped, columns are distinct.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from ltp_sparse.weights.reading import FileFormatError, Place, decoded, parse_json, reader

LONGEST_LINE = 16 << 20
_MOST_LINES = 20_000  # of a quoted cell; more means that a quote is not closed
_UNPACKED, _RATIO = 4 << 20, 50  # a .gz file may unpack to `_UNPACKED` bytes plus `_RATIO` times its size


def existing(path: Path) -> Path:
    """The path, or that of its .gz.

    Raises:
        FileNotFoundError: neither is a file.
    """
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not packed.is_file():
        raise FileNotFoundError(
            f"neither {path} nor {packed.name} exists. Pass the folder of the original files as the data folder, or "
            "none to load from the Hub"
        )
    return path if path.is_file() else packed


def suffix_of(path: Path) -> str:
    """The suffix of a file in small letters and without its dot; for `a.tsv.gz` it is `tsv`."""
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def folder_of(data: Path, *names: str) -> Path:
    """`data`, or its subfolder of one of these names if it holds several data sets."""
    return next((data / name for name in names if (data / name).is_dir()), data)


@reader("text")
def read_lines(path: Path) -> Iterator[str]:
    """Lines of a plain or .gz file without line feeds. Other control characters do not end a line.

    A byte order mark, which spreadsheets write, is removed.
    """
    if packed := path.suffix == ".gz":
        _check_packed(path)
    with path.open("rb") as plain:
        file: Any = BufferedReader(gzip.GzipFile(fileobj=plain)) if packed else plain
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise FileFormatError(path, f"a line of more than {LONGEST_LINE >> 20} MB", f"line {number}")
            if number > 1 and raw.isascii() and b"\0" not in raw:  # the fast path for most lines
                line = raw.decode("ascii")
            else:
                line = decoded(raw, path, f"line {number}")
            yield line.removesuffix("\n").removesuffix("\r")


def _check_packed(path: Path) -> None:
    """Unpacks a .gz file once before its lines are used, because the checksum is at its end."""
    most, total = _UNPACKED + _RATIO * path.stat().st_size, 0
    if not path.stat().st_size:
        raise FileFormatError(path, "not a complete .gz file (it is empty); copy it again")
    try:
        with gzip.open(path, "rb") as file:
            while piece := file.read(1 << 20):
                total += len(piece)
                if total > most:
                    raise FileFormatError(
                        path, f"it unpacks to more than {_RATIO} times its size; unpack it if this is intended"
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FileFormatError(
            path, f"not a complete .gz file ({error}); it may be truncated or damaged, copy it again"
        ) from error


@reader("table without header")
def read_columns(path: Path, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, str]]]:
    """(place, row) of a tab-separated file without header and quoting; blank lines are skipped."""
    for where, cells in _rows(path, "\t", quoted=False, first=1):
        yield where, _row(where, cells, columns)


@reader("table")
def read_table(
    path: Path, columns: Sequence[str] = (), *, quoted: bool = False, comma: bool = False
) -> Iterator[tuple[Place, dict[str, str]]]:
    """(place, row) of a file with a header line; blank lines are skipped.

    Args:
        path: the file.
        columns: required columns.
        quoted: cells can be in double quotes and contain line breaks.
        comma: cells are separated by commas, not by tabs.

    Raises:
        FileFormatError: no header, a missing or duplicate column, a row of another length, an open quote.
    """
    rows = _rows(path, "," if comma else "\t", quoted=quoted, first=0)
    _, header = next(rows, (None, []))
    if missing := [column for column in columns if column not in header]:
        raise FileFormatError(path, f"expected a header with {', '.join(columns)}; {missing[0]!r} is not in {header}")
    if twice := [column for column in header if header.count(column) > 1]:
        raise FileFormatError(path, f"the column {twice[0]!r} occurs twice; rename one", "header")
    for where, cells in rows:
        yield where, _row(where, cells, header)


def read_rows(
    path: Path, columns: Sequence[str] = (), *, quoted: bool = False
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """(place, row) of JSON lines (.jsonl) or a table; `columns` are required in a table. A .csv is always quoted."""
    suffix = suffix_of(path)
    if suffix == "jsonl":
        return read_jsonl(path)
    return read_table(path, columns, quoted=quoted or suffix == "csv", comma=suffix == "csv")


@reader("JSON lines")
def read_jsonl(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """(place, object) of a file with one JSON object per line. `keys` are required; blank lines are skipped."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = Place(path, f"row {number}")
        row = parse_json(line, path, where.at)
        if not isinstance(row, dict) or any(key not in row for key in keys):
            wanted = f"an object with {', '.join(keys)}" if keys else "an object"
            raise where.error(f"expected {wanted}, got {str(row)[:80]}")
        yield where, row


def text_in(row: Mapping[str, Any], column: str, where: Place) -> str:
    """The text in a column of a row.

    Raises:
        FileFormatError: there is no such column, or its value is not a text that can be encoded.
    """
    value = row.get(column)
    if not isinstance(value, str):
        got = "null" if value is None else f"a value of type {type(value).__name__}"
        found = f"expected a text, got {got}" if column in row else f"columns: {', '.join(row)}"
        raise where.error(f"no text in column {column!r}; {found}")
    if "\0" in value or not (value.isascii() or _encodable(value)):
        raise where.error(f"the text in column {column!r} holds a NUL character or half a character")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(where: Place, cells: list[str], columns: Sequence[str]) -> dict[str, str]:
    if len(cells) != len(columns):
        raise where.error(f"expected {len(columns)} columns ({', '.join(columns)}), got {len(cells)}")
    return dict(zip(columns, cells, strict=True))


def _rows(path: Path, delimiter: str, *, quoted: bool, first: int) -> Iterator[tuple[Place, list[str]]]:
    """(place, cells) of the rows of a table. Blank lines are skipped, but counted.

    The `csv` module is not used, because it limits cells to 131,072 characters, stops at a carriage return inside a
    cell, and reads the rest of the file into a cell whose quote is not closed.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, first):
        if not line.strip(" "):
            continue
        where = Place(path, f"row {number}" if number else "header")
        yield where, _quoted_cells(line, lines, delimiter, where) if quoted else line.split(delimiter)


def _quoted_cells(line: str, following: Iterator[str], delimiter: str, where: Place) -> list[str]:
    """The cells of a row. Those in double quotes can contain delimiters, doubled quotes and line breaks.

    Args:
        line: the first line of the row.
        following: the lines after it, where a quoted cell with line breaks continues.
        delimiter: the character between cells.
        where: the place of the row, for errors.
    """
    cells, at, size = [], 0, 0
    while True:
        if not line.startswith('"', at):
            stop = line.find(delimiter, at)
            cells.append(line[at:] if stop < 0 else line[at:stop])
            at = len(line) if stop < 0 else stop
        else:
            parts, at = [], at + 1
            while (stop := line.find('"', at)) < 0 or line.startswith('"', stop + 1):
                if stop >= 0:  # a doubled quote
                    parts.append(line[at : stop + 1])
                    at = stop + 2
                    continue
                parts += [line[at:], "\n"]
                size += len(line)
                if size > LONGEST_LINE or len(parts) > _MOST_LINES or (more := next(following, None)) is None:
                    raise where.error("a quote that is opened here is not closed")
                line, at = more, 0
            cells.append("".join([*parts, line[at:stop]]))
            at = stop + 1
            if at < len(line) and not line.startswith(delimiter, at):
                raise where.error(
                    f"text after the closing quote of column {len(cells)}; double a quote inside a quoted cell"
                )
        if at >= len(line):
            return cells
        at += len(delimiter)
