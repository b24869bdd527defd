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
from ltp_sparse.ops.sources import Chunk, StreamSource
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
            yield (
                torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
                if count
                else torch.empty(0, dtype=dtype, device="cpu")
            )


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
    upper = digit_pass(
        passes, source, groups, torch.tensor(ks, device=source.device, dtype=torch.int64), None, ranks, nonfinite
    )
    check_finite(nonfinite, source, ranks)
    lower = digit_pass(passes, source, groups, upper.order, upper.digit, ranks, nonfinite)
    cuts = joined(upper, lower)
    marker = _Marker(passes, source, groups, cuts, lower.order.tolist())
    sets: list[IndexSet] = []
    kept: Spool | list[Tensor] = [] if spool is None else spool
    for tensor in range(len(groups)):
        index_set = marker.marked(tensor).compact()
        kept.append(index_set.data)
        counts = index_set.tile_counts if spool is None else index_set.tile_counts.cpu()
        sets.append(
            replace(index_set, data=torch.empty(0, dtype=index_set.data.dtype, device="cpu"), tile_counts=counts)
        )
    sets = [replace(index_set, data=data) for index_set, data in zip(sets, kept, strict=True)]
    return sets, cuts.to(torch.int32).view(torch.float32)


class _Marker:
    """Marks the entries above the threshold of their group and, as tensors come in order, the earliest ties.

    Args:
        cuts: int64 [G], the threshold of every group, as a key.
        ties: the number of ties to take from every group.
    """

    def __init__(self, passes: Backend, source: StreamSource, groups: list[int], cuts: Tensor, ties: list[int]) -> None:
        self.passes, self.source, self.groups, self.low, self.open_ties = passes, source, groups, cuts, ties

    def marked(self, tensor: int) -> IndexSet:
        n = self.source.sizes[tensor]
        words = torch.empty(bitmap_words(n), dtype=torch.int32, device=self.source.device)
        counts = []
        for chunk in self.source.chunks([tensor]):
            above, inside = self._mark(chunk, words, None)
            wanted = self.open_ties[self.groups[tensor]]
            take = torch.minimum((wanted - (inside.cumsum(0) - inside)).clamp(min=0), inside)
            if taken := int(take.sum()):
                self._mark(chunk, words, take)
                self.open_ties[self.groups[tensor]] -= taken
            counts.append(above + take)
        if not counts:
            return IndexSet.from_bitmap(words, n)
        of_tiles = torch.cat(counts)
        return IndexSet.of_counted(words, n, of_tiles, int(of_tiles.sum()))

    def _mark(self, chunk: Chunk, words: Tensor, take: Tensor | None) -> tuple[Tensor, Tensor]:
        """Marks a chunk, with `take` ties per tile. Returns entries above and at the threshold, int64 [tiles] each."""
        tiles, device = chunk.tiles.stop - chunk.tiles.start, words.device
        above, inside, offsets = (torch.empty(tiles, dtype=torch.int64, device=device) for _ in range(3))
        cursor, nonfinite = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        first_word = self.source.layout.word_offsets[chunk.tensors[0]]
        band = Band(
            initial=Tensors(chunk.initial),
            tuned=Tensors(chunk.tuned),
            groups=[self.groups[tensor] for tensor in chunk.tensors],
            low=self.low,
            high=self.low + 1,
            words=words,
            word_offsets=[offset - first_word for offset in chunk.word_offsets],
            above=above,
            inside=inside,
            take=take,
            keys=torch.empty(0, dtype=torch.int32, device=device),
            positions=torch.empty(0, dtype=torch.int16, device=device),
            offsets=offsets,
            cursor=cursor,
            nonfinite=nonfinite,
            digests=chunk.digests if take is None else None,
        )
        self.passes.delta_band(band)
        return above, inside
