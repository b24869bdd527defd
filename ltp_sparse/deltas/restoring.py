"""Changes of several tensors, all or none: after an interruption the tensors have their previous values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ltp_sparse.tickets.index_set import IndexSet


class Held(NamedTuple):
    """Previous values of a tensor: [k] values of entries in slot order, or the whole tensor if indices is None."""

    tensor: Tensor
    indices: IndexSet | None
    values: Tensor


@contextmanager
def restoring(before: Iterable[Held], *lists: list) -> Iterator[None]:
    """Restores tensors and lists if the body raises, also on an interrupt.

    Args:
        before: the values that the body overwrites.
        lists: Python lists that it also changes.
    """
    held, contents = list(before), [list(each) for each in lists]
    try:
        yield
    except BaseException:
        put_back(held)
        for each, content in zip(lists, contents, strict=True):
            each[:] = content
        raise


def put_back(before: Iterable[Held]) -> None:
    """Writes the previous values back. An interrupt is raised at the end; a failing write is tried twice.

    Raises:
        RuntimeError: a tensor could not be written.
    """
    interrupt: KeyboardInterrupt | None = None
    failed: Exception | None = None
    for held in before:
        tries = 0
        while True:
            try:
                write(held)
                break
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception as error:
                tries += 1
                if tries == 2:
                    failed = error
                    break
    if failed is not None:
        raise RuntimeError("a tensor could not be restored: load the model again") from failed
    if interrupt is not None:
        raise interrupt


@torch.no_grad()
def write(held: Held) -> None:
    """Writes the values into the tensor."""
    tensor, indices, values = held.tensor.detach(), held.indices, held.values
    if indices is None:
        tensor.copy_(values)
    else:
        scatter_(tensor, indices, values)


def scatter_(tensor: Tensor, index_set: IndexSet, packed: Tensor) -> None:
    """Writes [k] values to the active entries of a tensor, in place."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    packed = packed.to(flat.device)
    for slot, indices in index_set.to(flat.device).chunks():
        flat[indices] = packed[slot : slot + indices.numel()]
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
