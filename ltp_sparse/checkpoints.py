"""Checkpoints on disk as sources of a selection: read piece by piece through a mapping, never whole."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from ltp_sparse import files
from ltp_sparse.names import Named, bare_names, canonical_group, is_floating
from ltp_sparse.reading import FileFormatError, read_json, reader
from ltp_sparse.staging import Piece, staged
from ltp_sparse.topk import Chunk, Layout, Passes, flat_piece, piece_of

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_PIECE = 1 << 19  # entries copied at a time: 2 MB of each float32 tensor
_VIEW = 1 << 22  # entries looked at at a time where they lie: enough to keep all threads busy
_KEPT = 384 << 20  # bytes of both sides that stay mapped from one reading to the next: page cache, taken back at need
_SAMPLED = 64 << 20  # bytes of both sides that samples are taken from at a time, if they may not
_STAGED = 1 << 23  # entries sent to a GPU at a time: 32 MB of each float32 tensor, twice page-locked


class _MappedFile:
    """A safetensors file, mapped. Its bytes come from the page cache when they are touched.

    What another process writes into the file meanwhile would be read as if it had been there: its size and time are
    looked at again around every reading. A file that is replaced (moved over) keeps its content here. One that shrinks
    in the very moment of a reading ends the process (SIGBUS), which no library can prevent.

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
            # copy on write, since torch warns of buffers that cannot be written
            self.bytes = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError) as error:
            raise FileFormatError(path, f"not a readable safetensors file ({error}); copy it again") from error
        self._state = self._stat()
        self.start = 8 + int.from_bytes(self.bytes[:8], "little")
        self.tensors: dict[str, dict[str, Any]] = json.loads(self.bytes[8 : self.start])
        if files.KEY in (self.tensors.pop("__metadata__", None) or {}):
            files.verify(path)  # what this library writes carries a checksum

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file)
        return stat.st_size, stat.st_mtime_ns

    def check(self) -> None:
        """Raises a FileFormatError if the file has changed since it was opened."""
        if self._stat() != self._state:
            raise FileFormatError(self.path, "was changed while it was read; read it again when it is written")


class CheckpointTensor:
    """One tensor of a safetensors file; its entries are read when they are looked at."""

    def __init__(self, file: _MappedFile, name: str) -> None:
        entry = file.tensors[name]
        # kinds of less than a byte per entry are never read as numbers
        self.dtype, self.shape = _DTYPES.get(entry["dtype"], torch.uint8), Size(entry["shape"])
        self.stored = f"{entry['dtype']} in {file.path}"
        self._file, self._bytes, self._start = file, file.bytes, file.start + entry["data_offsets"][0]

    def numel(self) -> int:
        return self.shape.numel()

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
        """Takes these entries out of this process's memory; looking at them again reads them again."""
        first = self._start + start * self.dtype.itemsize
        last = self._start + stop * self.dtype.itemsize
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        last = last // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._bytes.madvise(mmap.MADV_DONTNEED, first, last - first)

    def pieces(self) -> Iterator[Tensor]:
        """The tensor in row-major order, some entries at a time."""
        for start in range(0, self.numel(), _VIEW):
            stop = min(start + _VIEW, self.numel())
            yield self.piece(start, stop)
            self.release(start, stop)
        self.check()


@reader("checkpoint")
def open_checkpoint(path: str | os.PathLike[str]) -> Named[CheckpointTensor]:
    """Canonical name -> tensor of a safetensors file, or of a folder with one file or shards and their index.

    All tensors are there, of any dtype, buffers included. The index of shards says which of them holds a tensor; a copy
    in another is not looked at. What `safetensors.torch.save_model` notes of tied tensors makes them one.

    Raises:
        FileNotFoundError: nothing of that kind is there.
        FileFormatError: a file is damaged; index and shards do not fit; two names are one without the names of
            wrapping modules.
    """
    path = Path(path)
    index = path / _INDEX
    if path.is_dir() and index.is_file():
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
        floating = [name for name, tensor in tensors.items() if is_floating(tensor)]
        bare = bare_names([*tensors, *ties], floating)
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    return canonical_group([*((n, t) for n, t in tensors.items()), *((o, tensors[s]) for o, s in ties.items())], bare)


def _sharded(index: Path) -> dict[str, _MappedFile]:
    """Name -> the shard that holds it, by the index."""
    folder = index.parent
    weight_map = read_json(index, "an index of shards", ("weight_map",))["weight_map"]
    if not isinstance(weight_map, dict):
        raise FileFormatError(index, f"expected names and their shards, got {type(weight_map).__name__}", "weight_map")
    if not weight_map:
        raise FileFormatError(index, "its weight_map names no tensor; copy the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or "\0" in shard:
            raise FileFormatError(index, f"expected the name of a shard, got {shard!r}", f"tensor {name!r}")
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise FileFormatError(
                index, f"the shard {shard!r} is outside the folder, which is refused", f"tensor {name!r}"
            )
    # "./a" is the file "a", however it is written
    pairs = [(name, os.path.normpath(shard)) for name, shard in weight_map.items()]
    shards = {shard: folder / shard for shard in sorted({shard for _, shard in pairs})}
    if gone := next((path for path in shards.values() if not path.is_file()), None):
        raise FileFormatError(index, f"it names the shard {gone.name}, which is not there; copy it again")
    beside = {"model.safetensors", *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    if others := sorted(name for name in beside - shards.keys() if (folder / name).exists()):
        raise FileFormatError(
            index, f"it does not name {others[0]}, which lies beside it; remove the one that is out of date"
        )
    files = {shard: _MappedFile(path) for shard, path in shards.items()}
    for name, shard in pairs:
        if name not in files[shard].tensors:
            where = next((other for other, file in files.items() if name in file.tensors), "none of its shards")
            raise FileFormatError(
                index, f"it says that {name!r} is in {shard}, but {where} holds it; copy index and shards again"
            )
    for shard, file in files.items():
        if unknown := next((name for name in file.tensors if name not in weight_map), None):
            raise FileFormatError(
                index, f"it does not name {unknown!r}, which {shard} holds; copy index and shards again"
            )
    return {name: files[shard] for name, shard in pairs}


Readable = Tensor | CheckpointTensor


def read_piece(tensor: Readable, start: int, stop: int) -> Tensor:
    return tensor.piece(start, stop) if isinstance(tensor, CheckpointTensor) else flat_piece(tensor, start, stop).cpu()


@dataclass(frozen=True)
class Reader:
    """A tensor that is read piece by piece.

    n:        entries
    read:     (start, stop) -> these entries of the row-major order, contiguous
    device:   where these are
    copies:   whether a piece takes memory of its own
    release:  told (start, stop) when a piece is no longer needed, if given; not by a `StreamSource` of small pairs
    itemsize: bytes of an entry
    """

    n: int
    read: Callable[[int, int], Tensor]
    device: torch.device
    copies: bool = True
    release: Callable[[int, int], None] | None = None
    itemsize: int = 4

    @classmethod
    def of(cls, tensor: Readable) -> Reader:
        """Reads a tensor where it is: in memory, or on disk through the CPU's."""
        n, itemsize = tensor.numel(), tensor.dtype.itemsize
        if isinstance(tensor, CheckpointTensor):
            return cls(n, tensor.piece, torch.device("cpu"), False, tensor.release, itemsize)
        read = partial(flat_piece, tensor)
        return cls(n, read, tensor.device, not tensor.is_contiguous(), None, itemsize)

    def rounded(self, dtype: torch.dtype | None) -> Reader:
        """Reads the entries rounded to a dtype; None: as they are."""
        if dtype is None:
            return self
        read = self.read
        return replace(self, read=lambda start, stop: read(start, stop).to(dtype), copies=True, itemsize=dtype.itemsize)

    def part(self, start: int, stop: int) -> Reader:
        """Entries start..stop as a tensor of their own."""
        release = self.release
        return replace(
            self,
            n=stop - start,
            read=lambda a, b: self.read(start + a, start + b),
            release=release and (lambda a, b: release(start + a, start + b)),
        )


class StreamSource:
    """Pairs of tensors that are read piece by piece, anew in every pass; samples are taken where the entries lie.

    Args:
        initial, tuned: a reader per tensor; `initial` may be empty: zeros.
        device: where the passes run. What is read elsewhere is copied there, a piece ahead.
        progress: its `update` is told the bytes that were read.
    """

    def __init__(
        self,
        initial: Sequence[Reader],
        tuned: Sequence[Reader],
        device: torch.device | str = "cpu",
        progress: Any = None,
    ) -> None:
        self.initial, self.tuned = list(initial), list(tuned)
        self.sizes = [reader.n for reader in self.tuned]
        self.device = torch.device(device)
        self.layout = Layout(self.sizes)
        self.progress = progress

    @property
    def nbytes(self) -> int:
        """Bytes of one pass."""
        return sum(reader.n * reader.itemsize for reader in (*self.initial, *self.tuned))

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        pairs = {t: [side[t] for side in (self.initial, self.tuned) if side] for t in tensors}
        elsewhere = any(reader.device != self.device for pair in pairs.values() for reader in pair)
        pieces = []
        for tensor, pair in pairs.items():
            size = _STAGED if elsewhere else _PIECE if any(reader.copies for reader in pair) else _VIEW
            n = self.sizes[tensor]
            pieces += [(tensor, start, min(start + size, n)) for start in range(0, n, size)]
        release = self._release if self.nbytes > _KEPT else _nothing
        read = (
            Piece(partial(_read, pairs[tensor], start, stop), partial(release, tensor, start, stop))
            for tensor, start, stop in pieces
        )
        room = [max(min(r.n, _STAGED) * r.itemsize for r in side) for side in zip(*pairs.values(), strict=True)]
        found = staged(read, room, self.device) if elsewhere else _in_place(read)
        for (tensor, start, _), (*initial, tuned) in zip(pieces, found, strict=True):
            yield piece_of(self.layout, tensor, start, initial, tuned)
            if self.progress is not None:
                self.progress.update(sum(t.nbytes for t in (*initial, tuned)))

    @property
    def can_sample(self) -> bool:
        """Whether all entries can be looked at where they lie."""
        return not any(reader.copies or reader.device != self.device for reader in (*self.initial, *self.tuned))

    def sample(self, passes: Passes, tensors: Tensor, runs: Tensor, keys: Tensor) -> None:
        sides = [[reader.read(0, reader.n) for reader in side] for side in (self.initial, self.tuned)]
        keep = self.nbytes <= _KEPT
        some = len(runs) if keep else max(1, len(runs) * _SAMPLED // self.nbytes)
        for part in zip(tensors.split(some), runs.split(some), keys.split(some), strict=True):
            passes.sample_keys(*sides, *part)
            if not keep:
                for tensor in part[0].unique_consecutive().tolist():
                    self._release(tensor, 0, self.sizes[tensor])

    def _release(self, tensor: int, start: int, stop: int) -> None:
        for side in (self.initial, self.tuned):
            if side and (release := side[tensor].release) is not None:
                release(start, stop)


def _read(pair: Sequence[Reader], start: int, stop: int) -> list[Tensor]:
    return [reader.read(start, stop) for reader in pair]


def _nothing(*_: int) -> None:
    pass


def _in_place(pieces: Iterable[Piece]) -> Iterator[list[Tensor]]:
    for piece in pieces:
        yield list(piece.read())
        piece.release()
