"""Your own labelled texts and pairs, from a file in one of `FORMATS` or a data set of the Hub."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import read_rows, suffix_of, text_in
from ltp_sparse.tasks.hub import load_hub, rows_with_names
from ltp_sparse.tasks.pairs import Pair
from ltp_sparse.tasks.texts import Text
from ltp_sparse.weights.reading import FileFormatError, Place, reader

FORMATS = ("tsv", "csv", "jsonl", "parquet")
"""Suffixes of files. All but parquet can be followed by .gz."""

UNDETERMINED = "und"
"""The code of an undetermined language (ISO 639)."""

_SPLIT_SEED = 0
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
        text: the text, or the first text of a pair.
        pair: the second text of a pair; None: single texts.
        label: the class.
        language: the language of each row; None: all rows have the same language.
        quoted: whether cells of a .tsv can be in double quotes; cells of a .csv always can.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    language: str | None = None
    quoted: bool = False

    @property
    def kind(self) -> str:
        """The kind of the examples: "pair" or "text"."""
        return "text" if self.pair is None else "pair"


@reader("own data")
def read_own(
    source: str | os.PathLike[str],
    columns: Columns,
    *,
    language: str = UNDETERMINED,
    labelled: bool = True,
    split: str = "train",
    config: str | None = None,
) -> list[Any]:
    """Examples (`Pair` if `columns.pair` is given, else `Text`) in the order of the rows.

    Args:
        source: a file in one of `FORMATS`, the name of a Hub data set, or a folder that `datasets.load_dataset` reads;
            optionally with a split, "owner/name@validation".
        columns: names of columns. Labels can be strings, integers or booleans, and become strings.
        language: the language of all rows, if no column has it.
        labelled: False ignores labels.
        split: the split of a Hub data set, if `source` names none.
        config: configuration of a Hub data set.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: a column is missing, a row has no label or no text, or there is no row.
    """
    wanted = [columns.text, columns.pair, columns.label if labelled else None, columns.language]
    names = [name for name in wanted if name is not None]
    if len(set(names)) < len(names):
        raise ValueError(f"columns: expected different columns, got {', '.join(names)}")
    make: Any = Text if columns.pair is None else Pair
    examples: list[Any] = []
    unread = Counter[str]()  # languages in a column "language" that `columns` does not name
    for where, row in _rows(str(source), names, columns.quoted, split, config):
        if missing := [name for name in names if name not in row]:
            raise where.error(f"expected a column {missing[0]!r}, got {', '.join(map(str, row))}")
        texts = [text_in(row, name, where) for name in (columns.text, columns.pair) if name is not None]
        label = _label(row[columns.label], columns.label, where) if labelled else None
        of_row = language if columns.language is None else row[columns.language]
        if not isinstance(of_row, str) or not of_row.strip():
            raise where.error(f"expected a language in column {columns.language!r}, got {of_row!r}")
        examples.append(make(*texts, label, of_row.strip()))  # blanks would make it another language
        if columns.language is None and "language" not in names:
            unread[str(row.get("language", language)).strip()] += 1
    if not examples:
        raise FileFormatError(source, f"expected rows with the columns {', '.join(names)}, got none")
    _warn_of_quotes(source, columns, examples)
    if labelled:
        _warn_of_languages(source, language, unread)
    return examples


def columns_of(path: str | os.PathLike[str]) -> list[str]:
    """The names in the first line of a table, the keys of the first row of JSON lines, the columns of a parquet file.

    Raises:
        FileFormatError: the file has no row.
    """
    for _, row in _file_rows(Path(path)):
        return list(row)
    raise FileFormatError(path, "expected rows below a header, got none")


def split_dev(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """(training, dev): a share of every class, but at least one example, goes to dev. The draw is always the same.

    A class with a single example stays in training.

    Raises:
        ValueError: no class has two examples.
    """
    draws = random.Random(_SPLIT_SEED)
    by_label: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(number)
    chosen: set[int] = set()
    for label in sorted(by_label):
        members = by_label[label]
        if len(members) > 1:
            chosen |= set(draws.sample(members, min(len(members) - 1, max(1, round(share * len(members))))))
    if not chosen:
        raise ValueError("expected a class with two examples, to draw dev from; pass separate dev examples")
    parts: tuple[list[Any], list[Any]] = ([], [])
    for number, example in enumerate(examples):
        parts[number in chosen].append(example)
    return parts


def classes_of(examples: Sequence[Any], words: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The classes of labelled examples: in the order of `words`, else by number or alphabetically.

    Raises:
        ValueError: a class has no word, a word has no class, or there is a single class.
    """
    counts = Counter(example.label for example in examples)
    numbers = all(label.removeprefix("-").isdecimal() for label in counts)
    found = sorted(counts, key=int) if numbers else sorted(counts)
    shown = _counts({label: counts[label] for label in found})
    if words is not None:
        if wordless := [label for label in found if label not in words]:
            raise ValueError(
                f"expected a word for every class, got none for {', '.join(map(repr, wordless))}; classes: {shown}"
            )
        if unused := [label for label in words if label not in counts]:
            raise ValueError(f"expected words for classes that occur, got one for {unused[0]!r}; classes: {shown}")
        found = list(words)
    if len(found) < 2:
        raise ValueError(f"expected at least two classes, got {shown}")
    return tuple(found)


def _rows(
    source: str, names: Sequence[str], quoted: bool, split: str, config: str | None
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """(place, row) of a file or a data set."""
    path = Path(source).expanduser()
    known = suffix_of(path) in FORMATS
    if not known and not path.is_file():
        return _hub_rows(source, split, config)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected examples with the columns {', '.join(names)}")
    if config is not None:
        raise ValueError(f"expected no configuration of a Hub data set for the file {path}, got {config!r}")
    if not known:
        raise ValueError(f"{path}: expected a file that ends in .{', .'.join(FORMATS)}, or the name of a Hub data set")
    return _file_rows(path, names, quoted)


def _file_rows(
    path: Path, names: Sequence[str] = (), quoted: bool = False
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    if suffix_of(path) != "parquet":
        return read_rows(path, names, quoted=quoted)
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        data = Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FileFormatError(path, f"not a readable parquet file ({str(error).splitlines()[0]})") from error
    return _placed(data, path)


def _hub_rows(source: str, split: str, config: str | None) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    name, _, named = source.partition("@")
    folder = Path(name).expanduser()
    if not folder.is_dir() and not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such file or folder; expected a file that ends in .{', .'.join(FORMATS)}, or a Hub data set"
        )
    try:
        data = load_hub(os.fspath(folder) if folder.is_dir() else name, config, split=named or split)
    except Exception as error:  # of any kind: no network, no such name, configuration or split, damaged files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{source}: expected a file, or a Hub data set with the split {named or split!r}: {reason}"
        ) from error
    return _placed(data, source)


def _placed(data: Any, source: str | Path) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    return ((Place(source, f"row {number}"), row) for number, row in enumerate(rows_with_names(data), 1))


def _label(value: Any, column: str, where: Place) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # as in a table with missing numbers
        value = int(value)
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()  # blanks around a label would make it another class
    raise where.error(f"expected a label in column {column!r}, a string or an integer, got {value!r}")


def _warn_of_quotes(source: str | os.PathLike[str], columns: Columns, examples: Sequence[Any]) -> None:
    if columns.quoted or suffix_of(Path(source)) != "tsv":
        return
    texts = [text for example in examples for text in texts_of(example)]
    if quoted := sum(len(text) > 1 and text[0] == text[-1] == '"' for text in texts):
        warnings.warn(
            f"{source}: {quoted} of {len(texts)} texts begin and end with a double quote, which is kept as part of the "
            "text; pass --quoted if the file quotes cells, as a .csv does",
            stacklevel=3,
        )


def _warn_of_languages(source: str | os.PathLike[str], language: str, unread: Mapping[str, int]) -> None:
    if others := {name: rows for name, rows in unread.items() if name != language}:
        named = ", ".join(sorted(others)[:5]) + ", ..." * (len(others) > 5)
        warnings.warn(
            f"{source}: {sum(others.values())} of {sum(unread.values())} rows have another language ({named}) in the "
            f"column 'language' and count as {language!r}; pass --language-column language for scores per language",
            stacklevel=3,
        )


def texts_of(example: Any) -> tuple[str, ...]:
    """The texts of an example: two for a pair, one for a text, none for other objects."""
    found = (getattr(example, name, None) for name in ("premise", "hypothesis", "text"))
    return tuple(text for text in found if isinstance(text, str))


def warn_of_gaps(examples: Sequence[Any], labels: Sequence[str] | None, what: str) -> None:
    """Warns once about classes without examples and about blank texts, with counts per class. Nothing is left out.

    Args:
        examples: the examples to check.
        labels: the classes of the task; None if unknown.
        what: the name of the examples, for messages.
    """
    counts, blank = Counter(dict.fromkeys(labels or (), 0)), Counter[str]()
    for example in examples:
        label = str(getattr(example, "label", None))
        counts[label] += 1
        if any(not text.strip() for text in texts_of(example)):
            blank[label] += 1
    problems = []
    if missing := [label for label in labels or () if counts[label] == 0]:
        problems.append(f"no example of {', '.join(missing)} ({_counts(counts)})")
    if blank:
        of_class = f" ({_counts(blank)})" if set(blank) != {"None"} else ""
        problems.append(f"{sum(blank.values())} of {len(examples)} examples have a blank text{of_class}, and are kept")
    if problems:
        warnings.warn(f"{what}: {'; '.join(problems)}", stacklevel=3)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {count}" for label, count in counts.items())
