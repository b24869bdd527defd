"""What the host does in a step, without a GPU: `python benchmarks/static_step.py`.

A step of `MaskedAdamW` over 147 tensors, as many as XLM-R-base has, whose launches do nothing: all that is left is
Python, checks and the reading of addresses. A row of benchmarks/results/static/step.csv has

* launches: of a step
* host_us: the shortest of many steps, in microseconds; calls: of Python functions
* fresh: whether gradients are at other addresses in every step, as after `zero_grad()`; packed ones are in one place

for the backend of GPUs, whose launches return before the work is done, and for that of CPUs, whose work is left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse.backends import choice, compiled, cuda, reference
from ltp_sparse.testing import xlmr_shapes

RESULTS = Path(__file__).parent / "results" / "static" / "step.csv"
STEPS = 300
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, clipped": (torch.float32, {"max_grad_norm": 1.0}),
    "float32, packed gradients": (torch.float32, {"gradients": "packed"}),
    "bfloat16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16, 8-bit states": (torch.bfloat16, {"rounding": "stochastic", "states": "8bit"}),
}


class Idle:
    """A compiled module whose kernels are counted but not run. Only `describe`, which reads no data, still works."""

    def __init__(self, module: Any) -> None:
        self.module, self.launches = module, 0

    def describe(self, *arguments: Any) -> Any:
        return self.module.describe(*arguments)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches += 1

        return launch


@contextmanager
def idle(device: str) -> Iterator[Idle]:
    """The backend `compiled` for this kind of device serves CPU tensors, and does nothing."""
    module = Idle(compiled.extension())
    own = {"cpu": compiled, "cuda": cuda}[device]
    stream = SimpleNamespace(cuda_stream=0)
    with (
        mock.patch.object(own, "extension", lambda: module),
        mock.patch.object(own, "probe", lambda device: None),
        mock.patch.object(choice, "_module", lambda name, device: {"compiled": own, "reference": reference}[name]),
        mock.patch.object(torch.cuda, "current_stream", lambda device: stream),
    ):
        choice._backend.cache_clear()
        ls.use_backend("compiled")
        yield module
    ls.use_backend(None)
    choice._backend.cache_clear()


def model_of(dtype: torch.dtype) -> nn.ParameterList:
    """The tensors of XLM-R-base, at most 16 entries wide."""
    shapes = [[min(size, 16) for size in shape] for shape in xlmr_shapes().values()]
    return nn.ParameterList(nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes)


def row(device: str, name: str, fresh: bool) -> dict[str, object]:
    dtype, options = OPTIONS[name]
    model, calls = model_of(dtype), 0
    optimizer = ls.MaskedAdamW(model, ls.Ticket.random(model, density=0.3), **options)
    # both places are taken at once, so that every step can find the gradients elsewhere
    places = [[torch.ones_like(param) for param in model] for _ in range(2)]

    def give_gradients(number: int) -> None:
        for launch in optimizer._launches:
            if launch.packed is not None:  # as backward leaves them
                for position in range(len(model)):
                    launch.packed.show(position)
                return
        for param, grad in zip(model, places[number % 2 if fresh else 0], strict=True):
            param.grad = grad

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    with idle(device) as module:
        shortest = float("inf")
        for number in range(STEPS):
            give_gradients(number)
            module.launches = 0
            begin = time.perf_counter()
            optimizer.step()
            shortest = min(shortest, time.perf_counter() - begin)
        launches = module.launches
        give_gradients(STEPS)
        sys.setprofile(count)
        optimizer.step()
        sys.setprofile(None)
    optimizer.remove()
    return {
        "device": device, "options": name, "fresh": fresh, "tensors": len(model), "launches": launches,
        "host_us": f"{1e6 * shortest:.0f}", "calls": calls,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    table = [
        row(device, name, fresh)
        for device in ("cuda", "cpu")
        for name, (_, options) in OPTIONS.items()
        for fresh in (False, True)
        if not (fresh and "gradients" in options)
    ]
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for found in table:
        print(*(f"{value!s:>26}" for value in found.values()))
    print(f"{output}: {len(table)} rows")


if __name__ == "__main__":
    main()
