"""`masked_gather`, `masked_scatter_` and `masked_swap_`: bits moved between tensors and slots."""

import pytest
import torch
from helpers.backends import instruction_sets, using
from helpers.bits import bits

import ltp_sparse as ls
from ltp_sparse.ops import masked_gather, masked_scatter_, masked_swap_
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64, torch.float8_e4m3fn, torch.int64]
SIZES = (1, 63, 64, 65, 1000, 65_536, 70_001)
SMALL = (1, 65, 4097)
"""For Triton's interpreter: with a block that is cut short, and more blocks than programs."""
DENSITIES = (0.0, 0.0005, 0.02, 0.06, 0.3, 0.97, 1.0)


def any_bits(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern may occur: NaN of all payloads, infinities, -0."""
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def problem(
    density: float, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES
) -> tuple[list[torch.Tensor], list[torch.Tensor], TileTable]:
    masks = [torch.rand(n) < density for n in sizes]
    return [any_bits(n, dtype) for n in sizes], masks, TileTable.build([IndexSet.from_mask(mask) for mask in masks])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def check(density: float, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> None:
    tensors, masks, table = problem(density, dtype, sizes)
    held = torch.cat([bits(tensor)[mask] for tensor, mask in zip(tensors, masks, strict=True)]).view(dtype)
    new = any_bits(table.k, dtype)
    written = [bits(tensor).clone() for tensor in tensors]
    for tensor, mask, part in zip(written, masks, bits(new).split(list(table.counts)), strict=True):
        tensor[mask] = part

    assert same(masked_gather(tensors, table), held)
    targets, slots = [tensor.clone() for tensor in tensors], new.clone()
    masked_scatter_(targets, slots, table)
    assert all(same(target, tensor.view(dtype)) for target, tensor in zip(targets, written, strict=True))
    assert same(slots, new)

    targets = [tensor.clone() for tensor in tensors]
    masked_swap_(targets, slots, table)
    assert all(same(target, tensor.view(dtype)) for target, tensor in zip(targets, written, strict=True))
    assert same(slots, held)
    masked_swap_(targets, slots, table)
    assert all(map(same, targets, tensors))
    assert same(slots, new)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("density", DENSITIES)
def test_bits_are_moved_and_nothing_else(compiled, density, dtype):
    with using("reference"):
        check(density, dtype)
    for isa in instruction_sets(compiled):
        compiled.set_isa(isa)
        with using("compiled"):
            check(density, dtype)


@pytest.mark.parametrize(
    ("density", "dtype"), [(0.02, torch.uint8), (0.3, torch.bfloat16), (0.3, torch.float64), (1.0, torch.float32)]
)
def test_triton_moves_the_same_bits(density, dtype):
    pytest.importorskip("triton")
    with using("triton"):
        check(density, dtype, SMALL)


def test_tensors_may_be_of_any_layout():
    mask = torch.rand(40, 30) < 0.3
    table, held = TileTable.build([IndexSet.from_mask(mask)]), torch.randn(30, 40)
    tensor = held.clone().t()
    slots = masked_gather([tensor], table)
    assert torch.equal(slots, tensor[mask])
    masked_scatter_([tensor], -slots, table)
    assert torch.equal(tensor, torch.where(mask, -held.t(), held.t()))
    masked_swap_([tensor], slots, table)
    assert torch.equal(tensor, held.t())


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_torch_counts_what_is_written(backend):
    """A master of the optimizer takes over weights that others have edited."""
    if backend == "compiled" and ls.available_backends()[backend] != "ok":
        pytest.skip("there is no extension")
    tensor, mask = torch.randn(100), torch.rand(100) < 0.5
    table, out = TileTable.build([IndexSet.from_mask(mask)]), torch.zeros(int(mask.sum()))
    versions = [tensor._version]
    with using(backend):
        assert masked_gather([tensor], table, out=out) is out and torch.equal(out, tensor[mask])
        versions.append(tensor._version)
        masked_scatter_([tensor], out, table)
        versions.append(tensor._version)
        masked_swap_([tensor], out, table)
        versions.append(tensor._version)
    assert versions[0] == versions[1] < versions[2] < versions[3]


def test_bad_arguments_change_nothing():
    tensors, _, table = problem(0.3, torch.float32)
    before, slots = [bits(tensor).clone() for tensor in tensors], torch.zeros(table.k)
    for bad, message in (
        ([*tensors[:-1], tensors[-1].double()], "one dtype"),
        (tensors[:-1], "expected 7 tensors"),
        ([*tensors[:-1], tensors[-1][:-1]], "tensor 6 has 70000 entries"),
        ([*tensors[:-1], torch.zeros(1).expand(70_001)], "expanded"),
        ([*tensors[:-1], tensors[-1].to("meta")], "tensor 6 is on the meta device and has no values"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            masked_scatter_(bad, slots, table)
    for bad, message in (
        (slots[:-1], "slots must be"),
        (slots.double(), "slots must be"),
        (None, "slots must be a tensor, got None"),
        (tensors[-1].view(-1)[: table.k], "share memory"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            masked_swap_(tensors, bad, table)
    assert all(torch.equal(bits(tensor), held) for tensor, held in zip(tensors, before, strict=True))
