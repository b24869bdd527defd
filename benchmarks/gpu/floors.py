"""Measures the memory of this device: a copy, a read, and a plain read-modify-write of scattered entries.

The report compares our kernels with these floors. Scattered entries are those of uniformly random masks: p -= g / 1024
for a list of ascending positions, with the default size of fetches from memory and with 32 bytes, the smallest one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))
import device as devices
import rows
from harness import WrongResult
from step import SECTOR

ENTRIES = {"cuda": 277_414_656, "cpu": 1024}
DENSITIES = (0.2, 0.05, 0.01, 0.5, 0.75)
GRANULARITY = 5  # CU_LIMIT_MAX_L2_FETCH_GRANULARITY
BLOCK = 1024
SCALE = 2.0**-10


@cache
def kernel() -> Any:
    """The Triton kernel.

    Raises:
        ImportError: Triton is not installed.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def scattered(params, grads, positions, count, SCALE: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        position = tl.load(positions + at, mask=there, other=0)
        param = tl.load(params + position, mask=there, other=0).to(tl.float32)
        grad = tl.load(grads + position, mask=there, other=0).to(tl.float32)
        tl.store(params + position, param - SCALE * grad, mask=there)

    return scattered


class Scattered:
    """An in-place update of random entries."""

    def __init__(self, n: int, density: float, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.params, self.grads = (torch.randn(n, generator=generator, device=device).to(dtype) for _ in range(2))
        drawn = torch.rand(n, generator=generator, device=device) < density
        self.positions = drawn.nonzero().view(-1).int()
        self.k = len(self.positions)
        sectors = len((self.positions // (SECTOR // dtype.itemsize)).unique_consecutive())
        self.bytes = 3 * SECTOR * sectors + 4 * self.k

    def run(self) -> None:
        kernel()[-(-self.k // BLOCK),](self.params, self.grads, self.positions, self.k, SCALE=SCALE, BLOCK=BLOCK)

    def check(self) -> None:
        at, before = self.positions.long(), self.params.clone()
        self.run()
        before[at] = (before[at].float() - SCALE * self.grads[at].float()).to(before.dtype)
        if not torch.allclose(self.params.float(), before.float(), rtol=2.0**-7, atol=0):
            raise WrongResult("the scattered entries are not the updated ones")


class Floors:
    def __init__(self, folder: Path, device: devices.Device) -> None:
        self.path, self.device, self.n = folder / rows.FLOORS_CSV, device, ENTRIES[device.type]

    def add(self, name: str, run: Callable[[], Any], moved: int, **more: Any) -> None:
        times = self.device.times([(run, lambda: None)], 12)[0]
        p50 = statistics.median(times)
        rows.append(self.path, rows.FLOORS, {"name": name, "n": self.n, "p50_ms": p50, "bytes": moved, **more})
        print(f"  {name:<12}{' '.join(map(str, more.values())):<36}{p50:>10.4f} ms{moved / p50 / 1e6:>8.0f} GB/s")

    def streams(self) -> None:
        source, target = torch.zeros(self.n, device=self.device.torch), torch.empty(self.n, device=self.device.torch)
        self.add("copy", lambda: target.copy_(source), 8 * self.n)
        self.add("read", lambda: source.sum(), 4 * self.n)

    def scattered(self, fetch: int | None) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for density in DENSITIES:
                entries = Scattered(self.n, density, dtype, self.device.torch)
                entries.check()
                facts = {"dtype": str(dtype).removeprefix("torch."), "density": density, "fetch_bytes": fetch}
                self.add("scattered", entries.run, entries.bytes, k=entries.k, **facts)


def fetch_bytes(wanted: int | None = None) -> int | None:
    """The current limit of bytes per fetch, after requesting another one if given; None: the driver refuses."""
    driver, found = devices.driver(), ctypes.c_size_t()
    if wanted is not None and driver.cuCtxSetLimit(GRANULARITY, ctypes.c_size_t(wanted)):
        return None
    return None if driver.cuCtxGetLimit(ctypes.byref(found), GRANULARITY) else found.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    device = devices.named(args.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    print(f"clocks (MHz): {device.warm()}")
    floors = Floors(args.folder, device)
    floors.streams()
    on_gpu = device.type == "cuda"
    floors.scattered(fetch_bytes() if on_gpu else None)
    if on_gpu and (fetch := fetch_bytes(SECTOR)):
        floors.scattered(fetch)


if __name__ == "__main__":
    main()
