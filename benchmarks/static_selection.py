"""What a selection launches, counted without a GPU: `python benchmarks/static_selection.py`.

The CUDA kernels' thread blocks run on the CPU (`tests/backends/cuda_emulation.cpp`) under the launch code of a GPU, for
147 tensors as XLM-R-base has, a thousandth of their size. Counted are

* launches: of own kernels
* torch_kernels: operators of torch that compute, from the first launch to the last; those before it fill zeros or work
  on the host
* waits: readings of device tensors by the host

for the route of the kernels, and for that of torch over the same passes, which Triton and fallbacks take; those of
version 0.1 stay in the table to compare with.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pybind11
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltp_sparse import backends
from ltp_sparse.backends import cuda
from ltp_sparse.ops import routes, samples
from ltp_sparse.ops.sources import TensorSource

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "static" / "selection.csv"
# without forced inlining, which makes every variant of a kernel long to compile
FLAGS = ["-std=c++17", "-Og", "-DLTP_HD=inline", "-Wall", "-Wextra", "-Werror", "-Wno-attributes", "-ffp-contract=off"]
# what a GPU refuses ends the process
FLAGS += ["-fsanitize=alignment,shift", "-fsanitize-undefined-trap-on-error", "-shared", "-fPIC"]

READS = ("tolist", "item", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
FREE = ("empty", "view", "as_strided", "unbind", "slice", "select", "split", "detach", "alias", "t.", "_to_copy")
"""Operators of torch that launch nothing, or that copy from the host."""

SIZES = [192_000, 394, *[590, 590, 590, 590, 2359, 2359, 1, 1, 1, 1, 1, 2] * 12, 1]
"""Thousands of entries of 147 tensors, as entries: 277,414 in all."""


def build(folder: Path) -> Path:
    """Compiles the emulation."""
    path, source = folder / "emulation.so", ROOT / "tests" / "backends" / "cuda_emulation.cpp"
    headers = pybind11.get_include(), sysconfig.get_paths()["include"]
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{header}" for header in headers)]
    subprocess.run(["c++", *FLAGS, *includes, "-o", str(path), str(source)], check=True)
    return path


def load(path: Path) -> tuple[Any, ctypes.CDLL]:
    """The module `_C_cuda` of the emulation, and its counters."""
    counters = ctypes.CDLL(str(path))
    for name in ("take_traps", "launches_so_far", "blocks_beyond_their_bins"):
        getattr(counters, name).restype = ctypes.c_int64
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, counters


@contextmanager
def emulated(module: Any) -> Iterator[backends.Backend]:
    """The backend `compiled` of CUDA tensors, for those of the CPU."""
    stream = SimpleNamespace(cuda_stream=0)
    with (
        mock.patch.object(cuda, "extension", lambda: module),
        mock.patch("torch.cuda.current_stream", lambda _: stream),
    ):
        yield backends.Backend(cuda)


class Counted(TorchDispatchMode):
    """A context that counts launches, the operators of torch before and after the first one, and readings."""

    def __init__(self, counters: ctypes.CDLL) -> None:
        super().__init__()
        self.counters, self.first = counters, counters.launches_so_far()
        self.before: Counter[str] = Counter()
        self.between: Counter[str] = Counter()
        self.reads: list[str] = []
        self.patches = [mock.patch.object(Tensor, name, self.reading(name)) for name in READS]

    def reading(self, name: str) -> Any:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any) -> Any:
            self.reads.append(name)
            return original(tensor, *args)

        return read

    @property
    def launches(self) -> int:
        return self.counters.launches_so_far() - self.first

    def __enter__(self) -> Counted:
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if not name.startswith(FREE):
            (self.between if self.launches else self.before)[name] += 1
        return func(*args, **(kwargs or {}))


def rows(module: Any, counters: ctypes.CDLL) -> list[dict[str, object]]:
    generator, found = torch.Generator().manual_seed(0), []
    tuned = [torch.randn(n, generator=generator) for n in SIZES]
    for budgets in (1, len(tuned)):
        groups = [number % budgets for number in range(len(tuned))]
        pools = [sum(n for n, own in zip(SIZES, groups, strict=True) if own == group) for group in range(budgets)]
        ks = [pool // 5 for pool in pools]
        for route, decides in (("kernels", True), ("torch, sampled", False), ("torch, histogram", False)):
            with emulated(module) as passes, mock.patch.object(samples, "SAMPLES", 4000):
                if not decides:
                    passes.decides = lambda groups: False
                source = TensorSource([], tuned)
                for _ in range(2):  # tables of the pairs are there, the second time
                    with Counted(counters) as counted:
                        by = "histogram" if route.endswith("histogram") else "sample"
                        routes.select_topk(passes, source, groups, ks, route=by)
            found.append(
                {
                    "version": "",
                    "route": route,
                    "budgets": budgets,
                    "launches": counted.launches,
                    "torch_kernels": sum(counted.between.values()),
                    "waits": len(counted.reads),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    with RESULTS.open() as file:
        table: list[dict[str, object]] = [row for row in csv.DictReader(file) if row["version"]]
    with tempfile.TemporaryDirectory() as folder:
        table += rows(*load(build(Path(folder))))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(*(f"{value!s:>18}" for value in row.values()))


if __name__ == "__main__":
    main()
