"""Large files of the library, written as shards of limited size and an index, as the Hub keeps models.

`ticket.safetensors` becomes `ticket.safetensors.index.json` and `ticket-TAG-00001-of-00002.safetensors`, ... The tag
follows from the content, so the shards of a new save never overwrite those of an earlier one. The earlier index stays
valid until the new one, which is written last, replaces it in one step.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.weights import files
from ltp_sparse.weights.reading import FileFormatError, read_json, reader

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_SIZE = "5GB"
"""The size that the Hub recommends."""
_INDEX = ".index.json"
_SUFFIX = ".safetensors"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def save(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    max_shard_size: int | str | None = MAX_SHARD_SIZE,
) -> None:
    """Writes one file, or shards and their index if that file would be larger than `max_shard_size`.

    Args:
        path: the file. The names of shards and index are derived from it.
        kind: the kind of file, e.g. "ticket".
        tensors: name -> tensor. Tensors are never cut; one above the limit gets a shard of its own.
        metadata: JSON values.
        max_shard_size: bytes, or text such as "500MB" or "5GB"; None: always one file.

    Raises:
        ValueError: `max_shard_size` cannot be understood.
        OSError: a file cannot be written.
    """
    parts = _split(tensors, math.inf if max_shard_size is None else _bytes_of(max_shard_size))
    target = files.destination(path)
    index = target.with_name(target.name + _INDEX)
    files.check_writable(target)
    if len(parts) == 1:
        files.save(path, kind, tensors, metadata)
        if index.exists():
            with _locked(target.parent):
                index.unlink(missing_ok=True)
                _remove_shards(target, kept=())
        return
    with _threads(len(parts)) as pool:
        ready = list(pool.map(lambda part: files.ready(_shard_of(kind), part, {}), parts))
    checksums = [checksum for _, _, checksum in ready]
    tag, stem = files.checksum_of({"shards": checksums})[-8:], target.name.removesuffix(_SUFFIX)
    names = [f"{stem}-{tag}-{number:05}-of-{len(parts):05}{_SUFFIX}" for number in range(1, len(parts) + 1)]
    described: dict[str, dict[str, Any]] = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, part in zip(names, parts, strict=True) for name in part},
        files.KEY: {
            **metadata,
            "kind": kind,
            "format": files.FORMAT_VERSION,
            "shards": dict(zip(names, checksums, strict=True)),
        },
    }
    described[files.KEY]["checksum"] = files.checksum_of(described)
    with _locked(target.parent):
        for name, (contiguous, header, _) in zip(names, ready, strict=True):
            files.write(target.with_name(name), contiguous, header)
        files.write_text(index, json.dumps(described, indent=1, sort_keys=True) + "\n")
        target.unlink(missing_ok=True)
        _remove_shards(target, kept=names)


@reader("index of shards")
def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads files that `save` has written and verifies their checksums. Shards are read on several threads.

    Args:
        path: the path that was given to `save`, an index, or a folder with one file or index of this kind.
        kind: the kind of file, e.g. "ticket".

    Returns:
        (name -> tensor, metadata)

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: a file is damaged, missing, of another kind, or belongs to another save.
    """
    found = _located(Path(path), kind)
    if not found.name.endswith(_INDEX):
        try:
            return files.load(found, kind)
        except files.WrongKind as error:
            if error.found != _shard_of(kind):
                raise
            raise FileFormatError(found, f"is one of several shards of a {kind}; pass their folder or index") from error
    weight_map, metadata, checksums = _read_index(found, kind)
    with _threads(len(checksums)) as pool:
        shards = dict(zip(checksums, pool.map(lambda name: _read_shard(found, name, kind), checksums), strict=True))
    for name, (_, checksum) in shards.items():
        if checksum != checksums[name]:
            raise FileFormatError(found, f"{name} belongs to another save; copy index and shards again")
    for name, (held, _) in shards.items():
        if held.keys() != {tensor for tensor, shard in weight_map.items() if shard == name}:
            raise FileFormatError(found, f"{name} does not hold the tensors that the index lists")
    return {tensor: shards[shard][0][tensor] for tensor, shard in weight_map.items()}, metadata


def index_of(path: str | os.PathLike[str]) -> Path | None:
    """The index of the shards that were saved under this path; None if it was saved as one file."""
    path = Path(path)
    if path.name.endswith(_INDEX) or path.is_dir():
        return None
    with suppress(OSError):
        path = files.destination(path)
    index = path.with_name(path.name + _INDEX)
    return index if index.is_file() else None


def claimed_kind(path: str | os.PathLike[str]) -> str | None:
    """The kind that a file or an index claims to have, unverified, as `files.claimed_kind`."""
    if not str(path).endswith(_INDEX):
        return files.claimed_kind(path)
    try:
        return str(read_json(path, "an index of shards", (files.KEY,))[files.KEY]["kind"])
    except (OSError, FileFormatError, LookupError, TypeError):
        return None


def _located(path: Path, kind: str) -> Path:
    """The file or index to read for a path."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith((_SUFFIX, _INDEX)))
        found = [path / name for name in names if claimed_kind(path / name) == kind]
        if not found:
            raise FileNotFoundError(errno.ENOENT, f"no {kind} in this folder, neither a file nor an index", str(path))
        if len(found) > 1:
            several = ", ".join(one.name for one in found)
            raise FileFormatError(path, f"expected one {kind} in this folder, got {several}; pass one of them")
        return found[0]
    index = index_of(path)
    if index is not None and path.is_file():
        problem = f"{index.name} is there as well, since a save was interrupted; remove the older one of the two"
        raise FileFormatError(path, problem)
    return index or path


def _read_index(index: Path, kind: str) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
    """(tensor -> shard, metadata, shard -> checksum) of an index."""
    content = read_json(index, f"the index of a {kind} of ltp_sparse", ("metadata", "weight_map", files.KEY))
    with files.understanding(index, kind):
        described = content[files.KEY]
        files.check_format(index, described)
        checksum = described.pop("checksum")
        if files.checksum_of(content, like=checksum) != checksum:
            raise FileFormatError(index, "the checksum does not match its content; it is damaged, copy it again")
        if described["kind"] != kind:
            raise files.WrongKind(index, kind, str(described["kind"]))
        checksums = described.pop("shards")
        for name in checksums:
            if Path(name).name != name:
                raise FileFormatError(index, f"the shard {name!r} is outside the folder")
        if foreign := set(content["weight_map"].values()) - checksums.keys():
            raise FileFormatError(index, f"it has no checksum of {sorted(foreign)[0]}")
        return content["weight_map"], described, checksums


def _read_shard(index: Path, name: str, kind: str) -> tuple[dict[str, Tensor], str]:
    shard = index.with_name(name)
    if not shard.is_file():
        raise FileFormatError(index, f"it names the shard {name}, which is missing; copy it again")
    tensors, _, checksum = files.load_verified(shard, _shard_of(kind))
    return tensors, checksum


def _shard_of(kind: str) -> str:
    return f"shard of a {kind}"


def _split(tensors: Mapping[str, Tensor], limit: float) -> list[dict[str, Tensor]]:
    """The tensors in their order, divided into shards of at most `limit` bytes."""
    parts: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        room -= tensor.nbytes
        parts[-1][name] = tensor
    return parts


def _bytes_of(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|B|KB|MB|GB)\s*", str(size), re.IGNORECASE)
    n = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if n < 1 or isinstance(size, bool):
        raise ValueError(f'max_shard_size must be bytes, or "500MB" or "5GB", or None for one file, got {size!r}')
    return n


def _threads(tasks: int) -> ThreadPoolExecutor:
    import torch

    return ThreadPoolExecutor(min(max(tasks, 1), torch.get_num_threads()))


def _remove_shards(target: Path, kept: Collection[str]) -> None:
    """Removes shards of other saves to `target`."""
    stem = re.escape(target.name.removesuffix(_SUFFIX))
    shard = re.compile(rf"{stem}-[0-9a-f]{{8}}-\d{{5}}-of-\d{{5}}{re.escape(_SUFFIX)}")
    for entry in list(target.parent.iterdir()):
        if shard.fullmatch(entry.name) and entry.name not in kept:
            entry.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one writer of shards at a time into a folder, so that none removes the shards of another."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # on file systems without locks, the user must prevent this
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
