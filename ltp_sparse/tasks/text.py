"""Plain text for masked-language-model tuning, from local files or the Hub. Labelled texts are in `texts.py`."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ltp_sparse.tasks.files import read_jsonl, read_lines, suffix_of, text_in
from ltp_sparse.tasks.hub import load_hub
from ltp_sparse.weights.reading import FileFormatError, Place

_SUFFIXES = ("txt", "tsv", "jsonl")
# The end of a sentence: a mark, closing quotes and a space; after Chinese and Japanese marks no space is needed.
_END = re.compile(r"([.!?۔؟।॥։።፧။][\"'»”’)\]]*)\s+|([。！？][」』”’）]*)\s*")
# A paragraph that ends like a sentence, which a heading does not.
_ENDED = re.compile(r"[.!?۔؟।॥։።፧။。！？…:;][\"'»”’)\]」』）]*$")
# A full stop that ends an initial or an abbreviation, not the sentence.
_ABBREVIATED = re.compile(r"(?:^|[\s(])(?:\w|Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No|Jr|Sr)\.$")
_SHORTEST_LINE = 60  # characters; a shorter line that does not end like a sentence is a heading


class PassedOver(UserWarning):
    """Rows without a text are skipped, like blank lines."""


def read_text(paths: Sequence[str | os.PathLike[str]], *, max_lines: int | None = None, seed: int = 0) -> list[str]:
    """Non-blank lines of text files.

    Args:
        paths: .txt (one text per line), .tsv (the first column) and .jsonl (the key "text") files, also .gz, or folders
            of them.
        max_lines: draw at most this many lines at random, in the order of the files.
        seed: seed of the draw.

    Warns:
        PassedOver: rows with null as "text" are skipped; the message has their number.

    Raises:
        FileNotFoundError: a file or folder does not exist, or a folder has no such file.
        FileFormatError: a file cannot be read, has no text, or has a value that is not a string (the line is named).
    """
    files = [file for path in paths for file in text_files(Path(path))]
    return _sample((line for file in files for line in _lines(file)), max_lines, seed, ", ".join(map(str, paths)))


def read_hub_text(
    name: str,
    config: str | None = None,
    *,
    column: str = "text",
    split: str = "train",
    max_lines: int | None = None,
    seed: int = 0,
    sentences: bool = False,
) -> list[str]:
    """Non-blank lines of a column of a streamed Hub data set.

    Args:
        name: name of the data set.
        config: its configuration.
        column: the column of the texts.
        split: its split.
        max_lines: draw at most this many lines at random, in the order of the rows.
        seed: seed of the draw.
        sentences: cut the lines into sentences (`split_sentences`), for articles with paragraphs and headings.

    Warns:
        PassedOver: rows with null in the column are skipped.

    Raises:
        ValueError: the data set cannot be reached or has no such column.
        FileFormatError: it has no text, or a value is not a string.
    """
    rows = load_hub(name, config, split=split, streaming=True)
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(f"{name}: no column {column!r}; it has {', '.join(rows.column_names)}")
    placed = ((Place(name, f"row {number}"), row) for number, row in enumerate(rows))
    lines: Iterable[str] = _texts(placed, column, name)
    if sentences:
        lines = (sentence for line in lines for sentence in split_sentences(line))
    return _sample(lines, max_lines, seed, name)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph. A heading, a short line that does not end like a sentence, has none.

    A sentence ends with a full stop, question or exclamation mark of any script, if a space and no small letter
    follows. Chinese and Japanese need no space. In scripts without such marks (Thai), a paragraph is one sentence.
    """
    sentences: list[str] = []
    for part in _END.sub(lambda end: f"{end[1] or end[2]}\n", paragraph.strip()).splitlines():
        if sentences and (part[0].islower() or _ABBREVIATED.search(sentences[-1])):
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    if len(sentences) == 1 and not _ENDED.search(sentences[0]) and len(sentences[0]) < _SHORTEST_LINE:
        return []
    return sentences


def text_files(path: Path) -> list[Path]:
    """The file, or all text files of the folder and its folders, by name. Raises what `read_text` raises."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if suffix_of(p) in _SUFFIXES and p.is_file())
        if not found:
            raise FileNotFoundError(f"{path}: no .txt, .tsv or .jsonl file (or .gz of one) in this folder")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file or folder")
    if suffix_of(path) not in _SUFFIXES:
        raise ValueError(f"{path}: expected a .txt, .tsv or .jsonl file (or .gz of one), or a folder")
    return [path]


def _lines(path: Path) -> Iterator[str]:
    if suffix_of(path) == "jsonl":
        return _texts(read_jsonl(path, ("text",)), "text", str(path))
    lines = read_lines(path)
    return (line.split("\t", 1)[0] for line in lines) if suffix_of(path) == "tsv" else lines


def _texts(rows: Iterable[tuple[Place, dict[str, Any]]], column: str, source: str) -> Iterator[str]:
    """The lines of the texts in a column. Nulls are skipped, with a warning at the end."""
    nulls = 0
    for where, row in rows:
        if row.get(column, "") is None:
            nulls += 1
        else:
            yield from text_in(row, column, where).split("\n")
    if nulls:
        warnings.warn(f"{source}: {nulls:,} rows without a text (null) are skipped", PassedOver, stacklevel=2)


def _sample(lines: Iterable[str], max_lines: int | None, seed: int, where: str) -> list[str]:
    if max_lines is not None and max_lines < 1:
        raise ValueError(f"{where}: max_lines must be at least 1, got {max_lines}")
    texts = (line for line in (raw.strip() for raw in lines) if line)
    if max_lines is None:
        kept = list(texts)
    else:
        draws, reservoir = random.Random(seed), []
        for number, text in enumerate(texts):
            if number < max_lines:
                reservoir.append((number, text))
            elif (at := draws.randint(0, number)) < max_lines:
                reservoir[at] = (number, text)
        kept = [text for _, text in sorted(reservoir)]
    if not kept:
        raise FileFormatError(where, "no text in it")
    return kept
