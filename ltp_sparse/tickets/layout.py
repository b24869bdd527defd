"""`Layout`: where the bitmaps and tiles of several tensors lie in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence

from ltp_sparse.tickets.bits import bitmap_words, tiles_of


class Layout:
    """Where the tiles and words of tensors of given sizes lie in the flat arrays of a selection."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.tile_offsets = [0]
        self.word_offsets = [0]
        for n in sizes:
            self.tile_offsets.append(self.tile_offsets[-1] + tiles_of(n))
            self.word_offsets.append(self.word_offsets[-1] + bitmap_words(n))

    @property
    def tiles(self) -> int:
        return self.tile_offsets[-1]

    @property
    def words(self) -> int:
        return self.word_offsets[-1]
