"""Selection from a model whose bitmap is too large for memory: one tensor after the other, from exact thresholds.

Two passes count digits of the keys, which gives the threshold of every group and the number of ties to take. The third
pass marks the entries above the threshold and the earliest ties. Besides the histograms, only the bitmap of one tensor
exists at a time. Finished index sets are kept in their smallest encoding, in memory or in a spool on disk. The result
is the same as that of `routes.select_topk`, which reads the weights once or twice, or up to four times with many equal
deltas.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import Band, Tensors
from ltp_sparse.ops.digits import digit_pass, joined
from ltp_sparse.ops.ranks import Ranks
from ltp_sparse.ops.routes import check_finite
from ltp_sparse.ops.sources import StreamSource
from ltp_sparse.tickets.bits import bitmap_words
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.digests import host_blocks

PASSES = 3
"""How often the source is read."""

_ALIGNMENT = 8


class Spool:
    """Tensors written to a file one by one and then read through a memory map.

    Use it as a context manager, which closes the file for writing. The file has no name, so the system frees its space
    together with the last of the tensors.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._parts: list[tuple[int, torch.dtype, int]] = []  # (first byte, dtype, entries)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # memory maps stay valid

    def append(self, tensor: Tensor) -> None:
        """Writes a tensor [m], on any device."""
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        self._parts.append((self._file.tell(), tensor.dtype, tensor.numel()))
        for block in host_blocks(tensor):
            self._file.write(block)

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors, on the CPU."""
        self._file.flush()
        nbytes = self._file.tell()
        # copy on write, because torch warns about read-only buffers
        mapped = mmap.mmap(self._file.fileno(), nbytes, access=mmap.ACCESS_COPY) if nbytes else b""
        for start, dtype, count in self._parts:
            if count:
                yield torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
            else:
                yield torch.empty(0, dtype=dtype, device="cpu")


@torch.no_grad()
def select_by_tensor(
    passes: Backend, source: StreamSource, groups: list[int], ks: list[int], spool: Spool | None = None
) -> tuple[list[IndexSet], Tensor]:
    """Selects like `select_topk`, but tensor by tensor.

    Args:
        passes: the backend.
        source: the pairs of tensors.
        groups: the group of every tensor.
        ks: entries to take from every group.
        spool: where to keep the index sets; None: in memory.

    Returns:
        (index set per tensor, thresholds float32 [G])

    Raises:
        NonFiniteDelta: a delta is NaN or infinite.
    """
    ranks, nonfinite = Ranks(), torch.zeros(1, dtype=torch.int64, device=source.device)
    wanted = torch.tensor(ks, dtype=torch.int64, device=source.device)
    upper = digit_pass(passes, source, groups, wanted, None, ranks, nonfinite)
    check_finite(nonfinite, source, ranks)
    lower = digit_pass(passes, source, groups, upper.order, upper.digit, ranks, nonfinite)
    cuts = joined(upper, lower)
    ties = lower.order.tolist()
    sets: list[IndexSet] = []
    kept: Spool | list[Tensor] = [] if spool is None else spool
    for tensor, group in enumerate(groups):
        index_set, taken = _marked(passes, source, groups, tensor, cuts, ties[group])
        ties[group] -= taken
        index_set = index_set.compact()
        kept.append(index_set.data)
        counts = index_set.tile_counts if spool is None else index_set.tile_counts.cpu()
        nothing = torch.empty(0, dtype=index_set.data.dtype, device="cpu")
        sets.append(replace(index_set, data=nothing, tile_counts=counts))
    sets = [replace(index_set, data=data) for index_set, data in zip(sets, kept, strict=True)]
    return sets, cuts.to(torch.int32).view(torch.float32)


def _marked(
    passes: Backend, source: StreamSource, groups: list[int], tensor: int, cuts: Tensor, ties: int
) -> tuple[IndexSet, int]:
    """The entries of a tensor above the threshold of its group, and its earliest ones at it, at most `ties`.

    Returns:
        (the index set, the number of entries at the threshold that it has)
    """
    n, first_word, device = source.sizes[tensor], source.layout.word_offsets[tensor], source.device
    words = torch.empty(bitmap_words(n), dtype=torch.int32, device=device)
    counts, left = [torch.empty(0, dtype=torch.int64, device=device)], ties
    for chunk in source.chunks([tensor]):
        tiles = chunk.tiles.stop - chunk.tiles.start
        above, inside, offsets = (torch.empty(tiles, dtype=torch.int64, device=device) for _ in range(3))
        cursor, nonfinite = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        band = Band(
            initial=Tensors(chunk.initial),
            tuned=Tensors(chunk.tuned),
            groups=[groups[tensor]],
            low=cuts,
            high=cuts + 1,
            words=words,
            word_offsets=[offset - first_word for offset in chunk.word_offsets],
            above=above,
            inside=inside,
            take=None,
            keys=torch.empty(0, dtype=torch.int32, device=device),
            positions=torch.empty(0, dtype=torch.int16, device=device),
            offsets=offsets,
            cursor=cursor,
            nonfinite=nonfinite,
            digests=chunk.digests,
        )
        passes.delta_band(band)
        take = torch.minimum((left - (inside.cumsum(0) - inside)).clamp(min=0), inside)
        if taken := int(take.sum()):
            passes.delta_band(replace(band, take=take, digests=None))
            left -= taken
        counts.append(above + take)
    of_tiles = torch.cat(counts)
    return IndexSet.of_counted(words, n, of_tiles, int(of_tiles.sum())), ties - left
