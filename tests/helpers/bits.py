"""Bits: the floating-point dtypes, tensors and models compared bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltp_sparse.weights.names import canonical_parameters

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def bits(tensor: Tensor) -> Tensor:
    """The bits of a floating-point tensor as integers, so that NaN equals itself and 0 differs from -0.

    Not that of `weights.tensors`, so that tests do not compare by the code that they test.
    """
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters."""
    return {name: p.detach().clone() for name, p in canonical_parameters(model).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
