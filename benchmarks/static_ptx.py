"""What one launch of each kernel executes and touches, counted without a GPU: `python benchmarks/static_ptx.py`.

The PTX of nvcc and Triton runs in the emulated GPU of the tests (`tests/ptx`), on some tiles of random weights. A row
for each case and kernel goes to benchmarks/results/static/ptx.csv, per entry of the parameters:

* `instructions`: 32 for every instruction of a warp, whatever lanes take part; PTX, of which SASS has more.
* `bytes`: 32 for every sector of memory that the launch reads, and for each that it writes; `floor_bytes`: what the
  operation has to move. What other launches leave in caches counts as moved.
* `l1_bytes`: 32 for every sector of every request of a warp; `conflicts`: wavefronts of shared memory over the fewest.

`issue_ms` and `memory_ms` are the times of these instructions and bytes at 277 million entries on an H200, by the
figures of static_cuda.py, `floor_ms` that of the floor. Nothing here was timed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from helpers import emulated_device
from helpers.backends import using
from helpers.bits import DTYPES
from helpers.emulated_gpu import EmulatedGpu, missing
from helpers.update_cases import options_of
from static_cuda import BYTES_PER_MS, ENTRIES, LANES_PER_MS

from ltp_sparse import backends
from ltp_sparse.ops import (
    masked_gather,
    masked_pack_,
    masked_scatter_,
    masked_sum_squares,
    masked_swap_,
    routes,
    sources,
)  # fmt: skip
from ltp_sparse.testing import update_problem
from ltp_sparse.tickets.bits import TILE

RESULTS = Path(__file__).parent / "results" / "static" / "ptx.csv"
UPDATE_TILES, SELECTION_TILES = 3, 8
DENSITIES = {"list16": (0.01, 0.05), "bitmap": (0.2, 0.5), "full": (1.0,)}


def touched(density: float, bytes_each: int) -> float:
    """Bytes of the sectors that hold an active entry, per entry."""
    return bytes_each * (1 - (1 - density) ** (32 // bytes_each))


def index_bytes(encoding: str, density: float) -> float:
    return {"list16": 2 * density, "bitmap": 1 / 8 + 2 / 64, "full": 0}[encoding]


def update_floor(encoding: str, density: float, dtype: str, grad: str, mode: str, packed: bool) -> float:
    """Bytes per entry of an update: parameter and state read and written, gradient and index read."""
    size, grad_size = (DTYPES[name].itemsize for name in (dtype, grad))
    state = density * (4 + 4 * 4 / 256 if "8bit" in mode else 16)
    param = 2 * touched(density, size)
    if "master" in mode:  # which is read in the place of the parameter
        param, state = touched(density, size), state + 8 * density
    gradient = 4 * density if packed else touched(density, grad_size)
    return param + gradient + state + index_bytes(encoding, density)


def _problem(density: float, dtype: str, grad: str, mode: str) -> Any:
    problem = update_problem({"p": (UPDATE_TILES * TILE,)}, density=density, **options_of(dtype, grad, mode))
    problem.table = problem.table.with_ranks()
    return problem


def _update(backend: str, density: float, dtype: str, grad: str, mode: str, packed: bool) -> dict[str, dict[str, int]]:
    problem = _problem(density, dtype, grad, mode)
    if packed:
        problem.grads = torch.ones(problem.table.k)
    with using(backend):
        problem.step()
    return emulated_device.statistics()


def _norm(backend: str, density: float) -> dict[str, dict[str, int]]:
    p = _problem(density, "f32", "f32", "plain")
    with using(backend):
        masked_sum_squares(p.params, p.grads, p.table, p.coefficients)
    return emulated_device.statistics()


def _pack(backend: str, density: float) -> dict[str, dict[str, int]]:
    p = _problem(density, "f32", "f32", "plain")
    with using(backend):
        masked_pack_(p.grads, torch.zeros(p.table.k), p.table)
    return emulated_device.statistics()


def _copy(backend: str, operation: str, density: float, dtype: str) -> dict[str, dict[str, int]]:
    tensors = [torch.ones(UPDATE_TILES * TILE, dtype=DTYPES[dtype])]
    table = update_problem({"p": tuple(tensors[0].shape)}, density=density).table.with_ranks()
    slots = torch.zeros(table.k, dtype=DTYPES[dtype])
    with using(backend):
        if operation == "masked_gather":
            masked_gather(tensors, table, out=slots)
        else:
            {"masked_scatter_": masked_scatter_, "masked_swap_": masked_swap_}[operation](tensors, slots, table)
    return emulated_device.statistics()


def _selection(backend: str, before: str | None, after: str, route: str) -> dict[str, dict[str, int]]:
    """Of the largest fifth of all deltas."""
    n, rng = SELECTION_TILES * TILE, torch.Generator().manual_seed(1)
    start = (torch.randn(n, generator=rng) * 0.02).to(DTYPES[before or "f32"])
    tuned = ((start.float() if before else 0) + torch.randn(n, generator=rng) * 1e-3).to(DTYPES[after])
    with using(backend):
        passes = backends.resolve(torch.device("cpu"))
    routes.select_topk(passes, sources.TensorSource([start] if before else [], [tuned]), [0], [n // 5], route=route)
    return emulated_device.statistics()


def row(backend: str, operation: str, variant: str, kernel: str, s: dict[str, int], entries: int, floor: float | None):
    instructions = 32 * s["warp_instructions"] / entries
    moved = 32 * (s["sectors_read"] + s["sectors_written"]) / entries
    at_scale = ENTRIES / BYTES_PER_MS
    if "prepare" in kernel:
        floor = None  # its records are those of parameters, not of entries
    return {
        "operation": operation,
        "variant": variant,
        "backend": backend,
        "kernel": kernel,
        "launches": s["launches"],
        "blocks": s["blocks"],
        "threads": s["threads"],
        "shared_bytes": s["shared_bytes"],
        "instructions": f"{instructions:.2f}",
        "bytes": f"{moved:.3f}",
        "floor_bytes": "" if floor is None else f"{floor:.3f}",
        "l1_bytes": f"{32 * s['sectors'] / entries:.2f}",
        "sectors_per_request": f"{s['sectors'] / max(1, s['requests']):.1f}",
        "conflicts": f"{s['wavefronts'] / s['fewest_wavefronts']:.2f}" if s["fewest_wavefronts"] else "",
        "issue_ms": f"{instructions * ENTRIES / LANES_PER_MS:.3f}",
        "memory_ms": f"{moved * at_scale:.3f}",
        "floor_ms": "" if floor is None else f"{floor * at_scale:.3f}",
    }


UPDATES = [
    *(("f32", "f32", "plain", False, encoding, d) for encoding, ds in DENSITIES.items() for d in ds),
    ("f32", "f32", "plain", True, "bitmap", 0.2),
    ("f32", "f32", "8bit", False, "bitmap", 0.2),
    ("f32", "f32", "8bit", False, "list16", 0.05),
    ("bf16", "bf16", "stochastic", False, "bitmap", 0.2),
    ("bf16", "bf16", "stochastic", False, "full", 1.0),
    ("bf16", "bf16", "master", False, "bitmap", 0.2),
    ("bf16", "bf16", "8bit-stochastic", False, "bitmap", 0.2),
    ("bf16", "bf16", "8bit-stochastic", False, "full", 1.0),
    ("f16", "f16", "master", False, "full", 1.0),
]
"""(dtype, of gradients, mode, whether these are packed, encoding, density)"""
COPIES = [("f32", "list16", 0.05), ("f32", "bitmap", 0.2), ("f32", "full", 1.0), ("bf16", "bitmap", 0.2)]
SELECTIONS = [("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32"), (None, "f32")]


def rows(gpu: EmulatedGpu, backend: str) -> Iterator[dict[str, Any]]:
    entries = UPDATE_TILES * TILE
    for dtype, grad, mode, packed, encoding, density in UPDATES:
        variant = f"{dtype} {mode}{' packed' if packed else ''} {encoding} {density:.0%}"
        floor = update_floor(encoding, density, dtype, grad, mode, packed)
        for kernel, found in gpu.run(_update, backend, density, dtype, grad, mode, packed).items():
            yield row(backend, "masked_adamw_", variant, kernel, found, entries, floor)
    for encoding, density in (("list16", 0.05), ("bitmap", 0.2), ("full", 1.0)):
        floor, variant = touched(density, 4) + index_bytes(encoding, density), f"f32 {encoding} {density:.0%}"
        for operation, run, more in (("masked_sum_squares", _norm, 0), ("masked_pack_", _pack, 4 * density)):
            for kernel, found in gpu.run(run, backend, density).items():
                yield row(backend, operation, variant, kernel, found, entries, floor + more)
    for dtype, encoding, density in COPIES if backend == "triton" else ():  # the only one with kernels for them
        size = DTYPES[dtype].itemsize
        for operation, passes in (("masked_gather", 1), ("masked_scatter_", 1), ("masked_swap_", 2)):
            floor = passes * (touched(density, size) + size * density) + index_bytes(encoding, density)
            for kernel, found in gpu.run(_copy, backend, operation, density, dtype).items():
                yield row(backend, operation, f"{dtype} {encoding} {density:.0%}", kernel, found, entries, floor)
    for before, after in SELECTIONS:
        pair_bytes = (DTYPES[before].itemsize if before else 0) + DTYPES[after].itemsize
        for route in ("sample", "histogram"):
            floors = {"band_kernel": pair_bytes + 1 / 8}
            if route == "histogram":  # of all entries, not of the sample
                floors["histogram_kernel<"] = pair_bytes
            variant = f"{before or 'scores'} {after} {route}"
            for kernel, found in gpu.run(_selection, backend, before, after, route).items():
                floor = next((floors[part] for part in floors if part in kernel), None)
                yield row(backend, "topk_delta", variant, kernel, found, SELECTION_TILES * TILE, floor)


SHOWN = ("operation", "variant", "backend", "kernel", "launches", "instructions", "bytes", "floor_bytes", "l1_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    if reason := missing(None) or missing("compiled") or missing("triton"):
        sys.exit(f"cannot emulate the kernels: {reason}")
    gpu, table = EmulatedGpu(), []
    print(*SHOWN, sep=" | ")
    for backend in ("compiled", "triton"):
        for found in rows(gpu, backend):
            table.append(found)
            print(*(found[name] for name in SHOWN), sep=" | ", flush=True)
    gpu.close()
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"{output}: {len(table)} rows")


if __name__ == "__main__":
    main()
