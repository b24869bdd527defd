"""What the tests of the core share: backends and instruction sets, comparison of bits, a small tied model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse import backends

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _params(names: tuple[str, ...]) -> list:
    reasons = {name: backends.unavailable_reason(name, torch.device("cpu")) for name in names}
    return [pytest.param(n, marks=pytest.mark.skipif(r is not None, reason=f"{n}: {r}")) for n, r in reasons.items()]


BACKENDS = _params(("reference", "compiled"))
ALL_BACKENDS = _params(backends.NAMES)
"""With Triton, whose interpreter is slow: for small inputs only."""


@contextmanager
def using(backend: str | None) -> Iterator[None]:
    ls.use_backend(backend)
    try:
        yield
    finally:
        ls.use_backend(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def compiled():
    """The compiled module, back on its own instruction set afterwards."""
    module = backends._extension()
    if isinstance(module, str):
        pytest.skip(module)
    own = module.isa()
    yield module
    module.set_isa(own)


def instruction_sets(module) -> list[str]:
    """Those that this processor runs."""
    found = []
    for name in ("generic", "avx2", "avx512"):
        try:
            module.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    return found


def bits(tensor: Tensor) -> Tensor:
    """The bits of a floating-point tensor as integers, so that NaN equals itself and 0 differs from -0."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


class TiedModel(nn.Module):
    """Embedding and LM head share their weight, as in XLM-R; the head is registered first, which must not matter."""

    base_model_prefix = "roberta"

    def __init__(self, vocabulary: int = 40, hidden: int = 16) -> None:
        super().__init__()
        self.lm_head = nn.ModuleDict({"decoder": nn.Linear(hidden, vocabulary)})
        layers = [
            nn.ModuleDict(
                {"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden)},
            )
            for _ in range(2)
        ]
        self.roberta = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"word_embeddings": nn.Embedding(vocabulary, hidden)}),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
            }
        )
        self.lm_head["decoder"].weight = self.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.roberta["embeddings"]["word_embeddings"]

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.roberta["encoder"]["layer"]:
            hidden = layer["LayerNorm"](hidden + torch.tanh(layer["dense"](hidden)))
        return self.lm_head["decoder"](hidden)


EMBEDDING = "roberta.embeddings.word_embeddings.weight"
DENSE = "roberta.encoder.layer.0.dense.weight"
