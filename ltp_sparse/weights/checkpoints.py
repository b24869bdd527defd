"""Checkpoints on disk, read piece by piece through a memory map and never as a whole."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from ltp_sparse.weights import files
from ltp_sparse.weights.names import Named, bare_names, canonical_group, is_floating
from ltp_sparse.weights.reading import FileFormatError, read_json, reader
from ltp_sparse.weights.tensors import flat_piece

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
VIEW = 1 << 22  # entries read at a time, enough to keep all threads busy
_PIECE = 1 << 20  # entries compared at a time


class _MappedFile:
    """A memory-mapped safetensors file. Its bytes come from the page cache when they are read.

    Another process could write into the file, so its size and time are checked around every read. If the file is
    replaced by a move, the old content remains readable here. If it shrinks during a read, the system ends this process
    (SIGBUS), which no library can prevent.

    Raises:
        FileFormatError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}  # checks the header and the size of the file
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            # copy on write, because torch warns about read-only buffers
            self.bytes = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError) as error:
            raise FileFormatError(path, f"not a readable safetensors file ({error}); {files.cure(path)}") from error
        self._state = self._stat()
        self.start = 8 + int.from_bytes(self.bytes[:8], "little")
        self.tensors: dict[str, dict[str, Any]] = json.loads(self.bytes[8 : self.start])
        if files.KEY in (self.tensors.pop("__metadata__", None) or {}):
            files.verify(path)  # files of this library carry a checksum

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file)
        return stat.st_size, stat.st_mtime_ns

    def check(self) -> None:
        """Raises a FileFormatError if the file has changed since it was opened."""
        if self._stat() != self._state:
            raise FileFormatError(self.path, "was changed while it was read; try again when it is complete")


class CheckpointTensor:
    """One tensor of a safetensors file; its entries are read on use."""

    def __init__(self, file: _MappedFile, name: str) -> None:
        entry = file.tensors[name]
        # dtypes below one byte per entry are never read as numbers
        self.dtype, self.shape = _DTYPES.get(entry["dtype"], torch.uint8), Size(entry["shape"])
        self.stored = f"{entry['dtype']} in {file.path}"
        self._file, self._bytes, self._start = file, file.bytes, file.start + entry["data_offsets"][0]

    def numel(self) -> int:
        """The number of entries."""
        return self.shape.numel()

    def is_in(self, path: str | os.PathLike[str]) -> bool:
        """Whether this file holds the tensor."""
        return os.path.exists(path) and os.path.samefile(self._file.path, path)

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the row-major order, as a view of the file."""
        self.check()
        if start == stop:
            return torch.empty(0, dtype=self.dtype, device="cpu")
        offset = self._start + start * self.dtype.itemsize
        return torch.frombuffer(self._bytes, dtype=self.dtype, count=stop - start, offset=offset)

    def check(self) -> None:
        """Raises a FileFormatError if the file has changed since it was opened."""
        self._file.check()

    def release(self, start: int, stop: int) -> None:
        """Frees the memory of these entries; the next access reads them again. Raises the errors of `check`."""
        self.check()
        size = self.dtype.itemsize
        first = -(-(self._start + start * size) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self._start + stop * size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._bytes.madvise(mmap.MADV_DONTNEED, first, last - first)


@reader("checkpoint")
def open_checkpoint(path: str | os.PathLike[str]) -> Named[CheckpointTensor]:
    """Canonical name -> tensor of a safetensors file, of shards by their index, or of a folder with either.

    All tensors of any dtype are included, also buffers. The index decides which shard holds a tensor; copies in other
    shards are ignored. Ties that `safetensors.torch.save_model` has recorded are resolved.

    Args:
        path: the file, index or folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        FileFormatError: a file is damaged, index and shards do not agree, or two names are equal without the names of
            wrapping modules.
    """
    path = Path(path)
    index = path if path.name.endswith(_INDEX[5:]) else path / _INDEX
    if index.is_file():
        members = _sharded(index)
    elif path.is_file() or (path.is_dir() and (path / "model.safetensors").is_file()):
        file = _MappedFile(path if path.is_file() else path / "model.safetensors")
        members = dict.fromkeys(file.tensors, file)
    else:
        raise FileNotFoundError(
            f"{path}: expected a safetensors file, or a folder with model.safetensors or {_INDEX}. "
            "Pickled checkpoints (.bin) are not read; convert them with save_pretrained(safe_serialization=True)"
        )
    ties = {
        other: stored
        for file in set(members.values())
        for other, stored in file.metadata.items()
        if stored in members and other not in members
    }
    tensors = {name: CheckpointTensor(file, name) for name, file in members.items()}
    try:
        bare = bare_names([*tensors, *ties], [name for name, tensor in tensors.items() if is_floating(tensor)])
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    return canonical_group([*((n, t) for n, t in tensors.items()), *((o, tensors[s]) for o, s in ties.items())], bare)


def _sharded(index: Path) -> dict[str, _MappedFile]:
    """Name -> the shard that holds the tensor, according to the index."""
    folder = index.parent
    weight_map = read_json(index, "an index of shards", ("weight_map",))["weight_map"]
    if not isinstance(weight_map, dict):
        raise FileFormatError(index, f"expected a mapping to shards, got {type(weight_map).__name__}", "weight_map")
    if not weight_map:
        raise FileFormatError(index, "its weight_map names no tensor; copy the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or "\0" in shard:
            raise FileFormatError(index, f"expected the name of a shard, got {shard!r}", f"tensor {name!r}")
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise FileFormatError(index, f"the shard {shard!r} is outside the folder", f"tensor {name!r}")
    # "./a" is the file "a", however it is written
    pairs = [(name, os.path.normpath(shard)) for name, shard in weight_map.items()]
    shards = {shard: folder / shard for shard in sorted({shard for _, shard in pairs})}
    if gone := next((path for path in shards.values() if not path.is_file()), None):
        raise FileFormatError(index, f"it names the shard {gone.name}, which is missing; copy it again")
    beside = {"model.safetensors", *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    if others := sorted(name for name in beside - shards.keys() if (folder / name).exists()):
        raise FileFormatError(
            index, f"it does not name {others[0]}, which is in the same folder; remove the outdated one of the two"
        )
    files = {shard: _MappedFile(path) for shard, path in shards.items()}
    for name, shard in pairs:
        if name not in files[shard].tensors:
            where = next((other for other, file in files.items() if name in file.tensors), "none of its shards")
            raise FileFormatError(
                index, f"it says that {name!r} is in {shard}, but it is in {where}; copy index and shards again"
            )
    for shard, file in files.items():
        if unknown := next((name for name in file.tensors if name not in weight_map), None):
            raise FileFormatError(
                index, f"it does not name {unknown!r}, which {shard} holds; copy index and shards again"
            )
    return {name: files[shard] for name, shard in pairs}


Readable = Tensor | CheckpointTensor


def read_piece(tensor: Readable, start: int, stop: int) -> Tensor:
    """Entries start..stop of the row-major order, contiguous, on the CPU."""
    return tensor.piece(start, stop) if isinstance(tensor, CheckpointTensor) else flat_piece(tensor, start, stop).cpu()


def pairs_of_pieces(one: Readable, other: Readable) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the pieces of two tensors of one shape, some megabytes at a time, on the CPU."""
    for start in range(0, one.numel(), _PIECE):
        stop = min(start + _PIECE, one.numel())
        yield read_piece(one, start, stop), read_piece(other, start, stop)
