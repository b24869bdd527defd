"""`Layout`: the offsets of several tensors' bitmaps and tiles in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence

from ltp_sparse.tickets.bits import bitmap_words, tiles_of


class Layout:
    """Offsets of each tensor's tiles and words in the flat arrays of a selection.

    Attributes:
        sizes: entries of each tensor.
        tile_offsets: the first tile of each tensor, and at the end the number of tiles.
        word_offsets: the first bitmap word of each tensor, and at the end the number of words.
    """

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
