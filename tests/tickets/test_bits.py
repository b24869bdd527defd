"""Bitmaps in words, and positions inside a tile in 16 bits."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ltp_sparse.tickets.bits import (
    TILE,
    bitmap_words,
    from_uint16_bits,
    pack_bits,
    popcount,
    to_uint16_bits,
    unpack_bits,
)


@given(st.lists(st.booleans(), max_size=200))
def test_pack_bits_puts_entry_j_into_bit_j(mask):
    words = pack_bits(torch.tensor(mask, dtype=torch.bool))
    number = sum(1 << j for j, active in enumerate(mask) if active)
    assert words.numel() == bitmap_words(len(mask)) and words.numel() % 2 == 0
    assert [w & 0xFFFFFFFF for w in words.tolist()] == [number >> (32 * i) & 0xFFFFFFFF for i in range(words.numel())]
    assert unpack_bits(words)[: len(mask)].tolist() == mask


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_popcount_counts_bits_of_signed_words(words):
    assert popcount(torch.tensor(words, dtype=torch.int32)).tolist() == [(w & 0xFFFFFFFF).bit_count() for w in words]


def test_uint16_bits_round_trip_every_position():
    positions = torch.arange(TILE)
    assert torch.equal(from_uint16_bits(to_uint16_bits(positions)), positions)
