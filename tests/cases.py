"""What the tests of the core share: backends and instruction sets, comparison of bits, a small tied model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.backends import compiled as compiled_backend
from ltp_sparse.backends.arguments import RECORDS, Tensors, fields_of
from ltp_sparse.optim.gradient_view import GradientView

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _params(names: tuple[str, ...]) -> list:
    reasons = {name: backends.unavailable_reason(name, torch.device("cpu")) for name in names}
    return [pytest.param(n, marks=pytest.mark.skipif(r is not None, reason=f"{n}: {r}")) for n, r in reasons.items()]


BACKENDS = _params(("reference", "compiled"))
ALL_BACKENDS = _params(backends.NAMES)
"""With Triton, whose interpreter is slow: for small inputs only."""


DELTAS = {
    "normal": lambda n, g: torch.randn(n, generator=g) * 1e-3,
    "levels": lambda n, g: torch.randint(0, 4, (n,), generator=g) * 2.0**-7,
    "mostly-zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.3),
    "constant": lambda n, g: torch.full((n,), -0.5),
    "denormal": lambda n, g: torch.randint(-40, 41, (n,), generator=g) * 2.0**-149,
    "wide": lambda n, g: torch.randn(n, generator=g) * 10.0 ** torch.randint(-38, 38, (n,), generator=g),
}


def random_case(seed: int):
    """(initial, tuned, ks, groups): tensors of awkward sizes, mixed dtypes and deltas, up to three budgets."""
    g = torch.Generator().manual_seed(seed)

    def pick(options):
        return list(options)[int(torch.randint(len(options), (1,), generator=g))]

    initial, tuned = [], []
    for _ in range(int(torch.randint(1, 7, (1,), generator=g))):
        n = pick((0, 1, 31, 63, 64, 65, 500, 1000))
        kind = pick(DELTAS)
        base = torch.zeros(n) if kind in ("denormal", "wide") else torch.randn(n, generator=g) * 0.05
        initial.append(base.to(pick(DTYPES.values()) if kind != "wide" else torch.float32))
        after = initial[-1].float() + DELTAS[kind](n, g)
        tuned.append(after.to(pick(DTYPES.values()) if kind != "wide" else torch.float32))
    count = pick((1, 1, 2, 3))
    groups = [int(torch.randint(count, (1,), generator=g)) for _ in tuned]
    pools = [sum(t.numel() for t, at in zip(tuned, groups, strict=True) if at == group) for group in range(count)]
    ks = [pick((0, n, min(1, n), n // 5, int(torch.randint(n + 1, (1,), generator=g)))) for n in pools]
    return initial if seed % 5 else [], tuned, ks, groups


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


class Unpacked:
    """The functions of a backend, with the fields of their records as arguments."""

    def __init__(self, functions) -> None:
        self.functions = functions

    def __getattr__(self, op: str):
        def call(*arguments, **more):
            fields = fields_of(RECORDS[op])
            given = dict(zip(fields, arguments, strict=False)) | more
            lists = {name: Tensors(given[name]) for name, field in fields.items() if field.kind is Tensors}
            return getattr(self.functions, op)(RECORDS[op](**given | lists))

        return call


@pytest.fixture
def compiled():
    """The compiled module, back on its own instruction set afterwards."""
    module = compiled_backend.extension()
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


SMALL_ROUTES = {
    "SAMPLES": 200, "_SAMPLE_SHARE": 2, "SAMPLE_FROM": 1, "_SPARE_CANDIDATES": 40, "_PIECE": 64, "_HISTOGRAMS": 1 << 16,
}  # fmt: skip
"""Of `topk`: with these, every route and the work in pieces happen at a few hundred entries."""


def has_dense_gradient(param):
    """Whether memory of the parameter's size is held for its gradient; a view of a packed one is not."""
    return param.grad is not None and not isinstance(param.grad, GradientView)
