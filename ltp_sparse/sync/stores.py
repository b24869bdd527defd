"""Stores: a folder, or any file system of fsspec, with a flat list of names."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ltp_sparse.weights.files import atomic_path


@runtime_checkable
class Store(Protocol):
    """A flat list of names with contents. A write takes effect completely or not at all."""

    def names(self) -> set[str]:
        """All present names."""

    def read(self, name: str) -> bytes:
        """The content. Raises FileNotFoundError if there is no such name."""

    def write(self, name: str, content: bytes) -> None:
        """Adds a name, or replaces its content."""

    def remove(self, name: str) -> None:
        """Removes a name. Does nothing if there is no such name."""


class FolderStore:
    """A folder, which the first write creates. Network file systems must have an atomic `rename`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"FolderStore({str(self.folder)!r})"

    def names(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.folder) if not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with atomic_path(self.folder / name) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class FsspecStore:
    """A folder of an fsspec file system whose writes are atomic, as those of object stores are (S3, GCS, ...).

    Args:
        filesystem: a file system of fsspec.
        folder: the path of the folder in it.
    """

    def __init__(self, filesystem: Any, folder: str) -> None:
        self.filesystem, self.folder = filesystem, folder.rstrip("/")

    def __repr__(self) -> str:
        return f"FsspecStore({type(self.filesystem).__name__}, {self.folder!r})"

    def names(self) -> set[str]:
        self.filesystem.invalidate_cache(self.folder)
        try:
            found = self.filesystem.ls(self.folder, detail=False)
        except FileNotFoundError:
            return set()
        return {path.rsplit("/", 1)[-1] for path in found}

    def read(self, name: str) -> bytes:
        return bytes(self.filesystem.cat_file(f"{self.folder}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        self.filesystem.makedirs(self.folder, exist_ok=True)
        self.filesystem.pipe_file(f"{self.folder}/{name}", content)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.folder}/{name}")


def open_store(store: Store | str | os.PathLike[str]) -> Store:
    """The store for a folder or a URL of fsspec such as "s3://bucket/run". A store is returned as it is.

    Raises:
        ImportError: a URL needs fsspec, which is not installed.
        TypeError: it is none of these.
    """
    if isinstance(store, str) and "://" in store:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise ImportError(f"{store!r} needs fsspec: pip install fsspec; a folder does not need it") from error
        filesystem, folder = url_to_fs(store)
        protocols = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
        return FolderStore(folder) if "file" in protocols else FsspecStore(filesystem, folder)
    if isinstance(store, str | os.PathLike):
        return FolderStore(os.path.expanduser(store))
    if isinstance(store, Store):
        return store
    raise TypeError(f"expected a folder, a URL or a store with names, read, write and remove, got {store!r}")
