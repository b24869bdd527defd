"""Checkpoints on disk as sources of a selection: read piece by piece through a mapping, never whole."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from ltp_sparse.names import parameter_order, strip_wrappers
from ltp_sparse.reading import FileFormatError, reader
from ltp_sparse.staging import Piece, staged
from ltp_sparse.topk import Chunk, Layout, Passes, flat_piece, piece_of

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BUFFERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}  # position ids and the like: no weights
_INDEX = "model.safetensors.index.json"
_PIECE = 1 << 19  # entries copied at a time: 2 MB of each float32 tensor
_VIEW = 1 << 22  # entries looked at at a time where they lie: enough to keep all threads busy
_KEPT = 384 << 20  # bytes of both sides that stay mapped from one reading to the next: page cache, taken back at need
_SAMPLED = 64 << 20  # bytes of both sides that samples are taken from at a time, if they may not
_STAGED = 1 << 23  # entries sent to a GPU at a time: 32 MB of each float32 tensor, twice page-locked


class _MappedFile:
    """A safetensors file, mapped. Its bytes come from the page cache when they are touched.

    Raises:
        SafetensorError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):
            pass  # checks the header and the size of the file
        with path.open("rb") as file:
            # copy on write, since torch warns of buffers that cannot be written
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.start = 8 + int.from_bytes(self.bytes[:8], "little")
        self.tensors: dict[str, dict[str, Any]] = json.loads(self.bytes[8 : self.start])
        self.tensors.pop("__metadata__", None)


class CheckpointTensor:
    """One tensor of a safetensors file; its entries are read when they are looked at."""

    def __init__(self, file: _MappedFile, name: str, path: Path) -> None:
        entry = file.tensors[name]
        if entry["dtype"] not in _DTYPES:
            raise FileFormatError(
                path, f"stored as {entry['dtype']}; expected one of {', '.join(_DTYPES)}", f"tensor {name!r}"
            )
        self.dtype, self.shape = _DTYPES[entry["dtype"]], Size(entry["shape"])
        self._bytes, self._start = file.bytes, file.start + entry["data_offsets"][0]

    def numel(self) -> int:
        return self.shape.numel()

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the row-major order, as a view of the file."""
        if start == stop:
            return torch.empty(0, dtype=self.dtype)
        offset = self._start + start * self.dtype.itemsize
        return torch.frombuffer(self._bytes, dtype=self.dtype, count=stop - start, offset=offset)

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


@reader("checkpoint")
def open_checkpoint(path: str | os.PathLike[str]) -> dict[str, CheckpointTensor]:
    """Canonical name -> tensor of a safetensors file, or of a folder with one file or shards and their index.

    Integer tensors are left out: they are buffers, not weights.

    Raises:
        FileNotFoundError: nothing of that kind is there.
        ValueError: a file is damaged, or a shard is missing.
    """
    path = Path(path)
    weight_map: dict[str, str] = {}
    if path.is_dir() and (path / _INDEX).is_file():
        try:
            weight_map = json.loads((path / _INDEX).read_text())["weight_map"]
            paths = sorted({path / shard for shard in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(path / _INDEX, f"not an index of shards ({error!r})") from error
    elif path.is_dir() and (path / "model.safetensors").is_file():
        paths = [path / "model.safetensors"]
    elif path.is_file():
        paths = [path]
    else:
        raise FileNotFoundError(
            f"{path}: expected a safetensors file, or a folder with model.safetensors or {_INDEX}. "
            "Pickled checkpoints (.bin) are not read; convert them with save_pretrained(safe_serialization=True)"
        )
    tensors: dict[str, CheckpointTensor] = {}
    stored: set[str] = set()
    for shard in paths:
        try:
            file = _MappedFile(shard)
            stored |= set(file.tensors)
            weights = [name for name, entry in file.tensors.items() if entry["dtype"] not in _BUFFERS]
            tensors |= {strip_wrappers(name): CheckpointTensor(file, name, shard) for name in weights}
        except (SafetensorError, OSError) as error:
            raise FileFormatError(shard, f"not a readable safetensors file ({error}); copy it again") from error
    if missing := sorted(set(weight_map) - stored):
        raise FileFormatError(path, f"the index names {missing[0]!r}, which none of its shards holds; copy them again")
    return {name: tensors[name] for name in parameter_order(tensors)}


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
