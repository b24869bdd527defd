"""The manifest of a folder: names, sizes and checksums of its files, written last and read first.

While a folder is being written, its manifest says that it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ltp_sparse.weights.files import sync, write_text
from ltp_sparse.weights.reading import FileFormatError, read_json, reader, sha256_of

MANIFEST = "manifest.json"
_KIND = "manifest of ltp_sparse"


class Unfinished(FileFormatError):
    """The writing of a folder was interrupted, so its content cannot be used."""


def start(folder: Path) -> None:
    """Marks a folder as unfinished, before its first file is written."""
    _write(folder, {}, finished=False)


def finish(folder: Path, names: Iterable[str] | None = None) -> None:
    """Writes the manifest once the files are on disk.

    Args:
        folder: the folder.
        names: files to list, relative to the folder; None: all.
    """
    if names is None:
        names = [os.fspath(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    _write(folder, _describe(folder, names), finished=True)


def add(folder: Path, names: Iterable[str]) -> None:
    """Adds files to the manifest of a folder, or updates their entries. Other entries are kept."""
    _write(folder, _read(folder) | _describe(folder, names), finished=True)


@reader("manifest")
def names(folder: Path) -> list[str]:
    """The files that the manifest of a folder lists.

    Raises:
        FileFormatError: the manifest is missing or damaged; `Unfinished` if writing was interrupted.
    """
    return list(_read(folder))


def check(folder: Path, parts: tuple[str, ...] = ("",)) -> None:
    """Compares a folder with its manifest.

    Args:
        folder: the folder.
        parts: prefixes of file names. Checksums are compared for these files, sizes for all.

    Raises:
        FileFormatError: a file or the manifest is missing or differs; `Unfinished` if writing was interrupted.
    """
    for name, expected in _read(folder).items():
        path = folder / name
        if not path.is_file():
            raise FileFormatError(path, f"is missing, but {MANIFEST} lists it")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise FileFormatError(path, f"expected {expected['bytes']:,} bytes according to {MANIFEST}, got {size:,}")
        if name.startswith(parts) and _sha256(path) != expected["sha256"]:
            raise FileFormatError(path, f"its content does not match its checksum in {MANIFEST}; the file is damaged")


def _describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    files = {}
    for name in sorted(names):
        sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return files


def _write(folder: Path, files: Mapping[str, Any], *, finished: bool) -> None:
    content = {"kind": _KIND, "finished": finished, "files": files}
    write_text(folder / MANIFEST, json.dumps({**content, "sha256": sha256_of(content)}, indent=1) + "\n")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileFormatError(
            folder, f"has no {MANIFEST}: it is incomplete, or a version of ltp_sparse without manifests wrote it"
        )
    content = read_json(path, "the manifest of a folder", ("files", "finished", "kind", "sha256"))
    if content.pop("sha256") != sha256_of(content) or content["kind"] != _KIND:
        raise FileFormatError(path, "damaged: its content does not match its own checksum")
    if not content["finished"]:
        raise Unfinished(folder, "its writing was interrupted")
    return dict(content["files"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
