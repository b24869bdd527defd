"""Index sets: every encoding is a view of the same set."""

import itertools

import pytest
import torch
from helpers.index_sets import random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from ltp_sparse.tickets.bits import TILE, pack_bits
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import TileTable, tile_indices

SMALL = itertools.product((0, 1, 31, 32, 63, 64, 65, 1000, 4097), (0.0, 0.05, 0.97, 1.0))
LARGE = itertools.product((TILE - 1, TILE, TILE + 1, 2 * TILE + 77), (0.004, 0.3, 1.0))


def views(index_set: IndexSet) -> list[IndexSet]:
    """The set in every encoding that can hold it."""
    return [index_set.encoded(e) for e in Encoding if e is not Encoding.FULL or index_set.k == index_set.n]


@pytest.mark.parametrize(("n", "density"), [*SMALL, *LARGE], ids=lambda value: f"{value}")
def test_every_encoding_holds_the_same_set(n, density):
    mask = random_mask(n, density)
    indices = mask.nonzero().view(-1)
    made = [IndexSet.from_mask(mask), IndexSet.from_indices(indices, n), IndexSet.from_bitmap(pack_bits(mask), n)]
    sets = [*made, *views(made[0])]
    for index_set in sets:
        assert torch.equal(index_set.indices(), indices)
        assert torch.equal(index_set.mask(), mask)
        assert torch.equal(index_set.bitmap(), pack_bits(mask))
        assert index_set.k == indices.numel() == int(index_set.tile_counts.sum())
        chunks = [(slot, chunk.numel()) for slot, chunk in index_set.chunks()]
        assert [slot for slot, _ in chunks] == [0, *itertools.accumulate(size for _, size in chunks)][: len(chunks)]
    assert len({index_set.digest() for index_set in sets}) == 1, "the digest must not depend on the encoding"


@pytest.mark.parametrize("n", [64, 4096, TILE, 5 * TILE])
@pytest.mark.parametrize("density", [0.01, 0.06, 0.0626, 0.5, 1.0])
def test_compact_takes_the_encoding_of_least_bytes(n, density):
    index_set = IndexSet.from_mask(torch.arange(n) % 10_000 < density * 10_000)
    assert index_set.compact().nbytes == min(view.nbytes for view in views(index_set))


@pytest.mark.parametrize("density", [0.0, 0.01, 0.0625, 0.9])
def test_lists_of_bitmaps_are_those_of_torch(density, compiled, monkeypatch):
    """Compiled code writes them, by which a bitmap is read once."""
    index_set = IndexSet.from_mask(random_mask(3 * TILE + 77, density, seed=2))
    found = index_set.encoded(Encoding.LIST16)
    monkeypatch.setattr("ltp_sparse.tickets.index_set.position_listers", {})
    assert torch.equal(found.data, index_set.encoded(Encoding.LIST16).data)
    for k in {max(0, index_set.k - 1), index_set.k + 1} - {index_set.k}:
        with pytest.raises(ValueError, match="bits set than expected"):
            compiled.list_positions(index_set.data, torch.empty(k, dtype=torch.int16))


def test_digest_tells_sets_and_sizes_apart():
    sets = [IndexSet.from_indices(torch.tensor(i), n) for i, n in (([1], 9), ([2], 9), ([1], 10), ([1, 2], 9))]
    assert len({index_set.digest() for index_set in sets}) == 4


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 2], "ascending"),
        ([2, 2], "unique"),
        ([-1, 2], r"lie in \[0, 10\)"),
        ([4, 10], r"lie in \[0, 10\), got 4 to 10"),
        ([4, 11, 9], "ascending"),
        ([0.0, 1.9], r"expected integer indices \[k\], got torch.float32 \[2\]"),
        ([False, True], "use from_mask for masks"),
        ([[0, 1], [2, 3]], r"got torch.int64 \[2, 2\]"),
    ],
)
def test_from_indices_refuses_what_is_no_set(indices, message):
    with pytest.raises(ValueError, match=message):
        IndexSet.from_indices(torch.tensor(indices), 10)


def test_from_bitmap_refuses_bits_past_the_end_and_wrong_lengths():
    words = pack_bits(torch.ones(65, dtype=torch.bool))
    with pytest.raises(ValueError, match="past its 66"):
        IndexSet.from_bitmap(pack_bits(torch.ones(70, dtype=torch.bool)), 66)
    with pytest.raises(ValueError, match="cannot be stored as FULL"):
        IndexSet.from_bitmap(words, 65).combine(IndexSet.from_indices(torch.tensor([3]), 65), "-").encoded(
            Encoding.FULL
        )
    with pytest.raises(ValueError, match=r"int32 \[2\], got"):
        IndexSet.from_bitmap(words, 64)
    with pytest.raises(ValueError, match="int64"):
        IndexSet.from_bitmap(words.long(), 65)


@pytest.mark.parametrize(
    ("positions", "counts", "message"),
    [
        ([1, 1], [2, 0], "ascending"),
        ([1, 2], [2, 1], "expected 3 positions"),
        ([1], [1], "tile counts"),
        ([1], [-1, 2], "tile counts"),
        ([1, 100], [1, 1], "below"),
    ],
)
def test_from_list16_checks_every_position(positions, counts, message):
    with pytest.raises(ValueError, match=message):
        IndexSet.from_list16(torch.tensor(positions, dtype=torch.int16), torch.tensor(counts), TILE + 100)


def test_positions_beyond_31_bits():
    """LT-SFT decodes wrongly past 2^31."""
    n = 2**31 + 2 * TILE
    indices = torch.tensor([0, 2**31 - 1, 2**31, n - 1])
    index_set = IndexSet.from_indices(indices, n)
    table = TileTable.build([index_set])
    found = [tile_indices(tile, table.words, table.positions) for tile in table.tiles.tolist()]
    assert torch.equal(torch.cat(found), indices)


@pytest.mark.parametrize("n", [TILE - 5, 2 * TILE, 3 * TILE + 77])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
def test_a_range_of_entries_in_every_encoding(n, density):
    """Ranges that begin and end inside words and tiles, at their bounds, and in stretches all or none of it active."""
    mask = random_mask(n, density, seed=1)
    mask[1000:1200], mask[TILE - 300 : TILE - 100] = True, False
    bounds = [0, 1, 31, 64, 1000, 1100, 1200, TILE // 2, TILE - 300, TILE - 6, n // 2, n - 1, n]
    bounds = sorted({*bounds, *(b for b in (TILE - 1, TILE, TILE + 1, 2 * TILE) if b <= n)})
    for view in views(IndexSet.from_mask(mask)):
        before = [int(mask[:bound].sum()) for bound in bounds]
        assert view.slots_at(torch.tensor(bounds)).tolist() == before
        for start, stop in itertools.combinations_with_replacement(bounds, 2):
            part, expected = view.entries(start, stop), IndexSet.from_mask(mask[start:stop])
            assert (part.n, part.k) == (expected.n, expected.k)
            assert torch.equal(part.tile_counts, expected.tile_counts)
            assert part.encoding in (view.encoding, Encoding.FULL)
            if part.encoding is Encoding.LIST16:
                expected = IndexSet.from_list16(part.data, part.tile_counts, part.n)  # checks every position
            assert torch.equal(part.bitmap(), expected.bitmap()) and torch.equal(part.mask(), mask[start:stop])
            if (start, stop) != (0, n):
                assert part.data.untyped_storage().nbytes() == part.data.nbytes, "it must not hold the whole set"


SETS = st.integers(1, 150).flatmap(
    lambda n: st.tuples(st.just(n), *(st.sets(st.integers(0, n - 1)) for _ in range(2)), st.integers(0, 2))
)


@settings(max_examples=30)
@given(SETS)
def test_algebra_is_that_of_sets(case):
    n, a, b, tiles = case
    n, shift = n + tiles * TILE, tiles * TILE // 2  # the same sets inside one tile and across tiles
    a, b = ({x + shift * (x % 2) for x in s} for s in (a, b))
    x, y = (IndexSet.from_indices(torch.tensor(sorted(s), dtype=torch.int64), n) for s in (a, b))
    for operation, expected in {"&": a & b, "|": a | b, "-": a - b, "^": a ^ b}.items():
        assert x.combine(y, operation).indices().tolist() == sorted(expected)
    assert x.complement().combine(x, "^").k == n
    start, stop = sorted((n // 3, 2 * n // 3))
    rows = x.entries(start, stop).compact()
    assert rows.n == stop - start and rows.indices().tolist() == sorted(i - start for i in a if start <= i < stop)


def test_sets_of_different_sizes_cannot_be_combined():
    with pytest.raises(ValueError, match="4 and 5 entries"):
        IndexSet.full(4).combine(IndexSet.full(5), "&")
