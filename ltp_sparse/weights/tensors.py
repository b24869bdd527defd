"""Checks that a tensor can be read by address: plain, dense and with memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn

TILE = 65_536
"""Entries of a tile: the largest block whose positions fit in 16 bits."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of weights, with the codes that the compiled kernels read."""
DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
"""Their names, for messages."""

_PLAIN = {Tensor, nn.Parameter}
_PLAIN_OR_NONE = {*_PLAIN, type(None)}
LOWEST_ADDRESS = 1 << 40
"""The address of a view whose storage was freed is its offset, which is below this number; few valid ones are."""

_version = attrgetter("_version")

_ADVICE = {
    "DTensor": "pass this rank's part, `.to_local()`, or the whole, `.full_tensor()`",
    "AsyncCollectiveTensor": "wait for it first, `.wait()`",
    "FakeTensor": "it has no memory; call this outside of FakeTensorMode, on real tensors",
    "FunctionalTensor": "it has no memory; call this outside of the transformation",
    "NestedTensor": "pass its `.values()`",
}
_OTHERS = "pass a plain tensor, e.g. `.dequantize()` if it is quantised"


def check_plain_tensor(tensor: Tensor, what: str) -> None:
    """Refuses tensors whose values cannot be read from their memory by address.

    Parameters are accepted, and so are subclasses that only add attributes or methods.

    Args:
        tensor: any tensor.
        what: its name, for messages, e.g. "MaskedAdamW: parameter 'head.weight'".

    Raises:
        TypeError: it is a subclass with operations of its own (DTensor, quantised tensors, ...), sparse, nested,
            quantised, on the meta device, or its memory was freed. The message says what to do.
    """
    kind = type(tensor)
    if kind not in _PLAIN:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what} must be a tensor, got {kind.__name__}")
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            advice = next((_ADVICE[base.__name__] for base in kind.__mro__ if base.__name__ in _ADVICE), _OTHERS)
            raise TypeError(f"{what} must be a plain tensor, got {kind.__name__}; {advice}")
    if tensor.is_nested:
        raise TypeError(f"{what} must be a plain tensor, got a nested one; {_ADVICE['NestedTensor']}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} must be a dense tensor, got {tensor.dtype} ({tensor.layout}); pass its `.to_dense()`")
    if tensor.is_quantized:
        raise TypeError(f"{what} must be a plain tensor, got {tensor.dtype}; pass its `.dequantize()`")
    if tensor.is_meta:
        raise TypeError(f"{what} is on the meta device and has no values; load the weights first")
    if not has_memory(tensor):
        raise TypeError(f"{what} has {tensor.numel()} entries, but its memory was freed; gather or reload it first")


def all_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no tensor is of a subclass: a quick test before `check_plain_tensor` is called for each. None passes."""
    return {*map(type, tensors)} <= _PLAIN_OR_NONE


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor has its memory; sharded training frees or shrinks storages between uses."""
    if not tensor.numel() or tensor.data_ptr() >= LOWEST_ADDRESS:
        return True
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + extent) * tensor.element_size()


def edits_of(tensors: Collection[Tensor]) -> list[tuple[int, int]]:
    """(address, count of in-place edits) of each tensor, to notice that other code has written to it or replaced it."""
    return list(zip(map(Tensor.data_ptr, tensors), map(_version, tensors), strict=True))


def count_edit(tensors: Collection[Tensor]) -> None:
    """Tells torch that tensors were written by address: autograd then refuses a backward that needs the old values."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # edits of inference tensors are not counted
        torch.autograd.graph.increment_version(tensor for tensor in tensors if not tensor.is_inference())


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers of the same shape, so that NaN equals itself and 0 differs from -0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def flat_piece(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Entries start..stop of any tensor in row-major order, contiguous. It copies their rows at most."""
    if tensor.is_contiguous() or tensor.dim() < 2:
        return tensor.reshape(-1)[start:stop].contiguous()  # a strided vector stays strided under reshape
    row = tensor[0].numel()
    first = start // row
    rows = tensor[first : -(-stop // row)].reshape(-1)
    return rows[start - first * row : stop - first * row].contiguous()
