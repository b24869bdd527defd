"""Sharded parameters (DTensors of FSDP2 and tensor parallelism): which part of them this rank holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, sharded or replicated."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; without it there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The part of a tensor that this rank holds: the memory itself, not a copy."""
    if not is_sharded(tensor):
        return tensor
    held = tensor._local_tensor
    return held.wait() if hasattr(held, "wait") else held  # an AsyncCollectiveTensor


def whole(tensor: Any) -> Any:
    """All of a tensor; the ranks of a sharded one must all call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(param: Tensor, held: Any) -> Any:
    """A tensor that is sharded like a parameter and of which this rank holds `held`."""
    if not is_sharded(param):
        return held
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


@dataclass(frozen=True)
class Cut:
    """The division of a parameter into blocks. Each rank holds one block; several ranks can hold the same one.

    Attributes:
        shape: the shape of the whole parameter.
        ranges: for each dimension, (start, stop) of its pieces, in order.
        own: for each dimension, the number of this rank's piece.
    """

    shape: tuple[int, ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    own: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any, what: str) -> Cut:
        """The cut of a DTensor, or of an ordinary tensor, which is one block.

        Args:
            tensor: the parameter.
            what: its name, for messages.

        Raises:
            ValueError: its placements are neither sharded by dimensions nor replicated.
        """
        ranges = [[(0, size)] for size in tensor.shape]
        own = [0 for _ in tensor.shape]
        if is_sharded(tensor):
            for mesh_dim, dim in _cuts(tensor, what):
                count, rank = tensor.device_mesh.size(mesh_dim), tensor.device_mesh.get_local_rank(mesh_dim)
                ranges[dim] = [piece for whole in ranges[dim] for piece in _chunks(*whole, count)]
                own[dim] = own[dim] * count + rank
        cut = cls(tuple(tensor.shape), tuple(map(tuple, ranges)), tuple(own))
        if tuple(local(tensor).shape) != cut.sizes:
            raise ValueError(
                f"{what} is placed as {tensor.placements} over its mesh, and this rank's part has shape "
                f"{list(local(tensor).shape)}, expected {list(cut.sizes)}; shard it by fully_shard, parallelize_module "
                "or distribute_tensor"
            )
        return cut

    @property
    def block(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of this rank's block in each dimension."""
        return tuple(pieces[number] for pieces, number in zip(self.ranges, self.own, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of this rank's block."""
        return tuple(stop - start for start, stop in self.block)

    @property
    def by_rows(self) -> bool:
        """Whether every block is a range of the row-major order."""
        return all(len(pieces) == 1 for pieces in self.ranges[1:])

    @property
    def entries(self) -> tuple[int, int]:
        """(start, stop) of this rank's entries in row-major order, if the parameter is cut by rows."""
        if not self.block:
            return 0, 1
        row = math.prod(self.shape[1:])
        return self.block[0][0] * row, self.block[0][1] * row

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Finds entries of the whole in this rank's block.

        Args:
            indices: int64 [m], row-major indices of the whole.

        Returns:
            (bool [m], whether each entry is in the block; int64, the row-major indices in the block of those that are)
        """
        inside, places = torch.ones_like(indices, dtype=torch.bool), torch.zeros_like(indices)
        for coordinate, (start, stop) in zip(torch.unravel_index(indices, self.shape), self.block, strict=True):
            inside &= (start <= coordinate) & (coordinate < stop)
            places = places * (stop - start) + coordinate - start
        return inside, places[inside]

    def taken_from(self, whole: Tensor) -> Tensor:
        """This rank's block of a whole tensor, a view of it."""
        return whole[tuple(slice(*piece) for piece in self.block)]


def _cuts(tensor: Any, what: str) -> list[tuple[int, int]]:
    """(dimension of the mesh, dimension of the tensor) of each cut, in the order they were made."""
    cuts, later, counts = [], [], dict.fromkeys(range(tensor.dim()), 1)
    for mesh_dim, placement in enumerate(tensor.placements):
        kind = type(placement).__name__
        if kind == "Shard":
            cuts.append((mesh_dim, placement.dim))
            counts[placement.dim] *= tensor.device_mesh.size(mesh_dim)
        elif kind == "_StridedShard":  # FSDP2 on a parameter that a later mesh dimension cuts already
            later.append((mesh_dim, placement.dim, placement.split_factor))
        elif kind != "Replicate":
            raise ValueError(
                f"{what} is placed as {placement} over its mesh; expected Shard or Replicate, redistribute() it first"
            )
    if len(later) > 1 or any(factor != counts[dim] for _, dim, factor in later):
        raise ValueError(
            f"{what} is placed as {tensor.placements} over its mesh, so its ranks do not hold blocks; use tensor "
            "parallelism first, then fully_shard"
        )
    return cuts + [(mesh_dim, dim) for mesh_dim, dim, _ in later]


def _chunks(start: int, stop: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of torch.chunk, with empty ones at the end up to `count`."""
    size = -(-(stop - start) // count)
    for number in range(count):
        yield min(start + number * size, stop), min(start + (number + 1) * size, stop)


def mesh_of(param: Any) -> Any:
    """The mesh of ranks that share a parameter; None: it is not sharded."""
    return param.device_mesh if is_sharded(param) else None


def spread(param: Any) -> tuple[Any, ...]:
    """(mesh, dimension) pairs over which a parameter is sharded, for sums over its ranks.

    It is empty for a parameter of which every rank has the whole.
    """
    if not is_sharded(param):
        return ()
    mesh, placements = param.device_mesh, param.placements
    return tuple((mesh, dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def sum_over(spread: Sequence[Any], total: Tensor) -> Tensor:
    """Sums a tensor over the ranks of a sharded parameter, in place and on all of them.

    Args:
        spread: as the function `spread` returns it.
        total: this rank's summand.
    """
    from torch import distributed

    for mesh, dim in spread:
        distributed.all_reduce(total, group=mesh.get_group(dim))
    return total


def everywhere(tensor: Any, holds: bool) -> bool:
    """Whether `holds` is True on all ranks of a sharded tensor. All of them must call it."""
    failed = torch.tensor([0 if holds else 1], dtype=torch.int32, device=local(tensor).device)
    return not int(sum_over(spread(tensor), failed))


def is_same(text: str, groups: Iterable[Any], device: str | torch.device) -> bool:
    """Whether all ranks of some process groups, which must all call this, have the same text."""
    from torch import distributed

    number = xxhash.xxh3_64_intdigest(text.encode()) >> 1  # as int64 has a sign
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    for group in groups:
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
    return extremes.tolist() == [number, -number]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules on which `fully_shard` was called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Makes FSDP2 restore its sharded parameters, in place of gathered ones that a forward pass has left."""
    for module in fsdp_modules(model):
        module.reshard()


def own_gradient(param: Tensor) -> Tensor | None:
    """The part of a parameter's gradient that this rank holds. The gradient is first sharded like the parameter.

    Raises:
        TypeError: the gradient of a sharded parameter is an ordinary tensor.
    """
    grad = param.grad
    if grad is None or not is_sharded(param):
        return grad
    if not is_sharded(grad):
        raise TypeError(
            f"expected the gradient of a sharded parameter to be sharded, got a {type(grad).__name__} of shape "
            f"{list(grad.shape)}; run backward() through the sharded model"
        )
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)
