"""Rows, interleaved timing, peak memory and the environment. Nothing is timed before its result is verified."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from sources import RESULTS, commit

import ltp_sparse as ls
from ltp_sparse.testing import xlmr_shapes
from ltp_sparse.weights.files import atomic_path, check_writable

EVICTED = 1 << 28  # bytes written between two runs: more than the size of the caches

MODELS = {
    "tiny": xlmr_shapes(layers=2, hidden=128, intermediate=512, vocabulary=5000),
    "encoder": xlmr_shapes(embeddings=False),
    "base": xlmr_shapes(),
    "decoder": {
        f"model.layers.{layer}.{name}.weight": torch.Size(shape)
        for layer in range(12)
        for name, shape in {
            **{f"self_attn.{part}_proj": (1024, 1024) for part in "qkvo"},
            **{f"mlp.{part}_proj": (2816, 1024) for part in ("gate", "up")},
            "mlp.down_proj": (1024, 2816),
        }.items()
    },
}
"""The maskable tensors of a small model (to try a benchmark), of XLM-R-base without and with embeddings, and of the
layers of a decoder with 154 million weights.
"""


class WrongResult(RuntimeError):
    """A provider's result differs from the expected one, so it is not timed."""


@dataclass
class Provider:
    """One implementation to compare.

    Attributes:
        run: runs it once; the result is kept alive until the measurement ends
        verify: raises `WrongResult`
        bytes: memory traffic of one run; None: not modelled
        before: called before every timed run, not timed
        bytes_in_lines: those of `bytes` in whole lines of memory
        memory: bytes of its state
    """

    name: str
    run: Callable[[], object]
    verify: Callable[[], None]
    bytes: int | None = None
    before: Callable[[], object] | None = None
    bytes_in_lines: int | None = None
    memory: int | None = None


@dataclass
class Row:
    """One line of a results file.

    Attributes:
        k: active entries
        p50, p20, p80: percentiles over the rounds, in `unit`
        bytes: memory traffic of one run
        gbps: 1e9 bytes per second at p50
        share_of_copy: gbps divided by that of a plain copy in the same run
        ratio: p50 of the baseline provider in the same run / p50
    """

    op: str
    provider: str
    dtype: str
    n: int
    k: int
    metric: str
    unit: str
    p50: float
    p20: float
    p80: float
    bytes: int | None = None
    gbps: float | None = None
    share_of_copy: float | None = None
    ratio: float | None = None
    device: str = ""
    versions: str = ""
    commit: str = ""
    time: str = ""


def copy_provider(n: int) -> Provider:
    """A plain copy of n float32 entries: the upper bound for code that streams memory."""
    source, target = torch.zeros(n), torch.empty(n)

    def verify() -> None:
        if not torch.equal(target.copy_(source), source):
            raise WrongResult("copy")

    return Provider("copy", lambda: target.copy_(source), verify, 8 * n)


def interleaved(providers: Sequence[Provider], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Provider -> seconds per run. Every round runs each provider once, so that drift of the machine affects all.

    Each starts as after a backward pass: with other data in the caches, and torch's threads awake.
    """
    seconds: dict[str, list[float]] = {provider.name: [] for provider in providers}
    other = torch.zeros(EVICTED // 4)
    for number in range(warmup + rounds):
        shift = number % len(providers)
        for provider in (*providers[shift:], *providers[:shift]):
            if provider.before is not None:
                provider.before()
            other.add_(1)
            start = time.perf_counter()
            result = provider.run()
            elapsed = time.perf_counter() - start
            del result
            if number >= warmup:
                seconds[provider.name].append(elapsed)
    return seconds


def time_rows(
    op: str, providers: Sequence[Provider], *, n: int, k: int, rounds: int, baseline: str, dtype: str = "float32"
) -> list[Row]:
    """Verifies and times all providers and a copy of n float32 entries; one row for each."""
    for provider in providers:
        provider.verify()
    copy = copy_provider(n)
    everyone = [*providers, copy]
    seconds = interleaved(everyone, rounds)
    copy_gbps = 8 * n / statistics.median(seconds["copy"]) / 1e9
    rows = []
    for provider in everyone:
        times = seconds[provider.name]
        p20, p50, p80 = np.percentile(times, [20, 50, 80])
        gbps = provider.bytes / p50 / 1e9 if provider.bytes else None
        rows.append(
            Row(
                op, provider.name, dtype, n, k, "time", "ms", *(1e3 * t for t in (p50, p20, p80)), provider.bytes,
                gbps, gbps / copy_gbps if gbps else None, statistics.median(seconds[baseline]) / p50,
            )
        )  # fmt: skip
        print(f"  {provider.name:<54}{1e3 * p50:>11.3f} ms   {rows[-1].ratio:>7.2f} x", flush=True)
    return rows


def value_row(
    op: str, provider: str, n: int, k: int, metric: str, unit: str, value: float, dtype: str = "float32"
) -> Row:
    """A row with a counted value instead of a time."""
    print(f"  {provider:<54}{value:>11.4f} {unit}", flush=True)
    return Row(op, provider, dtype, n, k, metric, unit, value, value, value)


_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_memory(run: Callable[[], object]) -> int:
    """Peak growth of the resident size of the process during `run`, in bytes (Linux)."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # return freed memory at once: no effect of earlier runs
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the largest value that glibc sets by itself
    return peak - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def instruction_sets() -> list[str]:
    """The instruction sets of the compiled backend that this processor supports, best first."""
    from ltp_sparse import _C

    chosen, runnable = _C.isa(), []
    for name in ("avx512", "avx2", "generic"):
        try:
            _C.set_isa(name)
        except ValueError:
            continue
        runnable.append(name)
    _C.set_isa(chosen)
    return runnable


def with_isa(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` under one instruction set of the compiled backend."""
    from ltp_sparse import _C

    def run_with_isa() -> object:
        _C.set_isa(name)
        return run()

    return run_with_isa


def environment() -> dict[str, str]:
    """The columns device, versions, commit and time."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "device": f"{cpu.partition(':')[2].strip() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"ltp_sparse {ls.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}",
        "commit": commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows; the file keeps its rows of other cells (operation, dtype, entries, active entries)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment()
    cells = [{**asdict(row), **where} for row in rows]
    lines = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in cell.items()} for cell in cells]
    measured, names = {_cell(line) for line in lines}, [field.name for field in fields(Row)]
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            kept = list(reader) if reader.fieldnames == names else []  # lines with other columns are dropped
        lines = [line for line in kept if _cell(line) not in measured] + lines
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    print(f"wrote {path}")


def _cell(line: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(line[key]) for key in ("op", "dtype", "n", "k"))


def argument_parser(
    description: str, csv_name: str, densities: Sequence[float], dtypes: Sequence[str]
) -> argparse.ArgumentParser:
    """The command line of the benchmarks of the operations."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["encoder", "base"], help="sizes to measure")
    parser.add_argument("--densities", nargs="+", type=float, default=densities, help="shares of active entries")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="of the weights")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of every provider")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / csv_name, help="CSV file")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, after setting threads and the compiled backend."""
    args = parser.parse_args()
    check_writable(args.out)
    torch.set_num_threads(args.threads)
    reason = ls.available_backends()["compiled"]
    if reason != "ok":
        sys.exit(f"the benchmarks time the compiled backend: {reason}")
    ls.use_backend("compiled")
    return args
