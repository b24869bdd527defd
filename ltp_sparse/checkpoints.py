"""Checkpoints on disk as sources of a selection: read row block by row block, never whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from ltp_sparse.names import parameter_order, strip_wrappers
from ltp_sparse.topk import Chunk, Layout, flat_piece, piecewise

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BUFFERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}  # position ids and the like: no weights
_INDEX = "model.safetensors.index.json"
_PIECE = 1 << 19  # entries read at a time: 2 MB of each float32 checkpoint


class CheckpointTensor:
    """One tensor of a safetensors file; its rows are read when asked for."""

    def __init__(self, file: Any, name: str, path: Path) -> None:
        self._slice = file.get_slice(name)
        self.shape = Size(self._slice.get_shape())
        code = self._slice.get_dtype()
        if code not in _DTYPES:
            raise ValueError(f"{path}: {name!r} is stored as {code}; expected one of {', '.join(_DTYPES)}")
        self.dtype = _DTYPES[code]

    def numel(self) -> int:
        return self.shape.numel()

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the row-major order."""
        if len(self.shape) == 0:
            return self._slice[...].reshape(1)
        row = self.shape[1:].numel()
        first = start // row
        rows = self._slice[first : -(-stop // row)].reshape(-1)
        return rows[start - first * row : stop - first * row]

    def pieces(self) -> Iterator[Tensor]:
        """The tensor in row-major order, some rows at a time."""
        for start in range(0, self.numel(), _PIECE):
            yield self.piece(start, min(start + _PIECE, self.numel()))


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
            raise ValueError(f"{path / _INDEX}: not an index of shards ({error!r})") from error
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
            file = safe_open(shard, framework="pt")
            stored |= set(file.keys())
            weights = [name for name in file.keys() if file.get_slice(name).get_dtype() not in _BUFFERS]  # noqa: SIM118
            tensors |= {strip_wrappers(name): CheckpointTensor(file, name, shard) for name in weights}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{shard}: not a readable safetensors file ({error})") from error
    if missing := sorted(set(weight_map) - stored):
        raise ValueError(f"{path}: the index names {missing[0]!r}, which none of its shards holds; copy them again")
    return {name: tensors[name] for name in parameter_order(tensors)}


Readable = Tensor | CheckpointTensor


def read_piece(tensor: Readable, start: int, stop: int) -> Tensor:
    return tensor.piece(start, stop) if isinstance(tensor, CheckpointTensor) else flat_piece(tensor, start, stop).cpu()


class StreamSource:
    """Pairs of tensors of which at least one lies on disk. `progress` is told the bytes that were read."""

    def __init__(self, initial: Mapping[str, Readable], tuned: Mapping[str, Readable], progress: Any = None) -> None:
        self.initial, self.tuned = list(initial.values()), list(tuned.values())
        self.sizes = [t.numel() for t in self.tuned]
        self.device = torch.device("cpu")
        self.layout = Layout(self.sizes)
        self.progress = progress

    @property
    def nbytes(self) -> int:
        """Bytes of one pass."""
        return sum(t.numel() * t.dtype.itemsize for side in (self.initial, self.tuned) for t in side)

    def chunks(self, tensors: Sequence[int]) -> Iterator[Chunk]:
        for tensor in tensors:
            pieces = piecewise(
                self.layout,
                tensor,
                _PIECE,
                partial(read_piece, self.initial[tensor]) if self.initial else None,
                partial(read_piece, self.tuned[tensor]),
            )
            for chunk in pieces:
                yield chunk
                if self.progress is not None:
                    self.progress.update(sum(t.nbytes for t in (*chunk.initial, *chunk.tuned)))

    def sample(self, tensor: int, indices: Tensor) -> Tensor:
        raise RuntimeError("checkpoints are selected by the histogram route: single entries are not read from disk")
