"""Raw calls of the operators: valid arguments, canaries around them, and, as a program, random calls.

    python -m helpers.raw_operators SEED COUNT LOG

The log names the case that a crash ended; printed is how many calls were refused.
"""

from __future__ import annotations

import random
import sys

import torch

import ltp_sparse as ls
from ltp_sparse import ops
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable

OPS = torch.ops.ltp_sparse
ERRORS = (ValueError, TypeError, RuntimeError)


def random_sets() -> list[IndexSet]:
    """All encodings, incomplete tiles, and a parameter of several tiles."""
    torch.manual_seed(0)
    sizes, densities = (TILE + 90, 700, 300, 1000), (0.3, 1.0, 0.02, 0.4)
    return [IndexSet.from_mask(torch.rand(n) < d) for n, d in zip(sizes, densities, strict=True)]


class Call:
    """Valid arguments of all operators, by name, for tests that break them."""

    def __init__(self) -> None:
        table = TileTable.build(random_sets(), ranks=True)
        self.table, k, n = table, table.k, len(table.sizes)
        self.update = {
            "params": [torch.randn(size) for size in table.sizes],
            "grads": [torch.randn(size) for size in table.sizes],
            "exp_avg": torch.zeros(k),
            "exp_avg_sq": torch.zeros(k),
            "scales": None,
            "master": None,
            **self.index(),
            "coefficients": ops.adamw_coefficients(torch.ones(n), lr=0.1),
            "anchor": None,
            "stochastic": False,
            "packed": False,
        }

    def index(self) -> dict:
        return {name: getattr(self.table, name).clone() for name in ("tiles", "words", "ranks", "positions")}

    def arguments(self, op: str) -> dict:
        own = dict(self.update)
        if op == "masked_adamw_":
            return own
        if op == "masked_sum_squares":
            return {name: own[name] for name in own if name not in ("exp_avg", "exp_avg_sq", "scales", "stochastic")}
        if op in COPIES:
            return {**self.index(), "tensors": own["params"], "slots": torch.zeros(self.table.k)}
        return {"grads": own["grads"], "out": torch.zeros(self.table.k), **self.index(), "accumulate": False}


COPIES = ("masked_gather_", "masked_scatter_", "masked_swap_")
OPERATORS = ("masked_adamw_", "masked_sum_squares", "masked_pack_", *COPIES)


def call(op: str, arguments: dict) -> None:
    getattr(OPS, op)(**arguments)


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of a tensor between canaries, and the whole memory as bytes."""
    room = 4096
    whole = torch.full((tensor.nbytes + 2 * room,), 0x5A, dtype=torch.uint8)
    inner = whole[room : room + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return inner.copy_(tensor), whole


def intact(inner: torch.Tensor, whole: torch.Tensor) -> bool:
    room = (len(whole) - inner.nbytes) // 2
    return bool((whole[:room] == 0x5A).all() and (whole[len(whole) - room :] == 0x5A).all())


def strange(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A replacement with another size, dtype, shape or stride, or with other numbers."""
    n = tensor.numel()
    whole = tensor.is_contiguous() and not tensor.is_meta
    if rng.random() < 0.4 and not tensor.is_floating_point() and n and whole:
        spoilt = tensor.clone()
        at = rng.randrange(n)
        spoilt.view(-1)[at] = rng.choice([-1, 0, 1, 3, int(spoilt.view(-1)[at]) + 1, torch.iinfo(tensor.dtype).max])
        return spoilt
    if not whole:
        return tensor
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int16, torch.int64, torch.bool)
    return rng.choice(
        [
            lambda: tensor.reshape(-1)[: rng.randrange(n + 1)],
            lambda: torch.cat([tensor.reshape(-1)] * 2),
            lambda: tensor.to(rng.choice(dtypes)),
            lambda: torch.empty(0, dtype=tensor.dtype),
            lambda: torch.zeros(2 * n, dtype=tensor.dtype)[::2].view_as(tensor) if n else tensor,
            lambda: tensor.reshape(-1, 1),
            lambda: torch.zeros((), dtype=tensor.dtype),
            lambda: torch.zeros(1, dtype=tensor.dtype).expand(n),
            lambda: tensor.to("meta"),
            lambda: torch.zeros(1, dtype=tensor.dtype).expand(2**40),
        ]
    )()


def try_one(number: int, right: Call) -> tuple[bool, bool]:
    """Makes a random call. Returns whether it was refused, and whether nothing was written beyond its tensors."""
    rng = random.Random(number)
    if rng.random() < 0.2:
        sizes = [rng.randrange(1, 200) for _ in range(3)]
        arguments = {
            "initial": [torch.randn(n) for n in sizes],
            "tuned": [torch.randn(n) for n in sizes],
            "groups": [0, 1, 0],
            "k": [rng.choice([3, -1, 2**40, 2**63 - 1]), 1],
        }
        op = "topk_delta"
        arguments["groups"][rng.randrange(3)] = rng.choice([0, 1, 2, -1, 2**62])
    else:
        op = rng.choice(OPERATORS)
        arguments = right.arguments(op)
    guards = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name], whole = guarded(value)
            guards.append((arguments[name], whole))
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            pairs = [guarded(tensor) for tensor in value]
            arguments[name] = [inner for inner, _ in pairs]
            guards += pairs
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(
            [name for name, value in arguments.items() if value is not None and not isinstance(value, bool)]
        )
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            arguments[name] = strange(rng, value)
        elif value and isinstance(value[0], torch.Tensor):
            at = rng.randrange(len(value))
            value[at] = strange(rng, value[at])
            if rng.random() < 0.2:
                del value[at]
    for name, value in arguments.items():
        if isinstance(value, bool) and rng.random() < 0.3:
            arguments[name] = not value
    try:
        call(op, arguments)
        refused = False
    except ERRORS:
        refused = True
    return refused, all(intact(*guard) for guard in guards)


def main(seed: int, count: int, path: str) -> None:
    torch.set_num_threads(1)
    right, refused = Call(), 0
    ls.use_backend("compiled")
    with open(path, "w", buffering=1) as log:
        for number in range(seed, seed + count):
            log.write(f"{number}\n")
            outcome, unharmed = try_one(number, right)
            assert unharmed, f"case {number} wrote beyond its tensors"
            refused += outcome
    print(refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
