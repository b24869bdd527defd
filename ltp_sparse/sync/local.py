"""The parts of tensors that this process holds, and their active entries, which are read and written together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from ltp_sparse.deltas.entries import entries_of
from ltp_sparse.deltas.restoring import restoring
from ltp_sparse.optim.masked_adamw import MaskedAdamW
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.weights.names import Named, canonical_parameters, canonical_tensors, homes_of
from ltp_sparse.weights.sharding import Cut, is_sharded, local
from ltp_sparse.weights.tensors import check_plain_tensor
from ltp_sparse.weights.versions import open_weights

Model = nn.Module | Mapping[str, Any]
"""A module, or a mapping from names to tensors."""


class Local(NamedTuple):
    """Entries `start` to `start + tensor.numel()` of the row-major order of a tensor of the whole `shape`."""

    name: str
    tensor: Tensor
    start: int
    shape: Size

    @property
    def stop(self) -> int:
        """The entry after the last one."""
        return self.start + self.tensor.numel()


def model_of(source: Any) -> Any:
    """The model of an optimizer, or its trained parameters if it has none. Any other object is returned as it is."""
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
    raise TypeError(
        f"{what}: expected a model, a mapping from names to tensors or a MaskedAdamW, got {type(source).__name__}"
    )


class Homes:
    """Notices when weights of a model are replaced. Sharded weights, which FSDP2 itself replaces, are not watched.

    Args:
        model: the model.
        weights: its weights, as `weights_of` returns them.
        what: "Publisher" or "Follower", for messages.
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
    """Whether weights have moved in memory since their parts were taken, e.g. by `model.to(...)`."""
    then_and_now = ((part.tensor, local(weights[part.name])) for part in parts)
    return any((t.data_ptr(), t.device, t.dtype) != (n.data_ptr(), n.device, n.dtype) for t, n in then_and_now)


def local_part(name: str, tensor: Any, what: str) -> Local | None:
    """The part of a tensor that this process publishes: None if it holds nothing, or if another one holds the same.

    Raises:
        ValueError: it is a DTensor that is not sharded by rows.
        TypeError: it is of another subclass of tensors.
    """
    if not is_sharded(tensor):
        check_plain_tensor(tensor, f"{what}: {name!r}")
        return Local(name, tensor.detach(), 0, tensor.shape)
    cut, coordinate = Cut.of(tensor, f"{what}: {name!r}"), tensor.device_mesh.get_coordinate()
    if not cut.by_rows:
        raise ValueError(
            f"{what}: {name!r} is placed as {tuple(tensor.placements)}; expected shards of rows, Shard(0), and "
            "replicas. Redistribute it, or publish a model that is sharded in this way"
        )
    start, stop = cut.entries
    if start == stop or coordinate is None:
        return None
    if any(number and kind.is_replicate() for kind, number in zip(tensor.placements, coordinate, strict=True)):
        return None  # the first replica publishes
    return Local(name, local(tensor).detach(), start, tensor.shape)


class ActiveEntries:
    """The active entries of parts of tensors, read and written by one launch per device and dtype.

    Attributes:
        parts: name -> part.
        sets: name -> active entries of the part.
        groups: the entries of each device and dtype.
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
        """Name -> its slots, as views of those of the groups."""
        found: dict[str, Tensor] = {}
        for group, values in zip(self.groups, slots, strict=True):
            found |= group.split(values)
        return found

    @torch.no_grad()
    def scatter_(self, slots: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Writes the slots of all groups. After an interruption, all groups have the values of `before`."""
        new, old = ([v.to(g.device) for g, v in zip(self.groups, side, strict=True)] for side in (slots, before))
        with restoring(partial(g.scatter_, self._tensors, v) for g, v in zip(self.groups, old, strict=True)):
            for group, values in zip(self.groups, new, strict=True):
                group.scatter_(self._tensors, values)
