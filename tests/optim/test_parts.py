"""A part of a parameter, updated by itself, has the bits that the whole would have there: on every backend."""

from dataclasses import replace

import pytest
import torch
from helpers.backends import SLOW_ON_TRITON, using

from ltp_sparse import ops
from ltp_sparse.backends.arguments import Tensors, Update
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable


def updated(param, grad, index_set, origin, eight_bit):
    """Packed moments after two updates in place; origin: the entry of the whole that `param` begins with."""
    table = TileTable.build([index_set], ranks=True)
    tiles = table.tiles.clone()
    tiles[:, Column.START] += origin
    table = replace(table, tiles=tiles, sizes=(param.numel() + origin,))
    table, backend = ops.served(table, param.dtype)
    k = index_set.k
    state = {"exp_avg": torch.zeros(k), "exp_avg_sq": torch.zeros(k), "scales": None}
    if eight_bit:
        state = {"exp_avg": torch.zeros(k, dtype=torch.int8), "exp_avg_sq": torch.zeros(k, dtype=torch.uint8)}
        state["scales"] = torch.zeros(table.blocks, 2)
    for step in (1, 2):
        coefficients = ops.adamw_coefficients(torch.tensor([step]), lr=1e-2, seed=5)
        tensors = (Tensors.of_parts([t], (origin,)) for t in (param, grad))
        fields = ops.norm_fields("masked_adamw_", *tensors, table, coefficients, None, None, **state)
        ops.run("masked_adamw_", Update(**fields, stochastic=True), backend)
    return state


@pytest.mark.parametrize("backend", SLOW_ON_TRITON)
@pytest.mark.parametrize(("at", "eight_bit", "density"), [(1003, False, 0.3), (TILE, True, 0.01)])
def test_a_part_has_the_bits_of_the_whole(backend, at, eight_bit, density):
    n = TILE + 1500
    g = torch.Generator().manual_seed(0)
    whole, grad = (torch.randn(n, generator=g).bfloat16() for _ in range(2))
    index_set = IndexSet.from_mask(torch.rand(n, generator=g) < density)
    parts = [(whole[start:stop].clone(), start, stop) for start, stop in ((0, at), (at, n))]
    with using(backend):
        expected = updated(whole, grad, index_set, 0, eight_bit)
        states = [
            updated(param, grad[start:stop], index_set.entries(start, stop), start, eight_bit)
            for param, start, stop in parts
        ]
    assert torch.equal(torch.cat([param for param, _, _ in parts]), whole)
    for key, values in expected.items():
        if values is not None:
            assert torch.equal(torch.cat([state[key] for state in states]), values), key
