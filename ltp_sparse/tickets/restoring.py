"""Changes of several tensors, all or none: whatever interrupts them, the tensors are as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ltp_sparse.tickets.index_set import IndexSet


class Held(NamedTuple):
    """What a tensor held: values [k] of these entries in slot order, or with indices None the whole tensor."""

    tensor: Tensor
    indices: IndexSet | None
    values: Tensor


@contextmanager
def restoring(before: Iterable[Held], *lists: list) -> Iterator[None]:
    """Puts tensors and lists back as they were if the body raises, an interrupt included.

    Args:
        before: what the body is going to overwrite
        lists: Python lists that it changes, too
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
    """Writes what tensors held. An interrupt comes through when all is done, an error after one more try of each.

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
        raise RuntimeError("a tensor could not be put back: load the model again") from failed
    if interrupt is not None:
        raise interrupt


@torch.no_grad()
def write(held: Held) -> None:
    """Writes the values to their place."""
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
