"""What a selection reads: versions of a model in memory or on disk, and scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Size, Tensor, nn

from ltp_sparse import backends
from ltp_sparse.checkpoints import CheckpointTensor, Readable, Reader, open_checkpoint
from ltp_sparse.names import canonical_tensors, closest, digest

Weights = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A version of a model: a module, name -> tensor, or a safetensors checkpoint (file or folder)."""

ScoreFunction = Callable[[str, int, int], Tensor]
"""(name, start, stop) -> the scores of entries start..stop of a parameter's row-major order."""

Score = Mapping[str, Tensor] | ScoreFunction


def open_weights(weights: Weights) -> Mapping[str, Readable]:
    """Canonical name -> tensor, in canonical order."""
    return open_checkpoint(weights) if isinstance(weights, str | os.PathLike) else canonical_tensors(weights)


def common_names(base: Mapping[str, Readable], scored: Mapping[str, Readable]) -> list[str]:
    """The names in both; an error if there are none."""
    common = [name for name in base if name in scored]
    if not common:
        name = next(iter(scored), "")
        raise ValueError(f"select: the models share no parameter; {name!r} is closest to {closest(name, base)}")
    return common


def device_of(tensors: Mapping[str, Readable]) -> torch.device:
    """Where the tensors in memory are; the CPU if there are none."""
    return next((t.device for t in tensors.values() if isinstance(t, Tensor)), torch.device("cpu"))


def score_reader(score: ScoreFunction, name: str, n: int, device: torch.device) -> Reader:
    """A reader of a score function, whose results are checked."""

    def read(start: int, stop: int) -> Tensor:
        piece = score(name, start, stop)
        if not isinstance(piece, Tensor) or piece.dtype not in backends.DTYPES or piece.numel() != stop - start:
            got = f"{piece.dtype} {list(piece.shape)}" if isinstance(piece, Tensor) else type(piece).__name__
            raise ValueError(
                f"select: score({name!r}, {start}, {stop}) must give a float32, bfloat16 or float16 tensor of "
                f"{stop - start} entries, got {got}"
            )
        return piece.detach().reshape(-1).contiguous().to(device)

    return Reader(n, read, device)


def fingerprint(tensors: Mapping[str, Readable]) -> dict[str, str]:
    """`names.fingerprint` of tensors in memory or on disk. Hashes on all threads of torch."""

    def of(tensor: Readable) -> str:
        pieces = tensor.pieces() if isinstance(tensor, CheckpointTensor) else [tensor]
        return digest(tensor.dtype, tensor.shape, pieces)

    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        return dict(zip(tensors, executor.map(of, tensors.values()), strict=True))


def check_shape(name: str, initial: Sequence[int], other: Sequence[int]) -> None:
    if Size(initial) != Size(other):
        raise ValueError(
            f"select: {name!r} has shape {list(initial)} in the initial model and {list(other)} in the other; "
            "they must be versions of one model"
        )
