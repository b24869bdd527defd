"""The packed state of sharded parameters as torch.distributed.checkpoint saves it on n ranks and loads it on m."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from ltp_sparse.selection.shards import Part


class Slots(LocalShardsWrapper):
    """This rank's slots of a parameter's packed state; loading writes to them in place. There may be none."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        try:
            if func.namespace != "aten":  # the wrapper gathers rows of equal parts only
                raise NotImplementedError
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except NotImplementedError:
            raise NotImplementedError(
                "MaskedAdamW: the state of sharded parameters stays sharded; save it by torch.distributed.checkpoint, "
                "with full_state_dict=False, and load it on as many ranks as you like, one included"
            ) from None
        if isinstance(result, LocalShardsWrapper):
            result.__class__ = Slots
        return result

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        return super().__create_write_items__(fqn, object) if self._local_shards[0].numel() else []

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return super().__create_chunk_list__() if self._local_shards[0].numel() else []


def to_save(state: dict[str, Tensor], param: Any, part: Part) -> dict[str, Tensor]:
    """The state of a parameter as parts of a sharded whole, sharing memory with it.

    Args:
        state: name -> this rank's tensor.
        param: the sharded parameter.
        part: this rank's part of its active entries.
    """
    placements = [placement if placement.is_replicate() else Shard(0) for placement in param.placements]

    def of(key: str, values: Tensor) -> Tensor:
        if not values.dim():
            return values
        first, count = _range(key, part)
        slots = Slots([values], [(first, *(0,) * (values.dim() - 1))])
        shape = Size((count, *values.shape[1:]))
        stride = torch.empty(shape, dtype=values.dtype, device="meta").stride()
        return DTensor.from_local(slots, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)

    return {key: of(key, values) for key, values in state.items()}


def to_load(state: dict[str, Any], part: Part, lengths: dict[str, int]) -> dict[str, Any]:
    """This rank's part of a saved state, which is a result of `to_save` or the state of a whole parameter.

    Args:
        state: name -> saved tensor.
        part: this rank's part of the parameter's active entries.
        lengths: name -> number of slots, or state blocks, on this rank.

    Raises:
        ValueError: the state is cut in another place.
    """

    def of(key: str, values: Any) -> Any:
        held = values._local_tensor if isinstance(values, DTensor) else values
        if isinstance(held, LocalShardsWrapper):
            (values,), ((first, *_),) = held.local_shards(), held.local_offsets()
            if first != _range(key, part)[0]:
                raise ValueError(
                    f"MaskedAdamW: {key!r} in the state starts at slot {first}, and this rank's part at "
                    f"{_range(key, part)[0]}; load it by torch.distributed.checkpoint, which cuts it anew"
                )
        elif isinstance(values, Tensor) and values.dim() and not isinstance(values, DTensor):
            first, count = _range(key, part)
            if len(values) == count and key in lengths:
                values = values[first : first + lengths[key]]
        return values

    return {key: of(key, values) for key, values in state.items()}


def _range(key: str, part: Part) -> tuple[int, int]:
    """(first slot or state block of this rank, number of those of the whole parameter)."""
    if key != "scales":
        return part.first, part.k
    assert part.blocks is not None
    return part.blocks
