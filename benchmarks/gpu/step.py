"""One optimizer step: the cells and the providers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import clustered
import torch
import updates
from device import Device
from harness import Provider, WrongResult
from torch import nn
from updates import FOREACH, FUSED, GATHERED, MULTIPLIED, OPTIONS, PACKAGES

import ltp_sparse as ls
from ltp_sparse.testing import xlmr_shapes

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 1, "hidden": 32, "intermediate": 64, "vocabulary": 200, "positions": 20},
    "encoder": {"embeddings": False},  # 85M
    "base": {},  # 277M
    "large": {"layers": 24, "hidden": 1024, "intermediate": 4096},  # 559M
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"rounding": "stochastic"},
    "bfloat16-8bit": {"rounding": "stochastic", "states": "8bit"},
    "float16": {"master": True},
}
SECTOR = 32  # bytes; the smallest unit of memory traffic of a GPU
CHECKED = 12  # of the smallest parameters, and two matrices, are compared with the reference bit by bit


class Cell(NamedTuple):
    """A cell of the grid; `kind` is that of the masks."""

    model: str
    density: float
    precision: str
    kind: str = "uniform"
    op: str = "step"


FIRST = [Cell("base", 0.2, precision) for precision in ("float32", "bfloat16", "bfloat16-8bit")]
CORE = FIRST + [Cell("base", density, "float32") for density in (0.05, 0.01, 0.5, 0.75, 0.0005)]
FULL = CORE + [
    *(Cell("base", 0.2, precision, "clustered") for precision in ("float32", "bfloat16")),
    Cell("base", 0.2, "float16"),
    *(Cell("base", density, precision) for density in (0.05, 0.01) for precision in ("bfloat16", "bfloat16-8bit")),
    Cell("base", 0.05, "float32", "clustered"),
    Cell("base", 1.0, "float32"),
    Cell("large", 0.2, "float32"),
    Cell("encoder", 0.2, "float32"),
]
TINY = [
    *(Cell("tiny", 0.2, precision) for precision in ("float32", "bfloat16")),
    Cell("tiny", 0.2, "bfloat16-8bit", "clustered"),
    Cell("tiny", 1.0, "float16"),
]
GRIDS = {"first": FIRST, "core": CORE, "full": FULL, "tiny": TINY}
BASELINE = FUSED


class Contestant(NamedTuple):
    """A provider by name.

    Attributes:
        modes: as in `rows.MEASURED`
        rounds: timed runs
    """

    name: str
    modes: tuple[str, ...]
    make: Callable[[Problem], Provider]
    rounds: int = 12


def ticket_of(cell: Cell, device: torch.device) -> ls.Ticket:
    """The ticket, from a temporary file that all processes of the suite share."""
    shapes = xlmr_shapes(**MODELS[cell.model])
    if cell.density == 1:
        return ls.Ticket.full(shapes)
    path = Path(tempfile.gettempdir(), f"ticket-{cell.model}-{cell.density:g}-{cell.kind}.safetensors")
    if not path.exists():
        make = partial(clustered.ticket, device=device) if cell.kind == "clustered" else ls.Ticket.random
        make(shapes, density=cell.density).save(path)
    return ls.Ticket.load(path)


class Problem(updates.Problem):
    def __init__(self, cell: Cell, device: Device) -> None:
        self.precision = cell.precision
        dtype, ticket = getattr(torch, cell.precision.partition("-")[0]), ticket_of(cell, device.torch)
        generator = torch.Generator(device.torch).manual_seed(0)

        def random(scale: float) -> dict[str, torch.Tensor]:
            return {
                name: torch.randn(shape, generator=generator, device=device.torch).mul_(scale).to(dtype)
                for name, shape in ticket.shapes.items()
            }

        # float16: as under a loss scale, without which torch's moments in float16 vanish
        super().__init__(ticket, random(0.02), random(1.0 if dtype == torch.float16 else 1e-3), SECTOR)
        self.spare: dict[str, torch.Tensor] = {}

    @cached_property
    def dense(self) -> updates.Dense:
        return updates.Dense(self)

    def move_grads(self) -> None:
        """Moves the gradients to other addresses."""
        spare, self.spare = self.spare or self.copied_grads(), self.grads
        self.use_grads(spare)

    def optimizer(self, **options: Any) -> ls.MaskedAdamW:
        return ls.MaskedAdamW(self.params, self.ticket, **OPTIONS, **PRECISIONS[self.precision], **options)

    def check_bits(self, backend: str) -> None:
        """Compares two steps with the reference on a few parameters.

        Raises:
            WrongResult: a bit differs.
        """
        sizes = {name: param.numel() for name, param in self.params.items()}
        rising = sorted(sizes, key=sizes.__getitem__)
        names = rising[:CHECKED] + [name for name in rising[CHECKED:] if self.params[name].dim() == 2][:2]
        outcomes = []
        for used, device in ((backend, self.device), ("reference", torch.device("cpu"))):
            params = {name: nn.Parameter(self.initial[name].to(device, copy=True)) for name in names}
            for name, param in params.items():
                param.grad = self.grads[name].to(device)
            ls.use_backend(used)
            precision = PRECISIONS[self.precision]
            optimizer = ls.MaskedAdamW(params, self.ticket.restrict(names), **OPTIONS, **precision)
            optimizer.step()
            optimizer.step()
            outcomes.append([param.detach().cpu() for param in params.values()])
        ls.use_backend(backend)
        if wrong := [name for name, *both in zip(names, *outcomes, strict=True) if not torch.equal(*both)]:
            raise WrongResult(f"{backend}: {', '.join(wrong)} differ from the reference")


def ours(problem: Problem, backend: str) -> Provider:
    problem.check_bits(backend)
    return updates.masked(problem, name_of(backend), problem.optimizer())


def name_of(backend: str) -> str:
    return f"MaskedAdamW ({backend})"


def baseline(problem: Problem) -> Provider:
    return problem.dense.fused()


def installed(package: str) -> bool:
    """Whether the package is installed; the first word of a name in `PACKAGES` is that of its module."""
    return importlib.util.find_spec(package.split()[0]) is not None


def contestants(cell: Cell, who: str) -> Iterator[Contestant]:
    both = ("graph", "eager")
    if who in ("triton", "compiled"):
        yield Contestant(name_of(who), (*both, "fresh"), partial(ours, backend=who))
    elif who == "peers":
        yield Contestant(FUSED, both, baseline)
        yield Contestant(MULTIPLIED, both, lambda problem: problem.dense.multiplied())
        yield Contestant(GATHERED, both, updates.gathered)
        yield Contestant(FOREACH, ("eager",), lambda problem: problem.dense.provider(FOREACH, None, foreach=True))
        for name in filter(installed, PACKAGES):
            yield Contestant(name, ("eager",), partial(updates.package, name=name))
