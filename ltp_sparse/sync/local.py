"""The part of each tensor that this process holds, and the active entries in it, read and written for all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from ltp_sparse.deltas.entries import entries_of
from ltp_sparse.deltas.restoring import HeldEntries, restoring
from ltp_sparse.optim.masked_adamw import MaskedAdamW
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.names import Named, canonical_parameters, canonical_tensors, homes_of
from ltp_sparse.weights.tensors import check_plain_tensor
from ltp_sparse.weights.versions import open_weights

Model = nn.Module | Mapping[str, Any]
"""A module, or name -> tensor."""


class Local(NamedTuple):
    """Entries `start` to `start + tensor.numel()` of the row-major order of a tensor of the whole `shape`."""

    name: str
    tensor: Tensor
    start: int
    shape: Size

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


def model_of(source: Any) -> Any:
    """The model of an optimizer; without one, what it trains. Anything else as it is."""
    if not isinstance(source, MaskedAdamW):
        return source
    return source.named_members() if source.model is None else source.model


def weights_of(source: Model, what: str) -> Named[Any]:
    """Canonical name -> weight of a model."""
    if isinstance(source, nn.Module):
        weights, parameters = open_weights(source), canonical_parameters(source)
        return Named({name: parameters[name] for name in weights}, weights.aliases)
    if isinstance(source, Mapping):
        return canonical_tensors(source)
    raise TypeError(f"{what}: expected a model, name -> tensor or a MaskedAdamW, got {type(source).__name__}")


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")


class Homes:
    """Where a model keeps its weights, to see that it still does. FSDP2 itself replaces sharded ones: not of those.

    Args:
        model: the model.
        weights: of it, as `weights_of` gives them.
        what: "Publisher" or "Follower".
    """

    def __init__(self, model: Model, weights: Mapping[str, Any], what: str) -> None:
        plain = {name: tensor for name, tensor in weights.items() if not is_sharded(tensor)}
        self._what = what
        self._places = [(*home, plain[home[2]], plain[home[2]].dtype) for home in homes_of(model, plain)]

    def check(self) -> None:
        """Raises a ValueError if another tensor is in the place of a weight, or a weight has another dtype."""
        for held, key, name, tensor, dtype in self._places:
            if tensor.dtype != dtype:
                raise ValueError(
                    f"{self._what}: {name!r} was {dtype} when the {self._what} was made and is {tensor.dtype} now, as "
                    "after model.half(); versions are bits of one dtype. Load the weights again as they were and make "
                    "a new one; to use them in another dtype, convert a copy of the model"
                )
            if held.get(key) is not tensor:
                raise ValueError(
                    f"{self._what}: {name!r} has been replaced in the model since the {self._what} was made, as "
                    "load_state_dict(assign=True) does; make a new one"
                )


def have_moved(weights: Mapping[str, Any], parts: Iterable[Local]) -> bool:
    """Whether weights lie elsewhere than when their parts were taken, as after `model.to(...)`."""
    for name, tensor, *_ in parts:
        now = weights[name].to_local() if is_sharded(weights[name]) else weights[name]
        if now.data_ptr() != tensor.data_ptr() or now.device != tensor.device or now.dtype != tensor.dtype:
            return True
    return False


def local_part(name: str, tensor: Any, what: str) -> Local | None:
    """What this process holds of a tensor. None: another one holds the same, or this one holds nothing.

    Raises:
        ValueError: a DTensor that is not sharded by rows.
        TypeError: another subclass of tensors.
    """
    if not is_sharded(tensor):
        check_plain_tensor(tensor, f"{what}: {name!r}")
        return Local(name, tensor.detach(), 0, tensor.shape)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements, coordinate = tensor.placements, tensor.device_mesh.get_coordinate()
    if not all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in placements):
        raise ValueError(
            f"{what}: {name!r} is placed as {tuple(placements)}; expected shards of rows, Shard(0), and replicas. "
            "Redistribute it, or publish from a model that is not cut otherwise"
        )
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    replica = coordinate is None or any(c and type(p) is Replicate for p, c in zip(placements, coordinate, strict=True))
    if replica or not Size(shape).numel():
        return None
    return Local(name, tensor.to_local().detach(), sum(offset[:1]) * tensor.shape[1:].numel(), tensor.shape)


class ActiveEntries:
    """The active entries of some parts of tensors, with a launch per device and dtype.

    Args:
        parts: the parts.
        sets: name -> the active entries of the part.

    Attributes:
        parts: name -> part
        sets: name -> the active entries of the part
        groups: the entries of each device and dtype
    """

    def __init__(self, parts: Iterable[Local], sets: Mapping[str, IndexSet]) -> None:
        self.parts = {part.name: part for part in parts}
        self.sets = dict(sets)
        self._tensors = {name: part.tensor for name, part in self.parts.items()}
        self.groups = entries_of(self._tensors, self.sets)

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """The slots of every group, copied to the host."""
        return [group.gather(self._tensors).cpu() for group in self.groups]

    def named(self, slots: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name -> its part of the slots of the groups, views of them."""
        found: dict[str, Tensor] = {}
        for group, values in zip(self.groups, slots, strict=True):
            found |= group.split(values)
        return found

    @torch.no_grad()
    def scatter_(self, slots: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Writes the slots of all groups, or of none: an interruption leaves those of `before`."""
        new, old = ([v.to(g.device) for g, v in zip(self.groups, side, strict=True)] for side in (slots, before))
        with restoring([HeldEntries(g, self._tensors, v) for g, v in zip(self.groups, old, strict=True)]):
            for group, values in zip(self.groups, new, strict=True):
                group.scatter_(self._tensors, values)
