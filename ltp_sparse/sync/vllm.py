"""Sparse patches for vLLM, which applies them to tensors by their names in the checkpoint while it serves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.sync.version import Change, Version

_MOST = 2**31  # entries of a tensor that int32 can count


@dataclass
class SparseWeightPatch:
    """New values of some entries of a checkpoint's tensor, with the fields of vLLM's class of this name.

    Attributes:
        name: the name of the tensor in the checkpoint.
        indices: int32 [c], flat row-major positions, ascending.
        values: [c], in the tensor's dtype.
        full_shape: the shape of the whole tensor.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def vllm_patches(source: Version | SparseDelta) -> Iterator[SparseWeightPatch]:
    """The patches of a version, or of a delta, for vLLM's `sparse_nccl` and `sparse_disk` weight transfer.

    engine.send_weights(ls.sync.vllm_patches(publisher.publish(step)))

    vLLM reads the fields by name, like those of its own class. Patches of a version have its changes from the version
    before; those of a delta have all of its values. For a sharded model they are those of this process.

    Args:
        source: the result of `publish` or `follow`, or a delta.

    Yields:
        One patch per tensor.

    Raises:
        ValueError: a tensor has more than 2^31 entries, which int32 cannot number, or a value is NaN, with which vLLM
            marks unchanged entries. Nothing has been yielded then.
    """
    changes = list(source.changes() if isinstance(source, Version) else _of_delta(source))
    for change in changes:
        if change.shape.numel() > _MOST:
            raise ValueError(
                f"vllm_patches: {change.name!r} has {change.shape.numel():,} entries; vLLM numbers at most {_MOST:,} "
                "with int32. Send this tensor whole"
            )
        if bool(change.values.isnan().any()):
            raise ValueError(
                f"vllm_patches: {change.name!r} has a NaN among its new values; vLLM would leave such an entry as it is"
            )
    for change in changes:
        yield SparseWeightPatch(change.name, change.indices.to(torch.int32), change.values, tuple(change.shape))


def _of_delta(delta: SparseDelta) -> Iterator[Change]:
    for name in delta.ticket.active_names:
        yield Change(name, delta.ticket.indices(name), delta.values[name], delta.ticket.shapes[name])
    for name, tensor in delta.dense.items():
        yield Change(
            name, torch.arange(tensor.numel(), dtype=torch.int64, device="cpu"), tensor.reshape(-1), tensor.shape
        )


def write_vllm_patches(
    source: Version | SparseDelta | Iterable[SparseWeightPatch], folder: str | os.PathLike[str], version: int
) -> None:
    """Writes the file of a version for vLLM's `sparse_disk` backend, with vLLM's own writer.

    Args:
        source: a version, a delta, or patches, with the changes from `version - 1` to `version`.
        folder: the `patch_dir` of the backend.
        version: the number of the version.

    Raises:
        ImportError: this vLLM has no `sparse_disk` backend, or vLLM is not installed.
    """
    try:
        from vllm.distributed.weight_transfer.sparse_disk_engine import save_sparse_patches
    except ImportError as error:
        raise ImportError(
            "write_vllm_patches needs a vLLM with the sparse_disk backend, whose writer defines the files' format; "
            "followers do not need vLLM"
        ) from error
    patches = vllm_patches(source) if isinstance(source, Version | SparseDelta) else source
    save_sparse_patches(patches=list(patches), patch_dir=os.fspath(folder), version=version)
