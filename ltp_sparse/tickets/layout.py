"""`Layout`: the offsets of several tensors' bitmaps and tiles in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ltp_sparse.tickets.bits import WORDS_PER_TILE, bitmap_words, tiles_of


class Layout:
    """Offsets of each tensor's tiles and words in the flat arrays of a selection.

    Attributes:
        sizes: entries of each tensor.
        tile_offsets: the first tile of each tensor, and at the end the number of tiles.
        word_offsets: the first bitmap word of each tensor, and at the end the number of words.
        tiles, words: the numbers of all tiles and words.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.tile_offsets = [0, *accumulate(map(tiles_of, self.sizes))]
        self.word_offsets = [0, *accumulate(map(bitmap_words, self.sizes))]
        self.tiles, self.words = self.tile_offsets[-1], self.word_offsets[-1]


def tiles_in_order(sizes: Sequence[int], word_offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The tensor of every tile and the first word of its bitmap: int64 [T] each, on the CPU.

    Args:
        sizes: entries of each tensor.
        word_offsets: the first bitmap word of each tensor.
    """
    counts = torch.tensor(list(map(tiles_of, sizes)), dtype=torch.int64, device="cpu")
    words = torch.tensor(word_offsets, dtype=torch.int64, device="cpu")
    tensors = torch.repeat_interleave(counts)
    numbers = torch.arange(len(tensors), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[tensors]
    return tensors, words[tensors] + WORDS_PER_TILE * numbers
