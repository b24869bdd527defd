"""Selection from two checkpoints on disk, beside reading both files as fast as they come.

The histogram route reads the weights twice or, where many deltas are equal, as those of bfloat16 weights, four times.
The peers read both files as often: into a buffer of 1 MB, with one thread and with as many as the selection has. The
ratio of the passes to a peer is their share of the sequential rate; the whole of `select` also reads the initial
weights once more, for their digests. Files that were just written stand in the page cache; a --folder on a slower disk
and files larger than the memory measure the disk. The ticket is compared with that of the same weights in memory.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from harness import (
    MODELS,
    Provider,
    Row,
    WrongResult,
    argument_parser,
    parse,
    peak_memory,
    time_rows,
    value_row,
    write_csv,
)
from safetensors.torch import save_file

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.checkpoints import Reader, StreamSource, open_checkpoint
from ltp_sparse.ops import index_sets
from ltp_sparse.testing import random_weights, tuned_weights
from ltp_sparse.topk import Selection, select_topk

OP = "select from checkpoints"
ONE_READER = "reading both files as often, 1 thread"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUFFER = 1 << 20
PASSES_ALONE = "select, the passes alone"
_own = threading.local()  # a buffer per thread of the readers, made once


class Counted:
    """A progress bar that only counts."""

    bytes = 0

    def update(self, count: int) -> None:
        self.bytes += count


def write_checkpoints(folder: Path, model: str, dtype: torch.dtype) -> list[Path]:
    """A model before and after tuning, in a file each."""
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(MODELS[model]).items()}
    paths = [folder / "initial.safetensors", folder / "tuned.safetensors"]
    for path, tensors in zip(paths, (weights, tuned_weights(weights)), strict=True):
        save_file(tensors, path)
    return paths


def read_part(path: Path, start: int, stop: int) -> int:
    """Reads bytes start..stop of a file, and drops them; returns their number."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(bytearray(BUFFER))
    buffer, done = _own.buffer, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while done < stop - start:
            count = file.readinto(buffer[: min(BUFFER, stop - start - done)])
            if not count:
                raise WrongResult(f"{path} ended early")
            done += count
    return done


def read_all(paths: Sequence[Path], times: int, pool: ThreadPoolExecutor, threads: int) -> int:
    """Reads every file so many times, each thread of the pool its part of it; returns the bytes."""
    parts = []
    for path in [*paths] * times:
        size = path.stat().st_size
        ends = [size * i // threads for i in range(threads + 1)]
        parts += [(path, start, stop) for start, stop in zip(ends, ends[1:], strict=False)]
    return sum(pool.map(lambda part: read_part(*part), parts))


def measure(model: str, dtype: str, density: float, rounds: int, folder: Path) -> list[Row]:
    paths = write_checkpoints(folder, model, DTYPES[dtype])
    select = partial(ls.select, *paths, density=density, device="cpu")
    ticket = select()
    sizes = [index_set.n for index_set in ticket.sets.values()]
    n, k = sum(sizes), ticket.k
    print(f"\n{OP}: {n:,} {dtype} entries, {100 * density:g} % selected", flush=True)

    def check_ticket() -> None:
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in random_weights(MODELS[model]).items()}
        if select() != ls.select(weights, tuned_weights(weights), density=density):
            raise WrongResult(f"{OP}: another ticket than from the same weights in memory")

    def passes(progress: Counted | None = None) -> Selection:
        initial, tuned = ([Reader.of(file[name]) for name in ticket.sets] for file in map(open_checkpoint, paths))
        source = StreamSource(initial, tuned, progress=progress)
        return select_topk(backends.resolve(source.device), source, [0] * len(sizes), [k], route="histogram")

    counted = Counted()
    passes(counted)
    times = round(counted.bytes / (2 * n * DTYPES[dtype].itemsize))
    files = sum(path.stat().st_size for path in paths)

    def check_passes() -> None:
        found = [index_set.digest() for index_set in index_sets(passes(), sizes)]
        if found != [index_set.digest() for index_set in ticket.sets.values()]:
            raise WrongResult(f"{PASSES_ALONE}: another ticket than select's")

    def reading(name: str, threads: int) -> Provider:
        read = partial(read_all, paths, times, ThreadPoolExecutor(threads), threads)

        def check() -> None:
            if read() != times * files:
                raise WrongResult(name)

        return Provider(name, read, check, times * files)

    threads = torch.get_num_threads()
    digests = paths[0].stat().st_size
    providers = [
        Provider(PASSES_ALONE, passes, check_passes, times * files),
        Provider("select", select, check_ticket, times * files + digests),
        reading(ONE_READER, 1),
    ]
    if threads > 1:
        providers.append(reading(f"reading both files as often, {threads} threads", threads))
    rows = time_rows(OP, providers, n=n, k=k, dtype=dtype, rounds=rounds, baseline=ONE_READER)
    beside = max(0, peak_memory(select) - ticket.nbytes) / 1e6
    rows.append(value_row(OP, PASSES_ALONE, n, k, "readings", "of both files", times, dtype))
    return [*rows, value_row(OP, "select", n, k, "memory beside the ticket", "MB", beside, dtype)]


def main() -> None:
    parser = argument_parser(__doc__, "streaming.csv", [0.2], dtypes=tuple(DTYPES))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written, and deleted again")
    args = parse(parser)
    rows: list[Row] = []
    for model in args.models:
        for dtype in args.dtypes:
            for density in args.densities:
                with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                    rows += measure(model, dtype, density, args.rounds, Path(folder))
                write_csv(args.out, rows)


if __name__ == "__main__":
    main()
