"""Common parts of all readers of files: the exception, the list of readers, limits, JSON and YAML.

Files are not trusted. The memory that a file requests is limited before it is allocated, and a file that cannot be read
raises a `FileFormatError` with file and place, and no other exception.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_Read = TypeVar("_Read", bound=Callable[..., Any])

READERS: dict[str, str] = {}
"""Kind of file -> module and name of its reader. The fuzz test runs all of them."""

LARGEST_JSON = 64 << 20
LARGEST_YAML = 1 << 20
_DEEPEST = 100
_MOST_NODES = 100_000
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")


class FileFormatError(ValueError):
    """A file is truncated, damaged, of another kind, or has invalid content.

    For the content of a file, every reader of the library raises this error and no other. A missing file raises
    FileNotFoundError.

    Args:
        path: the file.
        problem: what was expected, what was found, and what to do.
        place: the place in the file, e.g. "line 3", "tensor 'w'" or "metadata"; None for the whole file.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str, place: str | None = None) -> None:
        super().__init__(f"{path}: {problem}" if place is None else f"{path}, {place}: {problem}")
        self.path = Path(path)
        self.problem = problem
        self.place = place

    def __reduce__(self) -> tuple[type[FileFormatError], tuple[Path, str, str | None]]:
        return FileFormatError, (self.path, self.problem, self.place)


@dataclass(frozen=True)
class Place:
    """A place in a file, for error messages.

    Attributes:
        source: the file, or the name of a data set.
        at: the place, e.g. "row 3" (counted from the header) or "'encoder.weight'".
    """

    source: str | os.PathLike[str]
    at: str

    def __str__(self) -> str:
        return f"{self.source}, {self.at}"

    def error(self, problem: str) -> FileFormatError:
        """The error to raise for a problem at this place."""
        return FileFormatError(self.source, problem, self.at)


def reader(what: str) -> Callable[[_Read], _Read]:
    """Registers a function as the reader of a kind of file. No other public function opens files for reading."""

    def register(read: _Read) -> _Read:
        READERS[what] = f"{read.__module__}.{read.__qualname__}"
        return read

    return register


def closest(name: str, names: Iterable[str], count: int = 3) -> str:
    """A phrase that lists the known names closest to `name`."""
    near = difflib.get_close_matches(name, list(names), n=count, cutoff=0.0)
    return ", ".join(repr(n) for n in near) if near else "none"


def read_whole(path: str | os.PathLike[str], expected: str, largest: int) -> bytes:
    """The bytes of a whole file.

    Args:
        path: the file.
        expected: what it should be, for messages: "a recipe".
        largest: the limit in bytes; a larger file is an error.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise FileFormatError(path, f"expected {expected} of at most {largest >> 20} MB, but this file is larger")
    return content


def decoded(content: bytes, path: str | os.PathLike[str], place: str | None = None) -> str:
    """The text of UTF-8 bytes, without the byte order mark that spreadsheets write."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileFormatError(path, "this is UTF-16; convert the file to UTF-8", place)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileFormatError(path, f"not UTF-8 ({error.reason}); convert the file", place or f"line {line}") from error
    if "\0" in text:
        raise FileFormatError(path, "a NUL character; this is no text file, or it has another encoding", place)
    return text


def parse_json(text: str, path: str | os.PathLike[str], place: str | None = None) -> Any:
    """A JSON value. Duplicate keys and deep nesting are errors.

    Args:
        text: the JSON.
        path: its file, for messages.
        place: its place in the file; None: messages name the line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise FileFormatError(path, f"JSON that is nested more than {_DEEPEST} deep", place) from error
    except ValueError as error:
        where = f"line {error.lineno}" if place is None and isinstance(error, json.JSONDecodeError) else place
        raise FileFormatError(path, f"not JSON ({error}); the file may be truncated or damaged", where) from error
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(value, path, place)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object"
        )
    return found


def _check_depth(value: Any, path: str | os.PathLike[str], place: str | None) -> None:
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise FileFormatError(path, f"JSON that is nested more than {_DEEPEST} deep", place)
        inside = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level, depth = [one for values in inside for one in values if isinstance(one, dict | list)], depth + 1


@reader("JSON")
def read_json(path: str | os.PathLike[str], expected: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        path: the file.
        expected: what it should be, for messages: "the description of a run".
        keys: required keys.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is not JSON, not an object, or lacks a key.
    """
    value = parse_json(decoded(read_whole(path, expected, LARGEST_JSON), path), path)
    if not isinstance(value, dict):
        raise FileFormatError(path, f"expected {expected}, a JSON object, got {shown(value)}")
    if missing := [key for key in keys if key not in value]:
        raise FileFormatError(path, f"expected {expected}, but it has no {missing[0]!r}, only {shown(list(value))}")
    return value


@reader("YAML")
def read_yaml(path: str | os.PathLike[str], expected: str) -> dict[str, Any]:
    """The mapping of a YAML file: strings, numbers, booleans, nulls, lists, and mappings with strings as keys.

    Args:
        path: the file.
        expected: what it should be, for messages: "a recipe".

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is not YAML, or has other types; the message names the line.
    """
    import yaml  # noqa: F401  a missing package is the first error

    value = parse_yaml(decoded(read_whole(path, expected, LARGEST_YAML), path), path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FileFormatError(path, f"expected {expected}, a mapping of names to values, got {shown(value)}")
    return value


def parse_yaml(text: str, path: str | os.PathLike[str]) -> Any:
    """A YAML value of plain types, see `read_yaml`; `path` is for messages."""
    import yaml

    fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader, depth = None, 0
    try:
        for event in yaml.parse(text, Loader=fastest):  # before nodes are made, which recurses at every level
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise FileFormatError(path, f"YAML that is nested more than {_DEEPEST} deep", f"line {line}")
        loader = fastest(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, path, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise FileFormatError(path, f"not YAML ({problem})", f"line {mark.line + 1}" if mark else None) from error
    except FileFormatError:
        raise
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FileFormatError(path, f"not YAML ({' '.join(str(error).split())})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _weigh(node: Any, path: str | os.PathLike[str], known: dict[int, int | None]) -> int:
    """Counts the values of a YAML node, aliases each time. Refuses other types, cycles and large documents.

    Args:
        node: the node.
        path: its file, for messages.
        known: node -> its count, None while it is being counted.
    """
    import yaml

    def wrong(problem: str, at: Any = node) -> FileFormatError:
        return FileFormatError(path, problem, f"line {at.start_mark.line + 1}")

    if (before := known.get(id(node), 0)) is None:
        raise wrong("an alias of a value that contains it")
    if before:
        return before
    if (tag := node.tag.removeprefix("tag:yaml.org,2002:")) not in _TAGS:
        raise wrong(f"a value of the type {tag!r}; put strings in quotes; other types are not supported")
    known[id(node)], total = None, 1
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            merged = key.tag.endswith(":merge")
            if not isinstance(key, yaml.ScalarNode) or not (merged or key.tag.endswith(":str")):
                raise wrong(f"expected a string as a key, got {shown(key.value)}; put it in quotes", key)
            if key.value in names and not merged:
                raise wrong(f"the key {key.value!r} occurs twice", key)
            names.add(key.value)
            total += 1 + _weigh(value, path, known)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_weigh(value, path, known) for value in node.value)
    if total > _MOST_NODES:
        raise wrong(f"more than {_MOST_NODES:,} values, aliases counted each time")
    known[id(node)] = total
    return total


def shown(value: Any) -> str:
    """A value in a message: its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def sha256_of(content: Any) -> str:
    """The SHA-256 of a JSON value, 64 hexadecimal digits: for ids and for files without tensors."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
