"""Backends and instruction sets of this machine, and contexts that choose one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.backends.arguments import RECORDS, Tensors, fields_of


def _params(names: tuple[str, ...]) -> list:
    reasons = {name: backends.unavailable_reason(name, torch.device("cpu")) for name in names}
    return [pytest.param(n, marks=pytest.mark.skipif(r is not None, reason=f"{n}: {r}")) for n, r in reasons.items()]


BACKENDS = _params(("reference", "compiled"))
ALL_BACKENDS = _params(backends.NAMES)
"""Also Triton, whose interpreter is slow: for small inputs only."""
SLOW_ON_TRITON = [
    pytest.param(*param.values, marks=[*param.marks, *[pytest.mark.slow] * (param.values == ("triton",))])
    for param in ALL_BACKENDS
]


@contextmanager
def using(backend: str | None) -> Iterator[None]:
    ls.use_backend(backend)
    try:
        yield
    finally:
        ls.use_backend(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Unpacked:
    """The functions of a backend, with the fields of their records as arguments."""

    def __init__(self, functions) -> None:
        self.functions = functions

    def __getattr__(self, op: str):
        def call(*arguments, **more):
            fields = fields_of(RECORDS[op])
            given = dict(zip(fields, arguments, strict=False)) | more
            lists = {name: Tensors(given[name]) for name, field in fields.items() if field.kind is Tensors}
            return getattr(self.functions, op)(RECORDS[op](**given | lists))

        return call


def instruction_sets(module) -> list[str]:
    """The instruction sets that this processor supports."""
    found = []
    for name in ("generic", "avx2", "avx512"):
        try:
            module.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    return found
