"""Selection from two checkpoints on disk, beside plain reads of both files.

Selection takes samples from some lines of the files and then reads the weights once, or more often if many deltas are
equal, as with bfloat16 weights. The peers read both files once into a buffer of 1 MB, with one thread and with the
threads of the selection. The ratio of the band pass (the read of the weights) to a peer is its share of the sequential
rate. `select` as a whole reads no more: it takes digests in the same pass. Files that were just written are in the page
cache; a --folder on a slower disk and files larger than the memory measure the disk. The ticket is compared with that
of the same weights in memory.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
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
from ltp_sparse.backends.arguments import Band, Tensors
from ltp_sparse.ops import index_sets
from ltp_sparse.ops.routes import Selection, room_for, sampled_bracket, select_topk
from ltp_sparse.ops.sources import Reader, StreamSource
from ltp_sparse.testing import random_weights, tuned_weights
from ltp_sparse.weights.checkpoints import open_checkpoint

OP = "select from checkpoints"
ONE_READER = "reading both files once, 1 thread"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUFFER = 1 << 20
PASSES_ALONE = "select, the passes alone"
BAND = "select, the band pass"
_own = threading.local()  # one buffer per reading thread


class Counted:
    """A progress bar that only counts."""

    bytes = 0

    def update(self, count: int) -> None:
        self.bytes += count


def write_checkpoints(folder: Path, model: str, dtype: torch.dtype) -> list[Path]:
    """A model before and after tuning, in two files."""
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(MODELS[model]).items()}
    paths = [folder / "initial.safetensors", folder / "tuned.safetensors"]
    for path, tensors in zip(paths, (weights, tuned_weights(weights)), strict=True):
        save_file(tensors, path)
    return paths


def read_part(path: Path, start: int, stop: int) -> int:
    """Reads bytes start..stop of a file and drops them; returns their number."""
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


def read_all(paths: Sequence[Path], pool: ThreadPoolExecutor, threads: int) -> int:
    """Reads every file, each thread of the pool a part; returns the number of bytes."""
    parts = []
    for path in paths:
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

    backend, groups = backends.resolve(torch.device("cpu"), "topk_delta"), [0] * len(sizes)

    def stream(progress: Counted | None = None) -> StreamSource:
        initial, tuned = ([Reader.of(file[name]) for name in ticket.sets] for file in map(open_checkpoint, paths))
        return StreamSource(initial, tuned, progress=progress)

    def passes(progress: Counted | None = None) -> Selection:
        return select_topk(backend, stream(progress), groups, [k])

    counted = Counted()
    passes(counted)
    readings = round(counted.bytes / (2 * n * DTYPES[dtype].itemsize))
    files = sum(path.stat().st_size for path in paths)

    def check_passes() -> None:
        found = [index_set.digest() for index_set in index_sets(passes(), sizes)]
        if found != [index_set.digest() for index_set in ticket.sets.values()]:
            raise WrongResult(f"{PASSES_ALONE}: another ticket than select's")

    band = BandPass(backend, stream, groups, k)

    def reading(name: str, threads: int) -> Provider:
        read = partial(read_all, paths, ThreadPoolExecutor(threads), threads)

        def check() -> None:
            if read() != files:
                raise WrongResult(name)

        return Provider(name, read, check, files)

    threads = torch.get_num_threads()
    providers = [
        Provider(PASSES_ALONE, passes, check_passes, readings * files),
        Provider(BAND, band.run, band.check, files, before=band.prepare),
        Provider("select", select, check_ticket, readings * files),
        reading(ONE_READER, 1),
    ]
    if threads > 1:
        providers.append(reading(f"reading both files once, {threads} threads", threads))
    rows = time_rows(OP, providers, n=n, k=k, dtype=dtype, rounds=rounds, baseline=ONE_READER)
    beside = max(0, peak_memory(select) - ticket.nbytes) / 1e6
    rows.append(value_row(OP, PASSES_ALONE, n, k, "readings", "of both files", readings, dtype))
    return [*rows, value_row(OP, "select", n, k, "memory beside the ticket", "MB", beside, dtype)]


class BandPass:
    """The read of the weights after the samples."""

    def __init__(
        self, backend: backends.Backend, stream: Callable[[], StreamSource], groups: list[int], k: int
    ) -> None:
        self.backend, self.stream, self.groups, self.k = backend, stream, groups, k

    def prepare(self) -> None:
        """Opens the files and takes the samples."""
        self.source = self.stream()
        bracket = sampled_bracket(self.backend, self.source, self.groups, [self.k])
        if bracket is None:
            raise WrongResult(f"{BAND}: no bracket")
        self.low, self.high = bracket
        layout, room = self.source.layout, room_for(sum(self.source.sizes))
        self.words, self.keys = (torch.empty(m, dtype=torch.int32) for m in (layout.words, room))
        self.positions = torch.empty(room, dtype=torch.int16)
        self.above, self.inside, self.offsets = (torch.empty(layout.tiles, dtype=torch.int64) for _ in range(3))
        self.cursor, self.nonfinite = (torch.zeros(1, dtype=torch.int64) for _ in range(2))

    def run(self) -> None:
        for chunk in self.source.chunks(range(len(self.groups))):
            per_tile = (counts[chunk.tiles] for counts in (self.above, self.inside))
            self.backend.delta_band(Band(
                Tensors(chunk.initial), Tensors(chunk.tuned), [0] * len(chunk.tensors), self.low, self.high, self.words,
                chunk.word_offsets, *per_tile, None, self.keys, self.positions, self.offsets[chunk.tiles],
                self.cursor, self.nonfinite,
            ))  # fmt: skip

    def check(self) -> None:
        """The k-th largest key must lie in the band."""
        self.prepare()
        self.run()
        above = int(self.above.sum())
        if not above < self.k <= above + int(self.inside.sum()):
            raise WrongResult(BAND)


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
