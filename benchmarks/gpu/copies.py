"""Copies of active entries: the cells and the providers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import NamedTuple

import torch
import updates
from device import Device
from harness import Provider, WrongResult
from step import SECTOR, Contestant, ticket_of
from targets import COPY
from torch import Tensor

from ltp_sparse.ops import masked_gather, masked_scatter_, masked_swap_
from ltp_sparse.tickets.tile_table import TileTable

INDEX_SELECT, INDEX_PUT = "index_select", "index_put_"
BASELINE = COPY
OURS = ("masked_gather", "masked_scatter_", "masked_swap_")


class Cell(NamedTuple):
    """A cell of the grid; `kind` is that of the masks."""

    model: str
    density: float
    precision: str
    kind: str = "uniform"
    op: str = "copy"


FIRST = [Cell("base", 0.2, "float32")]
CORE = FIRST + [Cell("base", 0.2, "bfloat16"), Cell("base", 0.05, "float32")]
FULL = CORE + [
    Cell("base", 0.2, "float32", "clustered"),
    *(Cell("base", density, "bfloat16") for density in (0.05, 0.01)),
    Cell("base", 1.0, "float32"),
]
TINY = [Cell("tiny", 0.2, "float32"), Cell("tiny", 0.05, "bfloat16", "clustered")]
GRIDS = {"first": FIRST, "core": CORE, "full": FULL, "tiny": TINY}


class Problem:
    """Tensors, and slots with other values.

    held: [k] where entries are gathered to, and what they are exchanged with
    """

    def __init__(self, cell: Cell, device: Device) -> None:
        ticket, self.device = ticket_of(cell, device.torch), device.torch
        generator, dtype = torch.Generator(self.device).manual_seed(0), getattr(torch, cell.precision)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        self.tensors = [random(*shape) for shape in ticket.shapes.values()]
        sets = list(ticket.sets.values())
        self.table = TileTable.build(sets, device=self.device, ranks=self.device.type != "cpu")
        self.n, self.k, width = ticket.n, ticket.k, dtype.itemsize
        self.slots, self.held = random(self.k), random(self.k)
        self.ticket, self.touched = ticket, SECTOR * updates.touched_lines(ticket, SECTOR // width)
        self.index = sum(part.nbytes for part in (self.table.words, self.table.ranks, self.table.positions))

    @cached_property
    def indices(self) -> list[Tensor]:
        return [index_set.indices().to(self.device, torch.int64) for index_set in self.ticket.sets.values()]

    def parts(self, slots: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every tensor, flat, with the indices of its active entries and its part of the slots."""
        flat = (tensor.view(-1) for tensor in self.tensors)
        return zip(flat, self.indices, slots.split(self.table.counts), strict=True)

    def entries(self) -> Tensor:
        return torch.cat([tensor[where] for tensor, where, _ in self.parts(self.slots)])

    def provider(self, name: str, run: Callable[[], object], check: Callable[[], bool], passes: int = 1) -> Provider:
        """passes: 2 if active entries and slots are both read and written"""

        def verify() -> None:
            if not check():
                raise WrongResult(f"{name}: the entries are not those of the slots")

        moved = passes * (self.touched + self.slots.nbytes) + self.index
        return Provider(name, run, verify, moved, bytes_in_lines=passes * self.touched)

    def gathering(self, name: str, run: Callable[[], object]) -> Provider:
        """Into `held`."""

        def check() -> bool:
            self.held.zero_()
            run()
            return torch.equal(self.held, self.entries())

        return self.provider(name, run, check)

    def scattering(self, name: str, run: Callable[[], object]) -> Provider:
        """From `slots`."""

        def check() -> bool:
            sums = self.frozen_sums()
            for tensor, where, _ in self.parts(self.slots):
                tensor[where] = 0
            run()
            return torch.equal(self.entries(), self.slots) and self.frozen_sums() == sums

        return self.provider(name, run, check)

    def swapping(self, name: str, run: Callable[[], object]) -> Provider:
        """With `held`."""

        def check() -> bool:
            entries, slots, sums = self.entries(), self.held.clone(), self.frozen_sums()
            run()
            return torch.equal(self.held, entries) and torch.equal(self.entries(), slots) and self.frozen_sums() == sums

        return self.provider(name, run, check, passes=2)

    def frozen_sums(self) -> list[int]:
        """Of the bits of all entries that are not active, a number per tensor."""
        kind = torch.int32 if self.slots.dtype == torch.float32 else torch.int16
        return [
            int(tensor.view(kind).sum(dtype=torch.int64) - tensor[where].view(kind).sum(dtype=torch.int64))
            for tensor, where, _ in self.parts(self.slots)
        ]


def ours(problem: Problem, operation: str, backend: str) -> Provider:
    tensors, table, name = problem.tensors, problem.table, name_of(operation, backend)
    if operation == "masked_gather":
        return problem.gathering(name, lambda: masked_gather(tensors, table, out=problem.held))
    if operation == "masked_scatter_":
        return problem.scattering(name, lambda: masked_scatter_(tensors, problem.slots, table))
    return problem.swapping(name, lambda: masked_swap_(tensors, problem.held, table))


def name_of(operation: str, backend: str) -> str:
    return f"{operation} ({backend})"


def index_select(problem: Problem) -> Provider:
    def run() -> None:
        for tensor, where, share in problem.parts(problem.held):
            torch.index_select(tensor, 0, where, out=share)

    return problem.gathering(INDEX_SELECT, run)


def index_put(problem: Problem) -> Provider:
    def run() -> None:
        for tensor, where, share in problem.parts(problem.slots):
            tensor.index_put_((where,), share)

    return problem.scattering(INDEX_PUT, run)


def baseline(problem: Problem) -> Provider:
    copies = [torch.zeros_like(tensor) for tensor in problem.tensors]

    def run() -> None:
        torch._foreach_copy_(copies, problem.tensors)

    def verify() -> None:
        run()
        if not all(map(torch.equal, copies, problem.tensors)):
            raise WrongResult(f"{COPY}: the copies differ")

    return Provider(COPY, run, verify, 2 * sum(tensor.nbytes for tensor in copies))


def contestants(cell: Cell, who: str) -> Iterator[Contestant]:
    eager = ("eager",)
    if who == "peers":
        yield Contestant(COPY, eager, baseline)
        yield Contestant(INDEX_SELECT, eager, index_select)
        yield Contestant(INDEX_PUT, eager, index_put)
    elif who == "triton" or who == "compiled" and not torch.cuda.is_available():  # CUDA has no kernels for them
        for operation in OURS:
            yield Contestant(name_of(operation, who), eager, partial(ours, operation=operation, backend=who))
