"""Changes of several tensors that happen completely or not at all: an interruption restores the previous values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ltp_sparse.deltas.entries import Entries
from ltp_sparse.weights.tensors import bits

Write = Callable[[], object]
"""Writes values into the model. To undo a change, it must also work after an interruption in the middle of it."""


class Exchange:
    """Replaces active entries by new values, in one pass over the tensors.

    Args:
        entries: the active entries.
        tensors: name -> tensor; `run` changes it in place.
        values: name -> [k] new values.

    Attributes:
        displaced: [entries.table.k], after `run` the previous values.
    """

    def __init__(self, entries: Entries, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self.entries, self._tensors, self._values = entries, tensors, values
        self.displaced = entries.join(values)
        self._done = False

    def run(self) -> None:
        """Writes the new values, and keeps the previous ones."""
        self.entries.swap_(self._tensors, self.displaced)
        self._done = True

    def put_back(self) -> None:
        """Writes the previous values back, also after a `run` that was interrupted."""
        if not self._done:
            # A swap stores the old value of an entry in its slot before it changes the entry. So a slot without the new
            # value has the old one. If a slot has the new value, either the entry is unchanged or both are equal.
            new, now, slots = self.entries.join(self._values), self.entries.gather(self._tensors), bits(self.displaced)
            self.displaced = torch.where(slots == bits(new), bits(now), slots).view(now.dtype)
            self._done = True
        self.entries.scatter_(self._tensors, self.displaced)


def copies(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Write]:
    """The writes of whole tensors, by name."""
    return [partial(tensors[name].detach().copy_, held) for name, held in values.items()]


@contextmanager
def restoring(undo: Iterable[Write], *lists: list) -> Iterator[None]:
    """Restores tensors and lists if the body raises an exception, KeyboardInterrupt included.

    Args:
        undo: writes the previous values of the tensors that the body changes.
        lists: Python lists that the body changes.
    """
    undo, contents = list(undo), [list(each) for each in lists]
    try:
        yield
    except BaseException:
        put_back(undo)
        for each, content in zip(lists, contents, strict=True):
            each[:] = content
        raise


@torch.no_grad()
def put_back(writes: Iterable[Write]) -> None:
    """Writes previous values back. A failing write is tried twice; an interrupt is raised at the end.

    Raises:
        RuntimeError: a tensor could not be written.
    """
    interrupt: KeyboardInterrupt | None = None
    failed: Exception | None = None
    for write in writes:
        tries = 0
        while True:
            try:
                write()
                break
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception as error:
                tries += 1
                if tries == 2:
                    failed = error
                    break
    if failed is not None:
        raise RuntimeError("a tensor could not be restored; load the model again") from failed
    if interrupt is not None:
        raise interrupt
