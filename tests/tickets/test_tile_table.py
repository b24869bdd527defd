"""Tile tables: where each active entry lies, once and in slot order."""

import pytest
import torch
from helpers.index_sets import random_mask

from ltp_sparse.tickets.bits import TILE, bitmap_words, from_uint16_bits, unpack_bits
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable, tile_indices


def mixed_sets() -> list[IndexSet]:
    """All encodings, empty tiles, an empty parameter, one without active entries."""
    hole = random_mask(4 * TILE + 5, 0.3, seed=1)
    hole[TILE : 3 * TILE] = False
    last_only = torch.zeros(2 * TILE + 3, dtype=torch.bool)
    last_only[-1] = True
    masks = [
        torch.ones(TILE + 9, dtype=torch.bool),
        hole,
        random_mask(TILE + 65, 0.01, seed=2),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(70_000, dtype=torch.bool),
        last_only,
        random_mask(33, 0.5, seed=3),
    ]
    return [IndexSet.from_mask(mask) for mask in masks]


def test_tile_table_reaches_every_active_entry_once_in_slot_order():
    sets = mixed_sets()
    table = TileTable.build(sets)
    found: list[list[int]] = [[] for _ in sets]
    slot = 0
    for tile in table.tiles.tolist():
        indices = tile_indices(tile, table.words, table.positions)
        assert indices.numel() == tile[Column.ACTIVE] > 0, "tiles without active entries do not exist"
        assert tile[Column.SLOT] == slot, "state is ordered by (parameter, flat index)"
        assert tile[Column.START] % TILE == 0 and 0 < tile[Column.LENGTH] <= TILE
        assert int(indices[0]) >= tile[Column.START]
        assert int(indices[-1]) < tile[Column.START] + tile[Column.LENGTH]
        slot += tile[Column.ACTIVE]
        found[tile[Column.PARAM]] += indices.tolist()
    assert slot == table.k == sum(table.counts)
    assert found == [index_set.indices().tolist() for index_set in sets]
    assert table.sizes == tuple(index_set.n for index_set in sets)


def test_tile_table_does_not_depend_on_the_encoding_of_its_sets():
    sets = mixed_sets()
    tables = [TileTable.build(sets), TileTable.build([s.encoded(Encoding.LIST16) for s in sets])]
    for name in ("tiles", "words", "positions"):
        assert torch.equal(*(getattr(table, name) for table in tables))
    assert set(tables[0].tiles[:, Column.ENCODING].tolist()) == set(Encoding)


def test_tile_table_ranks_count_the_entries_before_each_group_of_64():
    table = TileTable.build(mixed_sets()).with_ranks()
    ranks = from_uint16_bits(table.ranks)
    for tile in table.tiles[table.tiles[:, Column.ENCODING] == Encoding.BITMAP].tolist():
        words = table.words[tile[Column.INDEX] : tile[Column.INDEX] + bitmap_words(tile[Column.LENGTH])]
        groups = unpack_bits(words).view(-1, 64).sum(1)
        first = tile[Column.INDEX] // 2
        assert torch.equal(ranks[first : first + groups.numel()], groups.cumsum(0) - groups)
    assert table.with_ranks() is table


@pytest.mark.parametrize(
    ("density", "per_entry"),
    [(0.0005, 2 * 0.0005), (0.05, 2 * 0.05), (0.2, 1 / 8), (0.75, 1 / 8), (1.0, 0)],
    ids="d{}".format,
)
def test_index_bytes_are_those_of_the_formula(density, per_entry):
    """Contract 5: u16 2d, bitmap 1/8, full nothing; and a row of 64 bytes per tile."""
    n = 10 * TILE
    step = round(n * density)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:step]] = True
    table = TileTable.build([IndexSet.from_mask(mask)])
    assert table.nbytes == round(per_entry * n if density not in (0.0005, 0.05) else 2 * step) + 64 * 10
    assert table.with_ranks().nbytes - table.nbytes == table.words.nbytes // 4  # 1/32 byte per entry
